"""Which instance gives way, and when its pods may go: for a roll-out, or because fewer instances are wanted. Pure.

An instance that serves first gets no new requests, finishes those that it has, and the others move away from its
stages. One at a time, and only while the others make up for it. That is asked in every round: when one of them is lost,
the drain is called off and the instance serves again. Only when its pods have been told to go there is no way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from resilientllm_api.crd import DrainReason, DrainStatus, HoldStatus, InstancePhase, InstanceStatus
from resilientllm_api.durations import parse_seconds
from resilientllm_api.plan import StageId

from resilientllm_operator.capacity import is_outdated, is_wanted
from resilientllm_operator.names import Role
from resilientllm_operator.world import Contact, PodView, World

SETTLE = timedelta(seconds=3)
"""So long every node may take to learn of an endpoint that is not ready any more."""
KEEPERS_PATIENCE = timedelta(seconds=15)
"""Copies elsewhere are worth waiting for, and not for long: they only spare computing, if there is a loss just then."""
OVERDUE_GRACE_SECONDS = 5
"""For the pods of an instance whose time to finish is over: only to end in order."""


def drain_of(
    world: World, instances: Sequence[InstanceStatus], hold: HoldStatus | None, restrained: bool, now: datetime
) -> DrainStatus | None:
    """The instance that gives way now; None if none has to, or none may. ``instances``: as if none did.

    ``restrained``: what works is to be left alone.
    """
    before = world.object.status.drain
    if before is not None and before.deleted_at is not None:
        if not _is_over(world, instances, before):
            return before
        before = None
    if hold is not None or restrained:
        return None
    due = _due(world, instances)
    candidates = ([(before.instance, before.reason)] if before is not None else []) + due
    for instance, reason in candidates:
        if (instance, reason) in due and not obstacles(world, instances, instance):
            same = before is not None and (before.instance, before.reason) == (instance, reason)
            drain = DrainStatus(instance=instance, reason=reason, since=before.since if before and same else now)
            drained = _is_drained(world, instances, drain, now)
            return drain.model_copy(update={"deleted_at": now}) if drained else drain
    return None


def expendable(
    world: World, instances: Sequence[InstanceStatus], drain: DrainStatus | None
) -> Mapping[str, int | None]:
    """The older or unwanted pods that may go now, by uid, and their grace in seconds, None for their own.

    Nothing is lost with an instance that does not serve and none of whose stages serves another. Of one whose engine
    has not been heard yet that is not known.
    """
    given: dict[str, int | None] = {}
    if not world.object.paused:
        down = {each.instance for each in instances if not each.serving and not _users(instances, each.instance)}
        given = {pod.uid: None for pod in _to_go(world) if pod.slot.instance in down - _unheard(world, instances)}
    if drain is not None and drain.deleted_at is not None:
        overdue = drain.deleted_at - drain.since >= _timeout(world)
        given |= {pod.uid: OVERDUE_GRACE_SECONDS if overdue else None for pod in _drained_pods(world, drain)}
    return given


def shown(world: World, instances: Sequence[InstanceStatus], drain: DrainStatus | None) -> tuple[InstanceStatus, ...]:
    """The instances as they are told: the one that gives way gets no requests."""
    return tuple(
        each.model_copy(update={"phase": InstancePhase.DRAINING, "serving": False})
        if each.serving and drain is not None and _gives_way(world, each.instance, drain)
        else each
        for each in instances
    )


def departing(world: World, drain: DrainStatus | None) -> frozenset[StageId]:
    """The stages of the instance that gives way which are to go: the others move away from them."""
    if drain is None:
        return frozenset()
    return frozenset(
        pod.slot.stage_id
        for pod in world.pods
        if pod.slot.instance == drain.instance
        and pod.slot.role is Role.STAGE
        and not pod.leaving
        and is_to_go(world, pod)
    )


def in_words(drain: DrainStatus | None) -> Iterator[str]:
    """What would be done, where nothing may be."""
    if drain is not None and drain.deleted_at is None:
        yield f"let instance {drain.instance} finish its requests, and then change its pods ({drain.reason})"


def is_to_go(world: World, pod: PodView) -> bool:
    """Whether the spec asks for another pod than this one, or for none."""
    return is_outdated(world, pod) or not is_wanted(world, pod.slot)


def _to_go(world: World) -> list[PodView]:
    return [pod for pod in world.pods if not pod.leaving and is_to_go(world, pod)]


def _drained_pods(world: World, drain: DrainStatus) -> list[PodView]:
    """What the drain was for. Those that follow have requests of their own, even if the spec has changed again."""
    return [pod for pod in _to_go(world) if pod.slot.instance == drain.instance and pod.created <= drain.since]


def obstacles(world: World, instances: Sequence[InstanceStatus], instance: int) -> list[str]:
    """Why an instance may not give way now, in words that go on from "until".

    That another one serves must have been written down: with the same write it would get its requests and this one lose
    them, and an operator that ends then begins with a status by which it is the other way round.
    """
    wanted = world.object.spec.instances
    recorded = {each.instance for each in world.object.status.instances if each.serving}
    others = [each for each in instances if each.instance != instance and each.instance < wanted]
    missing = [each.instance for each in others if not (each.serving and each.instance in recorded)]
    if len(others) - len(missing) < wanted - 1:
        return [f"instance {each} serves" for each in missing]
    return [f"instance {user} is served by its own stages" for user in _users(instances, instance)]


def waiting(world: World, instances: Sequence[InstanceStatus]) -> list[tuple[int, DrainReason, list[str]]]:
    """The instances that still have to give way, and what each of them waits for."""
    return [(each, reason, obstacles(world, instances, each)) for each, reason in _due(world, instances)]


def _due(world: World, instances: Sequence[InstanceStatus]) -> list[tuple[int, DrainReason]]:
    """Instances that have something to lose, and pods that are to go: the highest of the surplus ones first."""
    safe = expendable(world, instances, None)
    to_go = {pod.slot.instance for pod in _to_go(world) if pod.uid not in safe} - _unheard(world, instances)
    wanted = world.object.spec.instances
    surplus = sorted((each for each in to_go if each >= wanted), reverse=True)
    older = sorted(each for each in to_go if each < wanted)
    return [(each, DrainReason.SCALE_DOWN) for each in surplus] + [(each, DrainReason.ROLL_OUT) for each in older]


def _is_drained(world: World, instances: Sequence[InstanceStatus], drain: DrainStatus, now: datetime) -> bool:
    age = now - drain.since
    if age >= _timeout(world):
        return True
    kept = age < KEEPERS_PATIENCE and _keeps_for_others(instances, drain.instance)
    return age >= SETTLE and _is_idle(world, drain.instance) and not kept


def _is_idle(world: World, instance: int) -> bool:
    view = world.engine(world.engine_pod(instance))
    if view.contact is Contact.UNKNOWN:
        return False
    return view.state is None or view.state.requests_running == view.state.requests_waiting == 0


def _is_over(world: World, instances: Sequence[InstanceStatus], drain: DrainStatus) -> bool:
    """Whether what came after the drain is done: the instance is gone, or serves again."""
    if _drained_pods(world, drain):
        return False
    if drain.reason is DrainReason.SCALE_DOWN or drain.instance >= world.object.spec.instances:
        return True
    return any(
        each.serving and each.phase is InstancePhase.SERVING for each in instances if each.instance == drain.instance
    )


def _gives_way(world: World, instance: int, drain: DrainStatus) -> bool:
    """Whether it gets no requests for the drain's sake: from its beginning until there is another engine."""
    return instance == drain.instance and (
        drain.deleted_at is None or world.engine_pod(instance) in _drained_pods(world, drain)
    )


def _unheard(world: World, instances: Sequence[InstanceStatus]) -> set[int]:
    """Instances that the status does not know as serving, and whose engines have not told this operator otherwise."""
    engines = {each.instance: world.engine_pod(each.instance) for each in instances if not each.serving}
    return {
        instance
        for instance, pod in engines.items()
        if pod is not None and pod.ip and world.engine(pod).contact is Contact.UNKNOWN
    }


def _users(instances: Sequence[InstanceStatus], instance: int) -> list[int]:
    """The other instances that one of its stages serves."""
    return [
        each.instance
        for each in instances
        if each.instance != instance
        and each.serving
        and any((stage.served_by or "").startswith(f"{instance}.") for stage in each.stages)
    ]


def _keeps_for_others(instances: Sequence[InstanceStatus], instance: int) -> bool:
    """Whether its stages keep copies that a third instance could keep as well."""
    others = [each for each in instances if each.instance != instance]
    return len(others) > 1 and any(
        (stage.kept_by or "").startswith(f"{instance}.") for each in others for stage in each.stages
    )


def _timeout(world: World) -> timedelta:
    return timedelta(seconds=parse_seconds(world.object.spec.recovery.drain_timeout))
