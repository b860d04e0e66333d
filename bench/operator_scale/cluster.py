"""The simulated cluster: objects and pods as two watches of ours see them; scheduler and kubelets are played."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from resilientllm_operator.node_affinity import nodes_kept_off

from e2e.cluster.layout import POD_NETWORK
from e2e.simulation.api import AdminApi, Json, Refused
from e2e.simulation.kubelets import running_status

NAMESPACE = "models"
CONCURRENCY = 40
DECISION_TIMEOUT_SECONDS = 60.0


@dataclass
class Cluster:
    """What two watches of ours have seen: objects and pods."""

    api: AdminApi
    objects: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    made: dict[str, dict[str, float]] = field(default_factory=dict)
    """When each pod was first seen, by its slot and its name."""
    waiting: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """Pods of which something has changed."""
    addresses: Iterator[str] = field(default_factory=lambda: (str(POD_NETWORK[number]) for number in count(256)))

    async def watch(self, path: str, known: dict[str, Json], seen: Callable[[Json], None] = lambda obj: None) -> None:
        version = ""
        while True:
            if not version:
                page = await self.api.get(path, resourceVersion="0")
                version = page["metadata"]["resourceVersion"]
                known.update({obj["metadata"]["name"]: obj for obj in page["items"]})
            async for event in self.api.watch(path, version):
                obj = event["object"]
                if event["type"] == "ERROR":
                    version = ""
                    break
                version = obj["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    known.pop(obj["metadata"]["name"], None)
                elif event["type"] != "BOOKMARK":
                    known[obj["metadata"]["name"]] = obj
                    seen(obj)
                async with self.changed:
                    self.changed.notify_all()

    def saw_pod(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        self.made.setdefault(slot_of(name), {}).setdefault(name, time.monotonic())
        self.waiting.put_nowait(name)

    async def until(self, check: Callable[[], Any], timeout_seconds: float) -> Any:
        async with asyncio.timeout(timeout_seconds), self.changed:
            while not (found := check()):
                await self.changed.wait()
            return found

    async def moments(self, checks: Mapping[Hashable, Callable[[], float | None]]) -> list[float]:
        """When each of these was the case: a check says when, or that it is not yet."""
        found: dict[Hashable, float] = {}

        def look() -> bool:
            for key in checks.keys() - found.keys():
                if (at := checks[key]()) is not None:
                    found[key] = at
            return len(found) == len(checks)

        try:
            await self.until(look, DECISION_TIMEOUT_SECONDS)
        except TimeoutError as error:
            missing = sorted(map(str, checks.keys() - found.keys()))
            error.add_note(f"{len(missing)} of {len(checks)} are missing: {', '.join(missing)}")
            raise
        return sorted(found.values())

    def stages_on(self, nodes: Collection[str]) -> list[Json]:
        """The pods of stages that stay there."""
        return [
            pod
            for pod in self.pods.values()
            if pod["spec"].get("nodeName") in nodes
            and "resilientllm.dev/stage" in pod["metadata"]["labels"]
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def ready(self) -> int:
        return sum(condition(obj, "Ready") == "True" for obj in self.objects.values())

    async def play(self, nodes: list[str]) -> None:
        """Scheduler and kubelets: a pod is bound, runs at once, and ends when it is told to. One of several workers."""
        while True:
            pod = self.pods.get(await self.waiting.get())
            if pod is None:
                continue
            path = f"api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}"
            with suppress(Refused):  # It has changed meanwhile, or is gone; then there is another event.
                if "deletionTimestamp" in pod["metadata"]:
                    await self.api.delete(path, grace_seconds=0)
                elif "nodeName" not in pod["spec"]:
                    await self._bind(pod, nodes)
                elif "podIP" not in pod["status"]:
                    await self.api.patch(f"{path}/status", {"status": running_status(pod, next(self.addresses))})

    async def _bind(self, pod: Json, nodes: list[str]) -> None:
        """The copies of a stage are never on one node."""
        labels = pod["metadata"]["labels"]
        place = int(labels["resilientllm.dev/stage"]) if "resilientllm.dev/stage" in labels else 9
        number = int(labels["resilientllm.dev/name"].removeprefix("model-"))
        first = 7 * number + 3 * place + len(nodes) // 2 * int(labels["resilientllm.dev/instance"])
        avoided = nodes_kept_off(pod["spec"])
        node = next(each for step in range(len(nodes)) if (each := nodes[(first + step) % len(nodes)]) not in avoided)
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        path = f"api/v1/namespaces/{NAMESPACE}/pods/{name}/binding"
        await self.api.create(path, {"metadata": {"name": name}, "target": target})


def condition(obj: Json, kind: str) -> str:
    found = obj.get("status", {}).get("conditions", [])
    return next((str(each["status"]) for each in found if each["type"] == kind), "")


async def gather(work: Iterable[Awaitable[Any]]) -> None:
    """Some at a time."""
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(each: Awaitable[Any]) -> None:
        async with limit:
            await each

    await asyncio.gather(*(one(each) for each in work))


def healthy_node(name: str) -> Json:
    ready = {"type": "Ready", "status": "True", "reason": "Bench", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"metadata": {"name": name}, "status": {"conditions": [ready]}}


def obj(number: int, instances: int, stages: int) -> Json:
    return {
        "apiVersion": "resilientllm.dev/v1alpha1",
        "kind": "ResilientLLM",
        "metadata": {"name": f"model-{number}", "namespace": NAMESPACE},
        "spec": {"image": "worker:1", "model": {"path": "/models/m"}, "instances": instances, "stages": stages},
    }


def stages_of(cluster: Cluster, name: str) -> list[Json]:
    """The pods of an object's stages, in the order of their places."""
    found = [
        pod
        for pod in cluster.pods.values()
        if owner(pod) == name
        and "resilientllm.dev/stage" in pod["metadata"]["labels"]
        and "deletionTimestamp" not in pod["metadata"]
    ]
    return sorted(found, key=place_of)


def nodes_of(cluster: Cluster, name: str) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in stages_of(cluster, name)}


def slot_of(pod: str) -> str:
    return pod.rsplit("-", 1)[0]


def owner(pod: Json) -> str:
    return str(pod["metadata"]["labels"]["resilientllm.dev/name"])


def owners(pods: Iterable[Json]) -> set[str]:
    return {owner(pod) for pod in pods}


def place_of(pod: Json) -> tuple[int, int]:
    labels = pod["metadata"]["labels"]
    return int(labels["resilientllm.dev/instance"]), int(labels["resilientllm.dev/stage"])


def stage_status(status: Json, instance: int, stage: int) -> Json:
    found = [each for each in status.get("instances", []) if each["instance"] == instance]
    return next((each for each in found[0]["stages"] if each["stage"] == stage), {}) if found else {}


def away(status: Json) -> int:
    """How many places are not served by their own stages."""
    return sum(
        stage["servedBy"] != f"{each['instance']}.{stage['stage']}"
        for each in status["instances"]
        for stage in each["stages"]
    )
