"""The condition ``ReplicationHealthy``: whether every place's KV blocks are kept by a second stage. Pure.

It says what the next loss of a stage would cost, and nothing of what a client gets now, so no other condition is
computed from it. Where replication is not wanted it stays, as False with a reason of its own: by the conventions of
the Kubernetes API a condition that is absent means the same as Unknown, which would be untrue, and True would promise
copies that nobody keeps. The autoscaler's ``ScalingActive`` is False with ``ScalingDisabled`` for the same reason.

Messages have no figures that change by themselves: the status is written whenever it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from resilientllm_api.crd import HOSTNAME, ConditionStatus, ConditionType, InstanceStatus
from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState, StageServing
from resilientllm_api.plan import ReplicationMode, StageId
from resilientllm_api.reasons import Reason

from resilientllm_operator.failure_domains import shared_domains
from resilientllm_operator.names import Role, Slot
from resilientllm_operator.trouble import Trouble
from resilientllm_operator.verdict import Verdict
from resilientllm_operator.world import Contact, World

LAG_LIMIT_SECONDS = 5.0
"""Copies that are further behind would leave seconds of every request's work to be done again."""
LAG_MENDED_SECONDS = 2.5
"""Copies that lagged are healthy again below this: a lag about the limit must not make an event of every look."""

_WORST_FIRST = (Reason.NOT_SUPPORTED, Reason.NO_KEEPER, Reason.NOT_REPLICATING, Reason.LAGGING, Reason.ENGINE_SILENT)
_NOT_ATTACHED = {EnginePhase.STARTING, EnginePhase.ATTACHING, EnginePhase.FAILED}
_SERVES = {EnginePhase.SERVING, EnginePhase.DEGRADED}
_MOST_MESSAGES = 3


def replication_healthy(world: World, instances: Sequence[InstanceStatus]) -> Verdict:
    spec = world.object.spec
    if spec.replication.mode is ReplicationMode.NONE:
        return _verdict(
            False,
            Reason.DISABLED,
            "spec.replication.mode is None: nobody keeps copies of KV blocks, so the requests that run when a stage is "
            "lost are computed again from their tokens.",
        )
    if spec.instances == 1:
        return _verdict(
            False,
            Reason.NO_KEEPER,
            "With one instance no other can keep copies of KV blocks: set spec.instances to 2 or more, or "
            "spec.replication.mode to None.",
        )
    if (before := _before_an_engine_was_heard(world)) is not None:
        return before
    found = [finding for instance in range(spec.instances) for finding in _instance(world, instance)]
    if not found:
        return _kept(world, instances)
    worst = min((finding.reason for finding in found), key=_WORST_FIRST.index)
    messages = list(dict.fromkeys(finding.message for finding in found if finding.reason is worst))
    more = f" (and {len(messages) - _MOST_MESSAGES} more)" if len(messages) > _MOST_MESSAGES else ""
    return _verdict(None if worst is Reason.ENGINE_SILENT else False, worst, " ".join(messages[:_MOST_MESSAGES]) + more)


def lag_to_show(lag_seconds: float) -> int:
    """Whole seconds, rounded down to a power of two: the exact figure would have the status written at every look."""
    return 1 << (int(lag_seconds).bit_length() - 1) if lag_seconds >= 1 else 0


def _verdict(status: bool | None, reason: Reason, message: str) -> Verdict:
    return Verdict(ConditionType.REPLICATION_HEALTHY, status, reason, message)


def _kept(world: World, instances: Sequence[InstanceStatus]) -> Verdict:
    """All is well now; but is it with the loss of a whole failure domain, too?

    True all the same, because the copies are there, and the next loss of a single node costs nothing.
    """
    kept = "KV blocks of every place are kept by another stage, and the copies keep up."
    key = world.object.spec.replication.topology_key
    shared = [f"{stage} and {pair} ({domain})" for domain, stage, pair in shared_domains(world, instances)]
    if shared:
        more = f" and {len(shared) - _MOST_MESSAGES} more" if len(shared) > _MOST_MESSAGES else ""
        return _verdict(
            True,
            Reason.SHARED_FAILURE_DOMAIN,
            f"{kept} But these stages and their pairs are in one failure domain (by the node label {key}), because no "
            f"other was free: {', '.join(shared[:_MOST_MESSAGES])}{more}. What takes the whole domain takes the copies "
            "with it. All pairs are apart where no domain has more than half of the copies of a stage: add nodes in "
            "others, then delete a pod of one of these stages.",
        )
    if key != HOSTNAME and not world.nodes:
        unseen = "may not list nodes: bind the ClusterRole resilientllm-operator-nodes."
        return _verdict(
            True, Reason.REPLICATING, f"{kept} Whether in another {key} is not known, as the operator {unseen}"
        )
    return _verdict(True, Reason.REPLICATING, kept)


