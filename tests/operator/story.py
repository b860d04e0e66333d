"""One object on a real API server, with engines and kubelets that are simulated, and operators that come and go."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, TypeVar

import yaml
from aiohttp import web
from resilientllm_api.crd import ResilientLLMStatus

from e2e.cluster.launch import REPOSITORY
from e2e.cluster.lone import LoneControlPlane, own_network
from e2e.simulation.api import CUSTOM, AdminApi, Json, Refused
from e2e.simulation.engines import Do, Engine, Engines
from e2e.simulation.gate import CutOff, Gate
from e2e.simulation.kubelets import Kubelets
from e2e.simulation.lives import Lives

NAME = "tiny"
SYSTEM = "resilientllm-system"
SLOTS = ("0-s0", "0-s1", "1-s0", "1-s1", "0-engine", "1-engine")
PATIENCE_SECONDS = 120.0
"""So long it may take until the operator does something. However slow the machine is, this is not how it looks."""
MOST_WRITES = 200
"""More than anything here takes: the operator goes in circles."""
_LOOK_SECONDS = 0.05

Made = TypeVar("Made", LoneControlPlane, Lives)


def install(control_plane: LoneControlPlane, repository: Path) -> str:
    """CRD, RBAC and all that is shipped; a token of the operator's own account."""
    control_plane.kubectl("apply", "--kustomize", str(repository / "manifests" / "base"))
    control_plane.kubectl(f"--namespace={SYSTEM}", "scale", "deployment", "resilientllm-operator", "--replicas=0")
    control_plane.kubectl("wait", "--for=condition=Established", "crd/resilientllms.resilientllm.dev", "--timeout=60s")
    token = ("create", "token", "resilientllm-operator", "--duration=6h")
    return control_plane.kubectl(f"--namespace={SYSTEM}", *token).strip()


class Simulation:
    """``budgets``: how many writes each life of the operator has; it is killed after the last of them."""

    def __init__(self, api: AdminApi, namespace: str, lives: Lives, gate: Gate, token: str, folder: Path) -> None:
        self.api = api
        self.namespace = namespace
        self.lives = lives
        self.begun = 0
        """How many operators there were."""
        self.gate = gate
        self.budgets: Iterator[int | None] = repeat(None)
        self.options: tuple[str, ...] = ("--no-lease",)
        self._addresses: set[str] = set()
        self.engines = Engines(self._stage_lives, self._gated)
        self.kubelets = Kubelets(api, namespace, nodes=9, on_pod=self._pod)
        self._log = folder / f"{namespace}.log"
        self._kubeconfig = folder / "operator.kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "gate", "cluster": {"server": gate.address}}],
            "users": [{"name": "operator", "user": {"token": token}}],
            "contexts": [{"name": "it", "context": {"cluster": "gate", "user": "operator"}}],
            "current-context": "it",
        }
        self._kubeconfig.write_text(yaml.safe_dump(config))

    @property
    def path(self) -> str:
        return f"{CUSTOM}/namespaces/{self.namespace}/resilientllms/{NAME}"

    async def apply(self, **spec: Any) -> None:
        fields = {"image": "worker:1", "model": {"path": "/models/tiny"}, "instances": 2, "stages": 2} | spec
        obj = {
            "apiVersion": "resilientllm.dev/v1alpha1",
            "kind": "ResilientLLM",
            "metadata": {"name": NAME, "namespace": self.namespace},
            "spec": fields,
        }
        await self.api.create(self.path.rpartition("/")[0], obj)

    async def pods(self) -> list[Json]:
        return await self.api.items(f"api/v1/namespaces/{self.namespace}/pods")

    async def pod_of(self, slot: str) -> Json:
        """The newest pod of a slot, such as ``0-s1``."""
        found = [pod for pod in await self.pods() if pod["metadata"]["name"].startswith(f"{NAME}-{slot}-")]
        return max(found, key=lambda pod: int(pod["metadata"]["resourceVersion"]))

    async def status(self) -> ResilientLLMStatus:
        return ResilientLLMStatus.model_validate((await self.api.get(self.path)).get("status") or {})

    async def events(self) -> Counter[tuple[str, str]]:
        found = await self.api.items(f"apis/events.k8s.io/v1/namespaces/{self.namespace}/events")
        return Counter((each["reason"], each["note"]) for each in found if each["regarding"]["kind"] == "ResilientLLM")

    def made(self, since: int = 0) -> Counter[str]:
        """How many pods were made for each slot, from the ``since``-th write on."""
        names = [write.split()[-1] for write in self.gate.writes[since:] if write.startswith("POST pods ")]
        return Counter("-".join(name.split("-")[1:3]) for name in names)

    async def until(self, what: str, check: Callable[[], Awaitable[object]]) -> None:
        """Fails when the operator does nothing any more, or goes in circles."""
        clock = asyncio.get_running_loop().time
        first = seen = len(self.gate.writes)
        deadline = clock() + PATIENCE_SECONDS
        while True:
            try:
                if await check():
                    return
            except Refused as refused:
                if refused.status != 404:
                    raise
            if len(self.gate.writes) > seen:
                seen, deadline = len(self.gate.writes), clock() + PATIENCE_SECONDS
            if clock() > deadline or seen - first > MOST_WRITES:
                raise AssertionError(await self._describe(what))
            await asyncio.sleep(_LOOK_SECONDS)

    async def as_specified(self) -> bool:
        """Whether all pods are those that should be, all engines hold the plan in the status, and it says so."""
        obj = await self.api.get(self.path)
        status = ResilientLLMStatus.model_validate(obj.get("status") or {})
        conditions = {each.type: each for each in status.conditions}
        wanted = {"Ready": "True", "Degraded": "False", "Progressing": "False"}
        if any(kind not in conditions or conditions[kind].status != is_ for kind, is_ in wanted.items()):
            return False
        if any(each.observed_generation != obj["metadata"]["generation"] for each in conditions.values()):
            return False
        slots = obj["spec"]["instances"] * (obj["spec"]["stages"] + 1)
        pods = await self.pods()
        images = {pod["spec"]["containers"][0]["image"] for pod in pods}
        plans = {instance.plan_version for instance in status.instances}
        return (
            len(pods) == slots and images == {obj["spec"]["image"]} and plans == {status.plan and status.plan.version}
        )

    async def keep_an_operator(self) -> None:
        """Until it is cancelled: whenever there is no operator, another begins."""
        while True:
            if not self.lives.alive():
                self.gate.left = next(self.budgets)
                arguments = ("--kubeconfig", str(self._kubeconfig), "--namespace", self.namespace, "--port", "0")
                self.lives.start(self._log, *arguments, *self.options)
                self.begun += 1
            await asyncio.sleep(_LOOK_SECONDS)

    def runs(self, pod: Json) -> bool:
        return pod["status"]["podIP"] in self._addresses

    def _stage_lives(self, address: str) -> bool:
        return address.partition(":")[0] in self._addresses

    async def _gated(self, what: str, do: Do) -> web.StreamResponse:
        if what.startswith("POST completions"):  # Changes nothing, and the answer is only in the operator's memory.
            return await do()
        try:
            return await self.gate.write(what, do)
        except CutOff:
            return web.Response(status=503)  # Nobody is there any more who could read it.

    def _pod(self, pod: Json, runs: bool) -> None:
        address = pod["status"]["podIP"]
        (self._addresses.add if runs else self._addresses.discard)(address)
        if pod["metadata"]["labels"]["resilientllm.dev/role"] == "engine" and runs:
            self.engines.engines[address] = Engine()
        elif not runs:
            self.engines.engines.pop(address, None)
        self.engines.look()

    async def _describe(self, what: str) -> str:
        obj = await self.api.get(self.path)
        pods = [
            (
                pod["metadata"]["name"],
                pod["spec"].get("nodeName"),
                pod["status"].get("phase"),
                "deletionTimestamp" in pod["metadata"],
            )
            for pod in await self.pods()
        ]
        log = self._log.read_text()[-4000:] if self._log.exists() else ""
        shown = json.dumps(obj.get("status"), indent=1)
        lives = f"{self.begun} lives, {len(self.gate.writes)} writes: {self.gate.writes[-40:]}"
        return f"expected: {what}\n{shown}\n{pods}\n{lives}\n{log}"


