"""What the operator makes of trouble, before it does anything about it. Pure.

Everything in it that must outlive the operator is in the status: failures, avoided nodes, the breaker, and who fills a
slot.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from resilientllm_api.crd import (
    BreakerStatus,
    ExitStatus,
    FailureStatus,
    InstanceStatus,
    NodeAction,
    NodeStatus,
    StageStatus,
)

from resilientllm_operator.breaker import Restraint, breaker_of, restraint_of
from resilientllm_operator.failures import avoided_nodes, by_node, failure_record
from resilientllm_operator.names import Role, Slot
from resilientllm_operator.signals import Signals, signals_of, unfit_nodes
from resilientllm_operator.succession import is_to_go, seats_of, successor_of
from resilientllm_operator.world import PodView, World

LAST_WORDS_LINES = 8
LAST_WORDS_MOST = 1000


@dataclass(frozen=True)
class Assessment:
    failures: tuple[FailureStatus, ...]
    nodes: tuple[NodeStatus, ...]
    """Those that are avoided."""
    breaker: BreakerStatus | None
    restraint: Restraint | None
    signals: Signals

    def unfit_nodes(self, world: World) -> frozenset[str]:
        """Nodes that no new stage is placed on. Looks at every node of the cluster: only for those who make a pod."""
        return unfit_nodes(world, by_node(self.nodes))


def assess(world: World, now: datetime) -> tuple[Assessment, World]:
    """The assessment, and the world with the pods in their seats."""
    failures = failure_record(world, now)
    nodes = avoided_nodes(world, failures, now)
    breaker = breaker_of(world, failures, now)
    restraint = restraint_of(world, breaker)
    signals = signals_of(world, by_node(nodes), now)
    seats = seats_of(world, signals, restraint is not None, now)
    return Assessment(failures, nodes, breaker, restraint, signals), replace(world, seats=seats)


def with_findings(
    world: World, instances: tuple[InstanceStatus, ...], assessment: Assessment
) -> tuple[InstanceStatus, ...]:
    """The instances, each stage with what is found about its pod."""
    return tuple(
        each.model_copy(
            update={"stages": tuple(_stage(world, each.instance, stage, assessment) for stage in each.stages)}
        )
        for each in instances
    )


def _stage(world: World, instance: int, stage: StageStatus, assessment: Assessment) -> StageStatus:
    pod = world.current(Slot(instance, Role.STAGE, stage.stage))
    if pod is None:
        return stage
    signal = assessment.signals.get(pod.uid)
    goes = is_to_go(pod, assessment.signals)
    following = successor_of(world, pod, assessment.signals) if goes or pod.leaving else None
    return stage.model_copy(
        update={
            "leaving": signal.reason if signal is not None and goes else None,
            "warning": signal.reason if signal is not None and signal.action is NodeAction.WARN else None,
            "successor": following.name if following is not None else None,
            "restarts": pod.restarts,
            "last_exit": _last_exit(pod),
        }
    )


def _last_exit(pod: PodView) -> ExitStatus | None:
    if pod.last_exit is None:
        return None
    lines = [line.rstrip() for line in pod.last_exit.message.splitlines() if line.strip()]
    words = "\n".join(lines[-LAST_WORDS_LINES:])[-LAST_WORDS_MOST:]
    return ExitStatus(code=pod.last_exit.code, message=words, at=pod.last_exit.at)
