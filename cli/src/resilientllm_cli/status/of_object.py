"""What the status of a ResilientLLM says of its topology. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from resilientllm_api.crd import (
    NOTHING_OBSERVED,
    PAUSED_ANNOTATION,
    Condition,
    ConditionStatus,
    ConditionType,
    InstancePhase,
    InstanceStatus,
    RecoveryMode,
    RecoveryStatus,
    ResilientLLM,
)
from resilientllm_api.reasons import Reason

from resilientllm_cli.status.topology import Instance, Place, Recovery, Topology

AS_IT_SHOULD_BE: dict[str, ConditionStatus] = {
    ConditionType.READY: ConditionStatus.TRUE,
    ConditionType.AVAILABLE: ConditionStatus.TRUE,
    ConditionType.DEGRADED: ConditionStatus.FALSE,
    ConditionType.PROGRESSING: ConditionStatus.FALSE,
    ConditionType.RECOVERING: ConditionStatus.FALSE,
    ConditionType.RECONCILING: ConditionStatus.FALSE,
    ConditionType.STALLED: ConditionStatus.FALSE,
    ConditionType.REPLICATION_HEALTHY: ConditionStatus.TRUE,
}
WITHOUT_CAVEAT = {Reason.ALL_INSTANCES_SERVING, Reason.AS_SPECIFIED, Reason.REPLICATING}


def topology(obj: ResilientLLM) -> Topology:
    status = obj.status
    if status is None or status.observed_generation in (None, NOTHING_OBSERVED):
        remark = "no status yet. If this stays, see whether the operator runs."
        return Topology(name_of(obj), healthy=False, summary="not seen yet", remarks=(remark,))
    return Topology(
        name=name_of(obj),
        healthy=_healthy(obj, status.conditions),
        summary=f"{status.ready or '?'} instances serve  {status.endpoint or ''}".rstrip(),
        remarks=tuple(remarks(obj)),
        instances=tuple(_instance(each) for each in status.instances),
        plan_version=status.plan.version if status.plan else None,
        recoveries=tuple(_recovery(each) for each in reversed(status.recoveries)),
    )


def _healthy(obj: ResilientLLM, conditions: tuple[Condition, ...]) -> bool:
    assert obj.status is not None
    said_true = {each.type for each in conditions if each.status is ConditionStatus.TRUE}
    return (
        obj.status.observed_generation == obj.metadata.get("generation")
        and ConditionType.READY in said_true
        # The others say what goes on, or what a loss would cost.
        and not said_true & {ConditionType.DEGRADED, ConditionType.STALLED}
    )


def _instance(status: InstanceStatus) -> Instance:
    return Instance(
        number=status.instance,
        phase=status.phase,
        whole=status.phase is InstancePhase.SERVING,
        engine=status.engine,
        node=status.node,
        plan_version=status.plan_version,
        places=tuple(
            Place(
                stage=f"{status.instance}.{each.stage}",
                ready=each.ready,
                served_by=each.served_by,
                pair=each.pair,
                kept_by=each.kept_by,
                lag_seconds=each.lag_seconds,
                process=each.pod,
                node=each.node,
            )
            for each in status.stages
        ),
    )


def _recovery(status: RecoveryStatus) -> Recovery:
    return Recovery(
        kind=status.kind,
        reason=status.reason,
        places=tuple(f"{status.instance}.{stage}" for stage in status.stages),
        donor=status.donor,
        detected_at=status.detected_at,
        took=status.took,
        phases_ms=status.phases,
        requests=status.requests_affected,
        tokens_recomputed=status.tokens_recomputed,
        tokens_kept=status.tokens_kept,
    )


def name_of(obj: ResilientLLM) -> str:
    return f"{obj.metadata['namespace']}/{obj.metadata['name']}"


def remarks(obj: ResilientLLM) -> Iterator[str]:
    """What is not as it should be, in the operator's words; the same words once."""
    assert obj.status is not None
    if obj.status.observed_generation != obj.metadata.get("generation"):
        yield "The operator has not seen the present spec yet."
    if (obstacle := why_nothing_moves(obj)) is not None:
        yield f"No stage that works is moved, because {obstacle}."
    told: set[str] = set()
    for each in obj.status.conditions:
        quiet = each.reason in WITHOUT_CAVEAT and each.status == AS_IT_SHOULD_BE.get(each.type)
        if not quiet and each.message not in told:
            told.add(each.message)
            yield f"{each.type}={each.status} ({each.reason}): {each.message}"
    for instance in obj.status.instances:
        for stage in instance.stages:
            name = f"Stage {instance.instance}.{stage.stage}"
            if stage.leaving is not None:
                follows = f"pod {stage.successor} follows" if stage.successor else "no pod can follow yet"
                yield f"{name} is to leave: {stage.leaving}; {follows}."
            if stage.warning is not None:
                yield f"{name}: {stage.warning}."
    for node in obj.status.nodes:
        yield f"Node {node.name} is avoided: {node.evidence}"
    yield from (f"Would do: {each}" for each in obj.status.would_do)


def why_nothing_moves(obj: ResilientLLM) -> str | None:
    if obj.metadata.get("annotations", {}).get(PAUSED_ANNOTATION) == "true":
        return f"the annotation {PAUSED_ANNOTATION} pauses it"
    if obj.spec.recovery.mode is RecoveryMode.OBSERVE:
        return f"spec.recovery.mode is {RecoveryMode.OBSERVE}"
    if obj.status is not None and obj.status.breaker is not None and obj.status.breaker.tripped:
        return "too many stages failed at once (status.breaker)"
    return None
