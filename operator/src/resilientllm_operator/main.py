"""``resilientllm-operator``: kopf watches, the controller acts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import kopf

from resilientllm_operator import login, telemetry, watching
from resilientllm_operator.controller import WATCHED, Controller
from resilientllm_operator.election import Election
from resilientllm_operator.freshness import Freshness
from resilientllm_operator.garbage import set_aside_what_survives
from resilientllm_operator.kube import RESOURCES
from resilientllm_operator.names import MANAGER

logger = logging.getLogger(__name__)

SYSTEM = "resilientllm-system"
"""The namespace that the shipped manifests install into."""


def build_registry(
    log_in: login.Login, namespace: str | None, port: int, lease: tuple[str, str] | None
) -> kopf.OperatorRegistry:
    """kopf's handlers. Only ``on.event``: kopf never writes to our objects, neither annotations nor finalizers.

    ``lease``: namespace and name of the one that its holder acts by; None for an operator that is alone.
    """
    registry = kopf.OperatorRegistry()
    stack = AsyncExitStack()
    controllers: list[Controller] = []
    freshness = Freshness(WATCHED)

    def watch(kind: str) -> None:
        # Before kopf looks for what to watch, which is after the start: a watch that is not allowed would end it.
        api, plural = RESOURCES[kind]
        *group, version = api.split("/")[1:]
        selector = (group[0], version, plural) if group else (version, plural)
        kopf.on.event(*selector, registry=registry, id=f"seen-{plural}")(_handler(kind, controllers))

    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        tune(settings)
        kube = await stack.enter_async_context(login.connect(log_in, watching.trace(freshness)))
        election = Election(kube, *lease, on_change=lambda leads: controller.lead(leads)) if lease else None
        controller = Controller(kube, namespace, freshness, lambda: election is None or election.leads)
        kube.permit = controller.may_not_act
        await stack.enter_async_context(telemetry.serve(port, lambda: _describe(controller, election)))
        await controller.wait_for_crd()
        if election is None:
            telemetry.LEADER.set(1)
        else:
            # Before the controller's task, and so after it when this process ends: first nothing acts any more.
            await stack.enter_async_context(election)
        for kind in controller.watched:
            watch(kind)
        task = asyncio.create_task(controller.run(), name="controller")
        stack.push_async_callback(_cancel, task)
        controllers.append(controller)
        logger.info("looks after ResilientLLM objects in %s", namespace or "all namespaces")

    async def stop(**_: Any) -> None:
        await stack.aclose()

    async def authenticate(**_: Any) -> Any:
        return login.for_kopf(log_in, watching.trace_of_kopf(freshness))

    kopf.on.login(registry=registry)(authenticate)
    # A taken port or a missing right does not mend itself in the process: end, and let the kubelet back off.
    kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)(start)
    kopf.on.cleanup(registry=registry)(stop)
    return registry


def tune(settings: kopf.OperatorSettings) -> None:
    """kopf's defaults suit handlers that may wait for minutes."""
    settings.posting.enabled = False
    settings.peering.standalone = True
    # Scanning would need the right to watch all CRDs and namespaces; the CRD is known to be there.
    settings.scanning.disabled = True
    watching.tune(settings)
    for kind, selector in WATCHED.items():
        if selector:
            settings.watching.label_selectors[RESOURCES[kind][1]] = selector


def _handler(kind: str, controllers: list[Controller]) -> Callable[..., Awaitable[None]]:
    async def seen(event: Any, **_: Any) -> None:
        for controller in controllers:
            controller.seen(kind, event["type"], dict(event["object"]))

    return seen


def _describe(controller: Controller, election: Election | None) -> str:
    """For ``/healthz``: who leads, and whether it acts."""
    if election is not None and not election.leads:
        return f"follows {election.leader or 'nobody'}"
    held = controller.may_not_act()
    return "leads" if held is None else f"leads, and does nothing: {held}"


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="resilientllm-operator", description="Makes ResilientLLM objects true.")
    parser.add_argument("--namespace", help="look after this namespace only; default: all")
    parser.add_argument("--kubeconfig", type=Path, help="for development; default: the pod's ServiceAccount")
    parser.add_argument(
        "--lease-namespace", help=f"of the Lease that the acting replica holds; default: its pod's, else {SYSTEM}"
    )
    parser.add_argument("--lease-name", default=MANAGER, help="(%(default)s)")
    parser.add_argument("--no-lease", action="store_true", help="act without one: nobody else may run beside")
    parser.add_argument("--port", type=int, default=8080, help="of /healthz and /metrics (%(default)s)")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser.parse_args(arguments)


def main() -> int:
    options = parse_arguments()
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel("WARNING")
    try:
        log_in = login.choose(options.kubeconfig)
    except kopf.LoginError as error:
        print(f"resilientllm-operator: error: {error}", file=sys.stderr)
        return 2
    set_aside_what_survives()
    lease = (options.lease_namespace or login.own_namespace(log_in) or SYSTEM, options.lease_name)
    kopf.run(
        registry=build_registry(log_in, options.namespace, options.port, None if options.no_lease else lease),
        clusterwide=options.namespace is None,
        namespaces=[options.namespace] if options.namespace else [],
        standalone=True,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
