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

from resilientllm_operator import login, telemetry
from resilientllm_operator.controller import WATCHED, Controller
from resilientllm_operator.kube import RESOURCES

logger = logging.getLogger(__name__)


def build_registry(log_in: login.Login, namespace: str | None, port: int) -> kopf.OperatorRegistry:
    """kopf's handlers. Only ``on.event``: kopf never writes to our objects, neither annotations nor finalizers."""
    registry = kopf.OperatorRegistry()
    stack = AsyncExitStack()
    controllers: list[Controller] = []

    def watch(kind: str) -> None:
        # Before kopf looks for what to watch, which is after the start: a watch that is not allowed would end it.
        api, plural = RESOURCES[kind]
        *group, version = api.split("/")[1:]
        selector = (group[0], version, plural) if group else (version, plural)
        kopf.on.event(*selector, registry=registry, id=f"seen-{plural}")(_handler(kind, controllers))

    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        tune(settings)
        await stack.enter_async_context(telemetry.serve(port))
        kube = await stack.enter_async_context(login.connect(log_in))
        controller = Controller(kube, namespace)
        await controller.wait_for_crd()
        for kind in controller.watched:
            watch(kind)
        task = asyncio.create_task(controller.run(), name="controller")
        stack.push_async_callback(_cancel, task)
        controllers.append(controller)
        logger.info("looks after ResilientLLM objects in %s", namespace or "all namespaces")

    async def stop(**_: Any) -> None:
        await stack.aclose()

    def authenticate(**_: Any) -> Any:
        return log_in()

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
    settings.networking.request_timeout = 15
    settings.networking.connect_timeout = 3
    settings.watching.reconnect_backoff = 0.5
    for kind, selector in WATCHED.items():
        if selector:
            settings.watching.label_selectors[RESOURCES[kind][1]] = selector


def _handler(kind: str, controllers: list[Controller]) -> Callable[..., Awaitable[None]]:
    async def seen(event: Any, **_: Any) -> None:
        for controller in controllers:
            controller.seen(kind, event["type"], dict(event["object"]))

    return seen


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="resilientllm-operator", description="Makes ResilientLLM objects true.")
    parser.add_argument("--namespace", help="look after this namespace only; default: all")
    parser.add_argument("--kubeconfig", type=Path, help="for development; default: the pod's ServiceAccount")
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
    kopf.run(
        registry=build_registry(log_in, options.namespace, options.port),
        clusterwide=options.namespace is None,
        namespaces=[options.namespace] if options.namespace else [],
        standalone=True,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
