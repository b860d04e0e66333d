"""What scenarios do to the cluster. Each returns only when its fault is shown to have landed, with the evidence."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resilientllm_api.ports import STAGE_PORT

from e2e.cluster import faults, network
from e2e.cluster.commands import run, wait_until
from e2e.cluster.errors import CommandFailed
from e2e.demo import installation
from e2e.demo.observation import Pod
from e2e.scenarios.ground import API_SERVER, NAME, NAMESPACE, Ground

DRAIN_SECONDS = 90

_LANDS_SECONDS = 10.0
_REACH_SECONDS = 2
_KUBELET_PORT = 10250


@dataclass(frozen=True)
class Fault:
    what: str
    at: datetime
    """Just before it was done."""
    at_seconds: float
    """The same, of ``time.monotonic``."""
    evidence: str
    """What was seen that shows that it landed."""


class Clock:
    """Reads both clocks at once."""

    def __init__(self) -> None:
        self.at, self.at_seconds = datetime.now(UTC), time.monotonic()

    def fault(self, what: str, evidence: str) -> Fault:
        return Fault(what, self.at, self.at_seconds, evidence)


def kill_node(ground: Ground, pod: Pod, pids: list[int] | None = None) -> Fault:
    """Cuts the power of the node that a stage runs on.

    ``pids``: those of :func:`pids_of`, where nobody can be asked for them at this moment.
    """
    node = node_of(pod)
    pids = pids or pids_of(ground, pod)
    clock = Clock()
    ground.cluster.kill_node(node)
    assert not faults.is_alive(ground.cluster.layout, node), f"{node} survived"
    _ended(pids)
    return clock.fault(f"power of {node} cut", f"it had {pod.place}, whose processes {pids} are gone, as is its init")


def partition_node(ground: Ground, pod: Pod) -> Fault:
    """Cuts the network of the node that a stage runs on; the stage goes on."""
    node, pids = node_of(pod), pids_of(ground, pod)
    assert can_reach(ground, pod), f"{pod.place} must be reachable, or its loss would prove nothing"
    clock = Clock()
    ground.cluster.partition_node(node)
    assert not can_reach(ground, pod), f"{pod.place} is still reached at {pod.ip}"
    alive(pids)
    return clock.fault(f"network of {node} cut", f"no connection to {pod.place} at {pod.ip}; its processes {pids} live")


def heal_node(ground: Ground, pod: Pod) -> Fault:
    """Joins the network of a node again.

    Its kubelet is the evidence, not the stage: one that was replaced meanwhile is ended as soon as the kubelet hears
    of that, which may be before anybody could look.
    """
    node = node_of(pod)
    kubelet = str(ground.cluster.layout.node(node).address)
    clock = Clock()
    ground.cluster.heal_node(node)
    wait_until(
        lambda: _takes(ground, kubelet, _KUBELET_PORT),
        f"the kubelet of {node} to be reached again",
        timeout_seconds=_LANDS_SECONDS,
    )
    return clock.fault(f"network of {node} joined", f"its kubelet is reached at {kubelet}")


def delete_pod(ground: Ground, pod: Pod) -> Fault:
    """As a person with kubectl does it: asked to end, with the grace that it has."""
    clock = Clock()
    ground.cluster.kubectl("delete", "pod", pod.name, f"--namespace={NAMESPACE}", "--wait=false")
    look = ground.look()
    assert pod.uid not in {each.uid for each in look.pods}, f"{pod.name} is not on its way out"
    return clock.fault(f"pod {pod.name} deleted", f"{pod.place}, uid {pod.uid}, is Terminating or gone")


def drain_node(ground: Ground, pod: Pod) -> Fault:
    """As an administrator does it: cordon, then evictions; returns when the node is empty of what was to go."""
    node = node_of(pod)
    clock = Clock()
    said = ground.cluster.kubectl(
        *("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={DRAIN_SECONDS}s"),
        timeout_seconds=DRAIN_SECONDS + 10,
    )
    assert f"{pod.name} evicted" in said, f"kubectl drain evicted nothing of ours: {said}"
    assert not ground.look().nodes[node].schedulable, f"{node} is not cordoned"
    return clock.fault(f"{node} drained", f"kubectl drain: {said.strip().splitlines()[-1]}; pod/{pod.name} evicted")


def set_node_condition(ground: Ground, pod: Pod, kind: str, message: str) -> Fault:
    """As NVSentinel reports a fatal fault: a condition of the node becomes True."""
    node, clock = node_of(pod), Clock()
    moment = f"{clock.at:%Y-%m-%dT%H:%M:%SZ}"
    condition = {"type": kind, "status": "True", "reason": f"{kind}IsNotHealthy", "message": message}
    times = {"lastHeartbeatTime": moment, "lastTransitionTime": moment}
    ground.patch_node_status(node, {"conditions": [condition | times]})
    said = ground.cluster.kubectl(
        "get", "node", node, f"--output=jsonpath={{.status.conditions[?(@.type=='{kind}')].status}}"
    )
    assert said == "True", f"{node} says {kind}={said or 'nothing'}"
    return clock.fault(f"condition {kind} of {node}", f"the node says {kind}={said}")


def break_device(ground: Ground, pod: Pod) -> Fault:
    """The device plugin calls the GPU of a stage unhealthy; the kubelet writes it into the pod's status."""
    ((device, health),) = devices_of(ground, pod)
    assert health == "Healthy", f"{device} of {pod.name} is {health} already"
    clock = Clock()
    ground.cluster.set_gpu_health(node_of(pod), device, healthy=False)
    wait_until(
        lambda: devices_of(ground, pod) in ([(device, "Unhealthy")], []),
        f"{device} to be Unhealthy in the status of {pod.name}",
        timeout_seconds=_LANDS_SECONDS,
    )
    return clock.fault(f"{device} of {pod.node} broken", f"allocatedResourcesStatus of {pod.name}: {device} Unhealthy")


