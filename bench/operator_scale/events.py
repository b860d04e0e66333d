"""What happens to the cluster, and how long it takes until what the operator wrote is seen."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from bench.operator_scale.cluster import (
    DECISION_TIMEOUT_SECONDS,
    NAMESPACE,
    Cluster,
    away,
    gather,
    healthy_node,
    nodes_of,
    owner,
    owners,
    place_of,
    slot_of,
    stage_status,
    stages_of,
)
from e2e.simulation.api import Json

NODE_CONDITION = "GpuMemWatch"
"""NVSentinel's; every stage there is moved."""
MANY_NODES = 3
"""Of one object that fail within a minute: its breaker trips."""
REST_SECONDS = 5.0


async def decided(cluster: Cluster, name: str, start: float, place: tuple[int, int], key: str, value: object) -> float:
    """Milliseconds until the object's status has this value for a stage."""
    await cluster.until(
        lambda: stage_status(cluster.objects[name].get("status", {}), *place).get(key) == value,
        DECISION_TIMEOUT_SECONDS,
    )
    return (time.monotonic() - start) * 1000


async def pod_changes(cluster: Cluster, samples: int, chosen: random.Random) -> list[float]:
    """A stage's pod is not ready any more, and the status says so; then it is again."""
    found = []
    for _ in range(samples):
        name = chosen.choice(sorted(cluster.objects))
        pod = chosen.choice(stages_of(cluster, name))
        place = place_of(pod)
        path = f"api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}/status"
        for ready in (False, True):
            conditions = [
                each | ({"status": str(ready)} if each["type"] in ("Ready", "ContainersReady") else {})
                for each in pod["status"]["conditions"]
            ]
            await cluster.api.patch(path, {"status": {"conditions": conditions}})
            start = time.monotonic()
            found.append(await decided(cluster, name, start, place, "ready", ready))
        await asyncio.sleep(0.1)
    return found


async def engine_changes(cluster: Cluster, engines: Any, samples: int, chosen: random.Random) -> list[float]:
    """An engine loses a stage and says that a donor stands in; then the stage is back."""
    found = []
    for _ in range(samples):
        name = chosen.choice(sorted(cluster.objects))
        pod = stages_of(cluster, name)[0]
        for lost in ([pod["status"]["podIP"]], []):
            engines.stdin.write(json.dumps(lost).encode() + b"\n")
            engines.stdin.flush()
            start = float(engines.stdout.readline())
            found.append(await decided(cluster, name, start, (0, 0), "servedBy", "1.0" if lost else "0.0"))
        await asyncio.sleep(0.1)
    return found


async def node_conditions(cluster: Cluster, nodes: list[str], storms: int) -> tuple[list[dict[str, Any]], set[str]]:
    """A node's condition says that its stages are to move: from the condition to each one's status, and its new pod.

    No object meets two of them: three nodes within a minute are a matter for its breaker. Also says which ones met one.
    """
    found, met = [], set[str]()
    for _ in range(storms):
        node = next(node for node in nodes if (new := owners(cluster.stages_on([node]))) and new.isdisjoint(met))
        pods = cluster.stages_on([node])
        met |= owners(pods)
        begun = time.monotonic()
        start = await sicken(cluster, [node])
        leaving, made = await asyncio.gather(
            cluster.moments({pod["metadata"]["name"]: partial(is_to_leave, cluster, pod) for pod in pods}),
            cluster.moments({pod["metadata"]["name"]: partial(successor, cluster, pod, begun) for pod in pods}),
        )
        found.append(
            {
                "objects": len(owners(pods)),
                "stages": len(pods),
                "to_status_ms": [(at - start) * 1000 for at in leaving],
                "to_new_pod_ms": [(at - start) * 1000 for at in made],
            }
        )
        await asyncio.sleep(REST_SECONDS)
    return found, met


async def correlated(cluster: Cluster, met: set[str]) -> tuple[list[float], dict[str, int]]:
    """Three nodes get the condition at once: from that to the breaker of each object that has stages on all three.

    And what became of these objects. ``met``: those that have had a storm already.
    """
    fresh = next((name for name in sorted(cluster.objects) if name not in met), None)
    assert fresh is not None, f"all of the {len(met)} objects have met a storm: ask for fewer, or for more objects"
    three = list(dict.fromkeys(pod["spec"]["nodeName"] for pod in stages_of(cluster, fresh)))[:MANY_NODES]
    hit = [name for name in owners(cluster.stages_on(three)) - met if nodes_of(cluster, name) >= set(three)]
    before = {name: {pod["metadata"]["uid"] for pod in stages_of(cluster, name)} for name in hit}
    start = await sicken(cluster, three)
    tripped = await cluster.moments({name: partial(breaker_tripped, cluster, name) for name in hit})
    await asyncio.sleep(REST_SECONDS)
    after = {name: {pod["metadata"]["uid"] for pod in stages_of(cluster, name)} for name in hit}
    return [(at - start) * 1000 for at in tripped], {
        "stages_on_the_nodes": len([pod for pod in cluster.stages_on(three) if owner(pod) in hit]),
        "pods_made": sum(len(after[name] - before[name]) for name in hit),
        "pods_deleted": sum(len(before[name] - after[name]) for name in hit),
        "places_served_by_another": sum(away(cluster.objects[name]["status"]) for name in hit),
    }


async def sicken(cluster: Cluster, nodes: Iterable[str]) -> float:
    """Gives nodes the condition, at once; returns when the API server has taken the last."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sick = {"type": NODE_CONDITION, "status": "True", "reason": "Bench", "message": "[79] simulated"}
    sick |= {"lastTransitionTime": now, "lastHeartbeatTime": now}
    conditions = [*healthy_node("")["status"]["conditions"], sick]
    await gather(
        cluster.api.patch(f"api/v1/nodes/{node}/status", {"status": {"conditions": conditions}}) for node in nodes
    )
    return time.monotonic()


def breaker_tripped(cluster: Cluster, name: str) -> float | None:
    return time.monotonic() if cluster.objects[name]["status"].get("breaker", {}).get("tripped") else None


def is_to_leave(cluster: Cluster, pod: Json) -> float | None:
    status = cluster.objects[owner(pod)]["status"]
    return time.monotonic() if stage_status(status, *place_of(pod)).get("leaving") else None


def successor(cluster: Cluster, pod: Json, begun: float) -> float | None:
    """When the next pod of the same slot was seen."""
    return next((at for at in cluster.made[slot_of(pod["metadata"]["name"])].values() if at > begun), None)