@asynccontextmanager
async def simulation(
    control_plane: LoneControlPlane, lives: Lives, token: str, namespace: str, folder: Path
) -> AsyncIterator[Simulation]:
    """A namespace, and an operator that looks after it and nothing else; it is gone afterwards."""
    async with AdminApi(control_plane.kubeconfig) as api, Gate(api, lives.kill) as gate:
        await api.create("api/v1/namespaces", {"metadata": {"name": namespace}})
        simulated = Simulation(api, namespace, lives, gate, token, folder)
        async with simulated.engines:
            tasks = [asyncio.create_task(simulated.kubelets.run())]
            tasks.append(asyncio.create_task(simulated.keep_an_operator()))
            try:
                yield simulated
            finally:
                for task in tasks:
                    task.cancel()
                results = await asyncio.gather(*tasks, return_exceptions=True)
                lives.kill()
        assert all(isinstance(each, asyncio.CancelledError) for each in results), results


Story = Callable[[Simulation], Awaitable[None]]
Tell = Callable[[Story, str], None]
"""Runs a story in a namespace of this name."""


@contextmanager
def storyteller(folder: Path) -> Iterator[Tell]:
    """A control plane, and a thread that has a network of its own together with it."""
    with ThreadPoolExecutor(1, initializer=own_network) as thread, ExitStack() as stack:

        def enter(made: Made) -> Made:
            thread.submit(made.__enter__).result()
            stack.callback(lambda: thread.submit(made.__exit__, None, None, None).result())
            return made

        control_plane, lives = enter(LoneControlPlane(folder)), enter(Lives())
        token = thread.submit(install, control_plane, REPOSITORY).result()

        async def run(story: Story, namespace: str) -> None:
            async with simulation(control_plane, lives, token, namespace, folder) as simulated:
                await story(simulated)

        yield lambda story, namespace: thread.submit(asyncio.run, run(story, namespace)).result()


async def create(it: Simulation) -> None:
    await it.apply()
    await it.until("an object that is as specified", it.as_specified)
    assert it.made() == dict.fromkeys(SLOTS, 1)