def devices_of(ground: Ground, pod: Pod) -> list[tuple[str, str]]:
    """Devices of a pod, and their health, as its status has it; nothing of a pod that is gone."""
    said = ground.cluster.kubectl(
        "get", "pod", pod.name, f"--namespace={NAMESPACE}", "--output=json", "--ignore-not-found"
    )
    containers = json.loads(said)["status"].get("containerStatuses", []) if said else []
    return [
        (resource["resourceID"], resource["health"])
        for container in containers
        for allocated in container.get("allocatedResourcesStatus", [])
        for resource in allocated["resources"]
    ]


def change_spec(ground: Ground, what: str, change: Callable[[dict[str, Any]], None]) -> Fault:
    """As a user does it: the object is applied with another spec. It stays so."""
    change(ground.obj["spec"])
    before = generation_of(ground)
    clock = Clock()
    installation.apply(ground.cluster, [ground.obj])
    after = generation_of(ground)
    assert after > before, f"the spec is what it was: generation {after}"
    return clock.fault(what, f"generation {before} became {after}")


def generation_of(ground: Ground) -> int:
    said = ground.cluster.kubectl("get", "rllm", NAME, f"--namespace={NAMESPACE}", "--output=json")
    return int(json.loads(said)["metadata"]["generation"])


def kill_stage(ground: Ground, pod: Pod) -> Fault:
    return kill_processes(pod, pids_of(ground, pod))


def kill_processes(pod: Pod, pids: list[int]) -> Fault:
    """kill -9 of a stage; ``pids`` are its own, which nobody can be asked for while the API server is away."""
    clock = Clock()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    _ended(pids)
    return clock.fault(f"{pod.place} killed", f"processes {pids} are gone")


def kill_operators(ground: Ground) -> Fault:
    """Every operator's process at once, so that nobody decides anything until a kubelet has started one again."""
    operators = ground.operators()
    clock = Clock()
    for pid in operators.values():
        os.kill(pid, signal.SIGKILL)
    _ended(operators.values())
    return clock.fault("operator killed", f"processes {operators} are gone")


def stop_api_server(ground: Ground) -> Fault:
    clock = Clock()
    ground.cluster.stop_service(*API_SERVER)
    try:
        ground.cluster.kubectl("get", "nodes", "--request-timeout=2s")
    except CommandFailed as error:
        return clock.fault("API server stopped", f"kubectl: {error.found[-200:]}")
    raise AssertionError("the API server still answers")


def start_api_server(ground: Ground) -> Fault:
    clock = Clock()
    ground.cluster.start_service(*API_SERVER)
    ground.cluster.kubectl("get", "nodes", "--request-timeout=10s")
    return clock.fault("API server started", "it answers")


def node_of(pod: Pod) -> str:
    assert pod.node is not None, f"{pod.place} is on no node"
    return pod.node


def pids_of(ground: Ground, pod: Pod) -> list[int]:
    return ground.cluster.container_pids(NAMESPACE, pod.name, pod.container)


def can_reach(ground: Ground, pod: Pod) -> bool:
    """Whether a connection to a stage is taken, from where the clients are."""
    return pod.ip is not None and _takes(ground, pod.ip, STAGE_PORT)


def _takes(ground: Ground, host: str, port: int) -> bool:
    netns = network.netns_file(ground.cluster.layout.fabric)
    dial = f"exec 3<>/dev/tcp/{host}/{port}"
    try:
        run("nsenter", f"--net={netns}", "timeout", str(_REACH_SECONDS), "bash", "-c", dial)
    except CommandFailed:
        return False
    return True


def _ended(pids: Iterable[int]) -> None:
    wait_until(
        lambda: not any(_lives(pid) for pid in pids), f"processes {list(pids)} to end", timeout_seconds=_LANDS_SECONDS
    )


def alive(pids: Iterable[int]) -> None:
    dead = [pid for pid in pids if not _lives(pid)]
    assert not dead, f"processes {dead} have ended"


def _lives(pid: int) -> bool:
    """A zombie, which only waits for its parent to look, has ended."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