def _before_an_engine_was_heard(world: World) -> Verdict | None:
    """A new operator that has not heard of an engine yet knows no better than what the last one wrote."""
    views = [world.engine(world.engine_pod(instance)) for instance in range(world.object.spec.instances)]
    before = next(
        (old for old in world.object.status.conditions if old.type == ConditionType.REPLICATION_HEALTHY), None
    )
    if (
        before is None
        or before.observed_generation != world.object.generation
        or before.reason not in {*Reason}
        or all(view.contact is not Contact.UNKNOWN for view in views)
    ):
        return None
    known = {ConditionStatus.TRUE: True, ConditionStatus.FALSE: False, ConditionStatus.UNKNOWN: None}
    return _verdict(known[before.status], Reason(before.reason), before.message)


def _instance(world: World, instance: int) -> Iterator[Trouble]:
    """What keeps the places of one instance from being replicated; nothing if all is well."""
    pod = world.engine_pod(instance)
    state = world.engine(pod).state
    if state is None or state.phase in _NOT_ATTACHED:
        name = f" ({pod.name})" if pod else ""
        does_not = "does not answer" if state is None else "has not attached to its stages"
        yield Trouble(
            Reason.ENGINE_SILENT,
            f"The engine of instance {instance}{name} {does_not}, so whether its KV blocks are kept is not known.",
        )
        return
    if (obstacle := _obstacle(state)) is not None:
        yield Trouble(
            Reason.NOT_SUPPORTED,
            f"These stages cannot replicate: {obstacle}. The requests that run when a stage is lost are computed again "
            "from their tokens; set spec.replication.mode to None if that is meant.",
        )
        return
    told = {each.stage: each for each in state.replication}
    for serving in state.stages:
        if _living(serving) < 2:
            yield Trouble(Reason.NO_KEEPER, _no_keeper(world, serving.stage))
        elif state.phase in _SERVES:
            yield from _place(world, instance, serving, told.get(serving.stage))


def _place(world: World, instance: int, serving: StageServing, told: ReplicationState | None) -> Iterator[Trouble]:
    place = f"{instance}.{serving.stage}"
    if told is None:
        # It holds an older plan, or has not agreed its KV cache: both pass by themselves.
        yield Trouble(Reason.ENGINE_SILENT, f"The engine of instance {instance} does not say who keeps its KV blocks.")
    elif told.kept_by is not None and told.lag_seconds > _limit_seconds(world):
        yield Trouble(
            Reason.LAGGING,
            f"Copies of place {place} are more than {LAG_LIMIT_SECONDS:g} s behind: what "
            f"{_whereabouts(world, serving.served_by)} computes does not reach {_whereabouts(world, told.kept_by)} "
            "fast enough. Look at the network between them; what is not copied is computed again after a loss.",
        )
    elif told.kept_by is None:
        yield Trouble(
            Reason.NOT_REPLICATING,
            f"KV blocks of place {place} are kept by nobody, although another stage {serving.stage} lives. This passes "
            f"when that stage has its KV cache; if it stays, read the log of {_engine_name(world, instance)}.",
        )
    elif not told.healthy:
        yield Trouble(
            Reason.NOT_REPLICATING,
            f"KV blocks of place {place} do not reach {_whereabouts(world, told.kept_by)}, which is to keep them. If "
            f"this stays, look at the network between the two and at the log of {_engine_name(world, instance)}.",
        )


def _obstacle(state: EngineState) -> str | None:
    """Why this engine's KV blocks cannot be replicated at all, in its own words."""
    return next((each.message.rstrip(".") for each in state.replication if not each.supported), None)


def _living(serving: StageServing) -> int:
    """How many stages with the weights of this place the engine is connected to."""
    return serving.own_connected + serving.donors_connected


def _limit_seconds(world: World) -> float:
    lagged = any(
        each.type == ConditionType.REPLICATION_HEALTHY and each.reason == Reason.LAGGING
        for each in world.object.status.conditions
    )
    return LAG_MENDED_SECONDS if lagged else LAG_LIMIT_SECONDS


def _no_keeper(world: World, stage: int) -> str:
    ids = [StageId(instance=instance, stage=stage) for instance in range(world.object.spec.instances)]
    lost = [_lost(world, each) for each in ids if not _is_ready(world, each)]
    hint = " With spec.instances of 3 or more one lost stage leaves a keeper." if len(ids) == 2 else ""
    why = f": {', '.join(lost)}" if lost else ""
    return (
        f"Fewer than two of the stages {', '.join(map(str, ids))} can be reached, so nobody can keep copies of their "
        f"KV blocks{why}. Copies are made again when a second one is back.{hint}"
    )


def _lost(world: World, stage: StageId) -> str:
    pod = world.current(Slot(stage.instance, Role.STAGE, stage.stage))
    return f"{stage} is not ready (pod {pod.name})" if pod else f"{stage} has no pod"


def _is_ready(world: World, stage: StageId) -> bool:
    pod = world.current(Slot(stage.instance, Role.STAGE, stage.stage))
    return pod is not None and pod.ready


def _whereabouts(world: World, stage: StageId | None) -> str:
    if stage is None:
        return "its stage"
    pod = world.current(Slot(stage.instance, Role.STAGE, stage.stage))
    return f"stage {stage} (pod {pod.name} on node {pod.node})" if pod else f"stage {stage}"


def _engine_name(world: World, instance: int) -> str:
    pod = world.engine_pod(instance)
    return f"pod {pod.name}" if pod else f"the engine of instance {instance}"
