"""Nodes that run nothing: pods are bound, get an address, are ready, and end when they are told to.

Scheduler and kubelets in one. A node that is ``down`` does nothing of it, as one without power.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from typing import Any

import aiohttp
from resilientllm_operator.node_affinity import nodes_kept_off

from e2e.cluster.layout import POD_NETWORK

from .api import AdminApi, Json, Refused

_LOOK_SECONDS = 0.03
_HEARTBEAT_SECONDS = 5.0


class Kubelets:
    def __init__(
        self, api: AdminApi, namespace: str, nodes: int, on_pod: Callable[[Json, bool], None] = lambda pod, runs: None
    ) -> None:
        """``on_pod`` is called with a pod that runs now, and when it does not any more."""
        self.nodes = [f"node-{number}" for number in range(nodes)]
        self.down: set[str] = set()
        self._api = api
        self._namespace = namespace
        self._on_pod = on_pod
        self._running: dict[str, Json] = {}
        """By uid."""
        self._addresses = (str(POD_NETWORK[number]) for number in count(256))

    async def run(self) -> None:
        """Until it is cancelled."""
        for node in self.nodes:
            with suppress(Refused):
                await self._api.create("api/v1/nodes", {"metadata": {"name": node}})
        heartbeats = 0.0
        while True:
            now = asyncio.get_running_loop().time()
            with suppress(Refused, aiohttp.ClientError, TimeoutError):
                if now - heartbeats > _HEARTBEAT_SECONDS:
                    heartbeats = now
                    for node in self.nodes:
                        await self.say_ready(node, "Unknown" if node in self.down else "True")
                await self._look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def say_ready(self, node: str, status: str) -> None:
        """What the node, or in its place the controller manager, says of it."""
        condition = {"type": "Ready", "status": status, "reason": "Simulated", "lastHeartbeatTime": _now()}
        found = await self._api.get(f"api/v1/nodes/{node}")
        before = next((c for c in found["status"].get("conditions", []) if c["type"] == "Ready"), None)
        same = before is not None and before["status"] == status
        condition["lastTransitionTime"] = before["lastTransitionTime"] if before is not None and same else _now()
        capacity = {"cpu": "64", "memory": "256Gi", "pods": "110"}
        others = [each for each in found["status"].get("conditions", []) if each["type"] != "Ready"]
        status_now: Json = {"conditions": [*others, condition], "capacity": capacity, "allocatable": capacity}
        await self._api.patch(f"api/v1/nodes/{node}/status", {"status": status_now})

    async def _look(self) -> None:
        pods = await self._api.items(f"api/v1/namespaces/{self._namespace}/pods")
        for pod in pods:
            with suppress(Refused):  # It changed or went meanwhile; the next look sees that.
                await self._care(pod, pods)
        for uid in self._running.keys() - {pod["metadata"]["uid"] for pod in pods}:
            self._on_pod(self._running.pop(uid), False)

    async def _care(self, pod: Json, pods: list[Json]) -> None:
        node = pod["spec"].get("nodeName")
        path = f"api/v1/namespaces/{self._namespace}/pods/{pod['metadata']['name']}"
        if node in self.down:
            if pod["metadata"]["uid"] in self._running:
                self._on_pod(self._running.pop(pod["metadata"]["uid"]), False)
        elif "deletionTimestamp" in pod["metadata"]:
            await self._api.delete(path, grace_seconds=0)
        elif node is None:
            target = {"apiVersion": "v1", "kind": "Node", "name": await self._choose(pod, pods)}
            await self._api.create(f"{path}/binding", {"metadata": {"name": pod["metadata"]["name"]}, "target": target})
            pod["spec"]["nodeName"] = target["name"]
        elif pod["metadata"]["uid"] not in self._running:
            running = await self._api.patch(f"{path}/status", {"status": running_status(pod, next(self._addresses))})
            self._running[pod["metadata"]["uid"]] = running
            self._on_pod(running, True)

    async def _choose(self, pod: Json, pods: list[Json]) -> str:
        """A node that is up and not cordoned, one after the other; the copies of a stage get different ones."""
        labels = pod["metadata"]["labels"]
        stage = labels.get("resilientllm.dev/stage")
        first = int(labels["resilientllm.dev/instance"]) + 3 * int(stage or 2)
        copies = [each for each in pods if stage and each["metadata"]["labels"].get("resilientllm.dev/stage") == stage]
        nodes = await self._api.items("api/v1/nodes")
        cordoned = {each["metadata"]["name"] for each in nodes if each["spec"].get("unschedulable")}
        taken = {each["spec"].get("nodeName") for each in copies}
        able = set(self.nodes) - self.down - cordoned - taken - nodes_kept_off(pod["spec"])
        return next(node for node in self.nodes[first:] + self.nodes[:first] if node in able)


def running_status(pod: Json, address: str) -> Json:
    """The status of a pod all of whose containers are ready."""
    container = pod["spec"]["containers"][0]
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": _now()}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    running: dict[str, Any] = {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": True,
        "started": True,
        "restartCount": 0,
        "state": {"running": {"startedAt": _now()}},
    }
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": conditions,
        "containerStatuses": [running],
    }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
