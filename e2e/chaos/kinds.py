"""Kinds of faults of a cluster. Each notes, with its evidence, when it landed; the ground mends what stays."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from resilientllm_api.engine_state import RecoveryKind

from e2e.cluster import faults
from e2e.cluster.commands import wait_until
from e2e.cluster.supervisor import ready_folder
from e2e.demo.observation import Pod
from e2e.scenarios import fault
from e2e.scenarios.fault import Fault
from e2e.scenarios.ground import LOOK_SECONDS, Ground
from e2e.scenarios.scenario import Scenario

LANDS_SECONDS = 10.0
SHORT_CUT_SECONDS, LONG_CUT_SECONDS = 6.0, 15.0
AWAY_SECONDS = 20.0
"""How long a part of Kubernetes is away."""
LATE_SECONDS = 30.0
"""By how much later than that a busy control plane may notice that a kubelet is dead."""


@dataclass(frozen=True)
class ClusterKind:
    name: str
    inject: Callable[[Scenario, Pod, Random], None]
    """The pod: a stage that is alone on its node. Calls `Scenario.did`."""
    change: RecoveryKind | None = RecoveryKind.BORROW
    """How the stage's place changes hands for it; None: not at all."""
    strikes: int = 0
    """Which of its faults ends the stage, or cuts it off: detection counts from there."""


def delete_pod(scenario: Scenario, pod: Pod, random: Random) -> None:
    scenario.did(fault.delete_pod(scenario.ground, pod))


def kill_node(scenario: Scenario, pod: Pod, random: Random) -> None:
    scenario.did(fault.kill_node(scenario.ground, pod))


def cut_node(scenario: Scenario, pod: Pod, random: Random) -> None:
    scenario.did(fault.partition_node(scenario.ground, pod))
    time.sleep(random.uniform(SHORT_CUT_SECONDS, LONG_CUT_SECONDS))
    scenario.did(fault.heal_node(scenario.ground, pod))


def stop_kubelet(scenario: Scenario, pod: Pod, random: Random) -> None:
    ground, node = scenario.ground, fault.node_of(pod)
    pids = fault.pids_of(ground, pod)
    scenario.did(_stopped(ground, node, pids))
    noticed = time.monotonic() + AWAY_SECONDS
    while scenario.look().nodes[node].ready == "True":
        assert time.monotonic() < noticed + LATE_SECONDS, f"nobody has noticed that the kubelet of {node} is dead"
        time.sleep(LOOK_SECONDS)
    time.sleep(max(0.0, noticed - time.monotonic()))
    fault.alive(pids)
    ground.cluster.start_service(node, "kubelet")


def _stopped(ground: Ground, node: str, pids: list[int]) -> Fault:
    clock = fault.Clock()
    ground.cluster.stop_service(node, "kubelet")
    ready = ready_folder(faults.folder_of(ground.cluster.layout, node)) / "kubelet"
    wait_until(lambda: not ready.exists(), f"the kubelet of {node} to end", timeout_seconds=LANDS_SECONDS)
    fault.alive(pids)
    return clock.fault(f"kubelet of {node} stopped", f"it is not ready, and the stage's processes {pids} live")


def kill_operator(scenario: Scenario, pod: Pod, random: Random) -> None:
    """And a stage while there is none: serving goes on, and what it does not see it makes up for later."""
    scenario.did(fault.kill_operators(scenario.ground))
    scenario.did(fault.kill_stage(scenario.ground, pod))


def stop_api_server(scenario: Scenario, pod: Pod, random: Random) -> None:
    """And a stage while it is away."""
    pids = fault.pids_of(scenario.ground, pod)
    scenario.did(fault.stop_api_server(scenario.ground))
    scenario.did(fault.kill_processes(pod, pids))
    time.sleep(AWAY_SECONDS)
    scenario.did(fault.start_api_server(scenario.ground))


KINDS = {
    kind.name: kind
    for kind in (
        ClusterKind("pod-deleted", delete_pod, RecoveryKind.MOVE),
        ClusterKind("node-killed", kill_node),
        ClusterKind("cluster-node-cut", cut_node),
        ClusterKind("kubelet-dead", stop_kubelet, None),
        ClusterKind("operator-dead", kill_operator, strikes=1),
        ClusterKind("api-server-dead", stop_api_server, strikes=1),
    )
}
