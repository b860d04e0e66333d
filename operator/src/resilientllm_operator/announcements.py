"""Events: what changed between two statuses. Pure, and therefore one event a transition, whatever restarts.

What an engine tells is named by itself: an operator that begins writes a status before it has heard of any engine, and
so decides the same transition from another status than the one before it.
"""

from __future__ import annotations

from collections.abc import Iterator

from resilientllm_api.crd import (
    Condition,
    ConditionStatus,
    ConditionType,
    InstancePhase,
    InstanceStatus,
    ResilientLLMStatus,
)
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.reasons import EventReason, Reason

from resilientllm_operator.actions import Announce

NEEDS_A_PERSON = {
    Reason.CONFIGURATION_REJECTED,
    Reason.IMAGE_PULL_FAILED,
    Reason.UNSCHEDULABLE,
    Reason.CONTAINER_CANNOT_START,
    Reason.CONTAINER_CRASHING,
    Reason.ENGINE_FAILED,
    Reason.VERIFICATION_FAILED,
    Reason.POD_REFUSED,
    Reason.NAME_TAKEN,
    Reason.SPEC_UNREADABLE,
    Reason.ROLL_OUT_STOPPED,
}
_UP = {InstancePhase.SERVING, InstancePhase.DEGRADED, InstancePhase.RECOVERING}


def announcements(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    yield from _recoveries(before, after)
    old = {each.instance: each for each in before.instances}
    for instance in after.instances:
        yield from _instance(old.get(instance.instance), instance)
    yield from _troubles(before, after)
    yield from _replication(before, after)
    yield from _stages(before, after)
    yield from _nodes(before, after)
    yield from (
        Announce(EventReason.WOULD_ACT, f"Would {each}.") for each in after.would_do if each not in before.would_do
    )


def _recoveries(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    told = {(each.instance, each.id) for each in before.recoveries if each.resumed_at}
    for each in after.recoveries:
        if each.resumed_at is None or (each.instance, each.id) in told:
            continue
        about = f"{each.instance}/{each.id}"
        places = ", ".join(f"{each.instance}.{stage}" for stage in each.stages)
        if each.kind is RecoveryKind.SWAP_BACK:
            note = f"Instance {each.instance} runs on its own stage {places} again."
            yield Announce(EventReason.SWAPPED_BACK, note, about=about)
            continue
        if each.kind is RecoveryKind.MOVE:
            note = f"Stage {places} is to go and still works: {each.donor} has taken over, without a loss."
            yield Announce(EventReason.MOVED, note, about=about)
            continue
        # Without a reason of its own the engine did what the plan says: this stage must not be used.
        lost = f"was lost ({each.reason})" if each.reason else "must not be used any more"
        who = f"{each.donor} stands in" if each.donor else "its own process came back, nobody else stood in"
        yield Announce(
            EventReason.BORROWED if each.donor else EventReason.STAGE_RETURNED,
            f"Stage {places} {lost}; {who}. It took "
            f"{each.took or 'an unknown time'}; {each.requests_affected} running requests were affected, "
            f"{each.tokens_recomputed} tokens were computed again, {each.tokens_kept} were kept.",
            warning=True,
            about=about,
        )


def _instance(before: InstanceStatus | None, after: InstanceStatus) -> Iterator[Announce]:
    was_up = before is not None and before.phase in _UP
    if after.phase is InstancePhase.SERVING and not was_up:
        yield Announce(EventReason.INSTANCE_READY, f"Instance {after.instance} serves; a real token was seen.")
    elif was_up and after.phase is InstancePhase.DRAINING:
        note = f"Instance {after.instance} gives way: it gets no new requests and finishes those that it has."
        yield Announce(EventReason.INSTANCE_DRAINING, note)
    elif was_up and after.phase is InstancePhase.WAITING:
        yield Announce(
            EventReason.STAGE_LOST,
            f"Instance {after.instance} has lost a stage, and no donor can stand in. {after.message or ''}".rstrip(),
            warning=True,
        )
    elif was_up and after.phase not in _UP:
        note = f"Instance {after.instance} does not serve any more (phase {after.phase}). {after.message or ''}"
        yield Announce(EventReason.INSTANCE_LOST, note.rstrip(), warning=True)


def _troubles(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    now = _condition(after, ConditionType.PROGRESSING)
    then = _condition(before, ConditionType.PROGRESSING)
    if now is not None and now.reason in NEEDS_A_PERSON and (then is None or then.reason != now.reason):
        yield Announce(now.reason, now.message, warning=True)


def _replication(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    now = _condition(after, ConditionType.REPLICATION_HEALTHY)
    then = _condition(before, ConditionType.REPLICATION_HEALTHY)
    risky = Reason.SHARED_FAILURE_DOMAIN
    if now is None or (then is not None and (then.status, then.reason == risky) == (now.status, now.reason == risky)):
        return
    about = f"{then.last_transition_time}/{then.reason}" if then is not None else "first"
    if now.reason == risky:
        yield Announce(risky, now.message, warning=True, about=about)
    elif now.status is ConditionStatus.TRUE:
        yield Announce(EventReason.REPLICATION_HEALTHY, now.message, about=about)
    elif now.status is ConditionStatus.FALSE and now.reason != Reason.DISABLED:
        # Who switched it off need not be warned of it.
        yield Announce(EventReason.REPLICATION_UNHEALTHY, now.message, warning=True, about=about)


def _stages(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    old = {(each.instance, stage.stage): stage for each in before.instances for stage in each.stages}
    for instance in after.instances:
        for now in instance.stages:
            then, place = old.get((instance.instance, now.stage)), f"{instance.instance}.{now.stage}"
            if now.leaving is not None and (then is None or then.leaving is None):
                yield Announce(EventReason.STAGE_LEAVING, f"Stage {place} is to leave its place: {now.leaving}.", True)
            if now.warning is not None and (then is None or then.warning is None):
                yield Announce(EventReason.NODE_WARNING, f"Stage {place}: {now.warning}.", True)
            if then is None or then.pod is None or now.pod is None:
                continue
            if now.pod != then.pod:
                note = f"Stage {place} is in pod {now.pod} on node {now.node} now; it was in pod {then.pod}."
                yield Announce(EventReason.STAGE_REPLACED, note)
            elif then.leaving is not None and now.leaving is None:
                yield Announce(EventReason.STAGE_STAYS, f"Stage {place} stays where it is: {then.leaving} is over.")


def _nodes(before: ResilientLLMStatus, after: ResilientLLMStatus) -> Iterator[Announce]:
    avoided = {each.name for each in before.nodes}
    for node in after.nodes:
        if node.name not in avoided:
            note = f"Node {node.name} is avoided: {node.failures} failures of stages there. {node.evidence}."
            yield Announce(EventReason.NODE_AVOIDED, note, True)
    was, now = (each is not None and each.tripped for each in (before.breaker, after.breaker))
    if after.breaker is not None and now and not was:
        yield Announce(EventReason.BREAKER_TRIPPED, after.breaker.message, True)
    elif was and not now:
        yield Announce(EventReason.BREAKER_RESET, "What speaks against nodes has consequences again.")


def _condition(status: ResilientLLMStatus, kind: ConditionType) -> Condition | None:
    return next((each for each in status.conditions if each.type == kind), None)
