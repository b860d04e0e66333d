"""The conditions of a ResilientLLM. Pure.

``Ready`` and ``Available`` say what a client gets, ``Degraded`` what was lost of it, ``Progressing`` whether waiting
helps, and ``ReplicationHealthy`` (:mod:`replication`) what the next loss would cost. None of them is inferred from
another: each is computed from the instances and the troubles. ``Reconciling`` and ``Stalled`` are for tools that know
nothing of us, by the rules of kstatus (sigs.k8s.io/cli-utils/pkg/kstatus): abnormal when true, and never both.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from resilientllm_api.crd import (
    Condition,
    ConditionStatus,
    ConditionType,
    DrainStatus,
    InstancePhase,
    InstanceStatus,
    ResilientLLMStatus,
)
from resilientllm_api.reasons import Reason

from resilientllm_operator.draining import is_to_go
from resilientllm_operator.names import slots
from resilientllm_operator.recovering import recovering
from resilientllm_operator.replication import replication_healthy
from resilientllm_operator.trouble import Trouble
from resilientllm_operator.verdict import Verdict
from resilientllm_operator.world import World

_STATUSES = {True: ConditionStatus.TRUE, False: ConditionStatus.FALSE, None: ConditionStatus.UNKNOWN}
_ATTACHING = {InstancePhase.STARTING, InstancePhase.VERIFYING}


def conditions(
    world: World,
    instances: Sequence[InstanceStatus],
    troubles: Sequence[Trouble],
    now: datetime,
    drain: DrainStatus | None = None,
    change: Verdict | None = None,
    would_do: Sequence[str] = (),
) -> tuple[Condition, ...]:
    """``change``: as :func:`changing.change` has it. ``would_do``: what is not done in mode Observe."""
    stopped = change is not None and change.status is False
    yielding = drain.instance if drain is not None and not stopped else None
    progressing = _observed(would_do) or _progressing(world, instances, troubles, change)
    stalled = _stalled(troubles, change, would_do)
    verdicts = (
        _ready(world, instances, troubles, yielding, change),
        _available(instances, troubles),
        _degraded(instances, troubles, yielding),
        progressing,
        replication_healthy(world, instances),
        recovering([each for each in instances if each.instance != yielding]),
        _reconciling(world, progressing, stalled),
        stalled,
    )
    return tuple(_dated(verdict, world.object.status, world.object.generation, now) for verdict in verdicts)


def _ready(
    world: World,
    instances: Sequence[InstanceStatus],
    troubles: Sequence[Trouble],
    yielding: int | None,
    change: Verdict | None,
) -> Verdict:
    if all(instance.serving for instance in instances):
        served = f"{_count(len(instances), 'instance')} of {_count(world.object.spec.stages, 'stage')} each"
        hint = (
            ""
            if len(instances) > 1
            else " With one instance nobody can stand in for a lost stage: set spec.instances to 2 or more."
        )
        return Verdict(ConditionType.READY, True, Reason.ALL_INSTANCES_SERVING, f"Serves with {served}.{hint}")
    if troubles:
        return Verdict(ConditionType.READY, False, troubles[0].reason, _with_others(troubles))
    if change is not None and all(each.serving or each.instance == yielding for each in instances):
        return Verdict(ConditionType.READY, False, change.reason, change.message)
    waiting = _waiting(world, instances)
    return Verdict(ConditionType.READY, False, waiting.reason, waiting.message)


def _available(instances: Sequence[InstanceStatus], troubles: Sequence[Trouble]) -> Verdict:
    serving = sum(instance.serving for instance in instances)
    if serving == len(instances):
        return Verdict(ConditionType.AVAILABLE, True, Reason.ALL_INSTANCES_SERVING, "Requests go to all instances.")
    if serving:
        message = f"Requests go to {serving} of {_count(len(instances), 'instance')}."
        return Verdict(ConditionType.AVAILABLE, True, Reason.SOME_INSTANCES_SERVING, message)
    message = f"No instance serves. {troubles[0].message}" if troubles else "No instance serves."
    return Verdict(ConditionType.AVAILABLE, False, Reason.NO_INSTANCE_SERVING, message)


def _degraded(instances: Sequence[InstanceStatus], troubles: Sequence[Trouble], yielding: int | None) -> Verdict:
    """Only what served before can be lost, and what gives way for a change is not: it comes back, or is not wanted."""
    lost = [each for each in instances if each.first_served_at and not each.serving and each.instance != yielding]
    borrowed = [
        f"{stage.served_by} stands in for stage {each.instance}.{stage.stage}"
        for each in instances
        for stage in each.stages
        if each.serving
        and each.instance != yielding
        and stage.served_by is not None
        and stage.served_by != f"{each.instance}.{stage.stage}"
    ]
    if not lost and not borrowed:
        return Verdict(ConditionType.DEGRADED, False, Reason.AS_SPECIFIED, "Nothing that served is lost.")
    facts = [_loss(each) for each in lost] + borrowed
    help_needed = f" {troubles[0].message}" if troubles else ""
    return Verdict(ConditionType.DEGRADED, True, _loss_reason(lost), f"{'; '.join(facts)}.{help_needed}")


def _progressing(
    world: World, instances: Sequence[InstanceStatus], troubles: Sequence[Trouble], change: Verdict | None
) -> Verdict:
    if change is not None and change.status is False:
        return change
    if troubles:
        return Verdict(ConditionType.PROGRESSING, False, troubles[0].reason, _with_others(troubles))
    missing = [slot for slot in slots(len(instances), world.object.spec.stages) if not _runs(world, slot)]
    at_home = all(each.phase is InstancePhase.SERVING and each.serving for each in instances)
    if change is not None:
        return change
    moving = [f"{each.instance}.{stage.stage}" for each in instances for stage in each.stages if stage.successor]
    if moving and not missing:
        message = f"Stage {', '.join(moving)} is to go: waits until its next pod can take over."
        return Verdict(ConditionType.PROGRESSING, True, Reason.MOVING, message)
    if at_home and not missing:
        return Verdict(ConditionType.PROGRESSING, False, Reason.AS_SPECIFIED, "All pods run as the spec says.")
    if all(each.first_served_at for each in instances):
        message = (
            f"Waits for {_listed(missing)}." if missing else "Waits until every instance serves on its own stages."
        )
        return Verdict(ConditionType.PROGRESSING, True, Reason.RESTORING_CAPACITY, message)
    waiting = _waiting(world, instances)
    return Verdict(ConditionType.PROGRESSING, True, waiting.reason, waiting.message)


def _observed(would_do: Sequence[str]) -> Verdict | None:
    if not would_do:
        return None
    message = f"spec.recovery.mode is Observe. In mode Act the operator would: {_listed(would_do)}."
    return Verdict(ConditionType.PROGRESSING, False, Reason.OBSERVE_ONLY, message)


def _reconciling(world: World, progressing: Verdict, stalled: Verdict) -> Verdict:
    """``Ready`` alone would call a roll-out complete before its first instance gives way, or while it is paused."""
    held = progressing.reason is Reason.PAUSED and any(not pod.leaving and is_to_go(world, pod) for pod in world.pods)
    under_way = not stalled.status and (progressing.status is True or held)
    return Verdict(ConditionType.RECONCILING, under_way, progressing.reason, progressing.message)


def _stalled(troubles: Sequence[Trouble], change: Verdict | None, would_do: Sequence[str]) -> Verdict:
    """Abnormal when true, as kstatus has it: for those who only want to know whether to wait."""
    if troubles:
        return Verdict(ConditionType.STALLED, True, troubles[0].reason, _with_others(troubles))
    if (observed := _observed(would_do)) is not None:
        return Verdict(ConditionType.STALLED, True, observed.reason, observed.message)
    if change is not None and change.reason is Reason.ROLL_OUT_STOPPED:
        return Verdict(ConditionType.STALLED, True, change.reason, change.message)
    return Verdict(ConditionType.STALLED, False, Reason.AS_SPECIFIED, "Nothing waits for a person.")


def _waiting(world: World, instances: Sequence[InstanceStatus]) -> Trouble:
    """What is being waited for, when nothing is the matter that a person should mend."""
    lost = [each for each in instances if each.first_served_at and not each.serving]
    if lost:
        return Trouble(_loss_reason(lost), f"{'; '.join(map(_loss, lost))}. It is being brought back.")
    idle = [each for each in instances if not each.serving]
    starting = [slot for slot in slots(len(instances), world.object.spec.stages) if not _runs(world, slot)]
    if all(each.phase is InstancePhase.VERIFYING for each in idle):
        numbers = ", ".join(str(each.instance) for each in idle)
        return Trouble(Reason.VERIFYING, f"Waits for the first token of instance {numbers}.")
    if all(each.phase in _ATTACHING for each in idle):
        words = "; ".join(each.message for each in idle if each.message)
        return Trouble(Reason.STAGES_LOADING, f"Stages load their weights and engines attach to them. {words}".rstrip())
    return Trouble(Reason.PODS_STARTING, f"Waits for {_listed(starting)}." if starting else "Waits for the engines.")


def _loss_reason(lost: Sequence[InstanceStatus]) -> Reason:
    if not lost:
        return Reason.STAGE_BORROWED
    return Reason.STAGE_LOST if any(each.phase is InstancePhase.WAITING for each in lost) else Reason.ENGINE_LOST


def _loss(instance: InstanceStatus) -> str:
    match instance.phase:
        case InstancePhase.WAITING:
            without = [f"{instance.instance}.{stage.stage}" for stage in instance.stages if stage.served_by is None]
            return f"instance {instance.instance} waits for stage {', '.join(without) or 'unknown'}: no donor is left"
        case InstancePhase.UNREACHABLE:
            return f"the engine of instance {instance.instance} ({instance.engine or 'no pod'}) does not answer"
        case _:
            return f"instance {instance.instance} does not serve (phase {instance.phase})"


def _dated(verdict: Verdict, before: ResilientLLMStatus, generation: int, now: datetime) -> Condition:
    status = _STATUSES[verdict.status]
    old = next((each for each in before.conditions if each.type == verdict.type), None)
    return Condition(
        type=verdict.type,
        status=status,
        observed_generation=generation,
        last_transition_time=old.last_transition_time if old and old.status == status else now,
        reason=verdict.reason,
        message=verdict.message,
    )


def _runs(world: World, slot: object) -> bool:
    return any(pod.slot == slot and not pod.leaving and pod.ready for pod in world.pods)


def _with_others(troubles: Sequence[Trouble]) -> str:
    others = len({trouble.message for trouble in troubles}) - 1
    return troubles[0].message + (f" (and {_count(others, 'other trouble')})" if others else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(things: Sequence[object], most: int = 6) -> str:
    shown = ", ".join(str(thing) for thing in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most} more"


def unreadable(before: ResilientLLMStatus, generation: int, error: str, now: datetime) -> ResilientLLMStatus:
    """The status of an object whose spec the cluster's schema admits and this operator cannot read."""
    message = f"This operator cannot read the spec; it may be older than the CRD. What runs is left alone. {error}"
    found = [
        Verdict(ConditionType.READY, False, Reason.SPEC_UNREADABLE, message),
        Verdict(ConditionType.RECONCILING, False, Reason.SPEC_UNREADABLE, message),
        Verdict(ConditionType.STALLED, True, Reason.SPEC_UNREADABLE, message),
    ]
    told = tuple(_dated(verdict, before, generation, now) for verdict in found)
    others = [each for each in before.conditions if each.type not in {verdict.type for verdict in found}]
    return before.model_copy(update={"observed_generation": generation, "conditions": (*told, *others)})
