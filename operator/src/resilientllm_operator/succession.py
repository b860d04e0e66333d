"""Which of the pods of a slot fills it, and when the next one takes over. Pure.

A stage that has to go gets a second pod, elsewhere and at once. Both are there for a while, and a plan knows only one:
the older, until engines do without it. Then the younger; the older is deleted. Who fills a slot is in the status and
written down before it is used, so the next operator goes on with the same pod: two addresses for one stage in turns
would look to engines like one loss after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta

from resilientllm_api.crd import NodeAction
from resilientllm_api.plan import StageId

from resilientllm_operator.names import Role, Slot, slots
from resilientllm_operator.signals import Signals
from resilientllm_operator.world import Contact, PodView, World

PATIENCE = timedelta(seconds=60)
"""So long a new pod that is ready waits until engines do without the old one. Longer, and it is not going to happen:
there is no other stage to go to, or an engine does not answer."""


def seats_of(world: World, signals: Signals, restrained: bool, now: datetime) -> Mapping[Slot, PodView]:
    """For every slot that has pods, the one that fills it. ``restrained``: what may still work stays."""
    seats = {}
    for slot in {pod.slot for pod in world.pods}:
        occupant = _occupant(world, slot) if slot.role is Role.STAGE else _engine(world, slot, signals)
        if occupant is not None:
            following = successor_of(world, occupant, signals)
            if slot.role is Role.STAGE and following is not None:
                in_use = slot.stage_id in users(world)
                held = restrained and in_use and not occupant.leaving
                if not held and _takes_over(world, occupant, following, signals, in_use, now):
                    occupant = following
            seats[slot] = occupant
    return seats


def successor_of(world: World, occupant: PodView, signals: Signals) -> PodView | None:
    """The pod that is to follow the one that fills the slot: one that has no reason to go itself.

    After one that ends anyway, any is better than none.
    """
    others = [pod for pod in world.live(occupant.slot) if pod.uid != occupant.uid]
    fit = (pod for pod in others if not is_to_go(pod, signals))
    return next(fit, others[0] if others and occupant.leaving else None)


def is_to_go(pod: PodView, signals: Signals) -> bool:
    signal = signals.get(pod.uid)
    return signal is not None and signal.is_to_go


def departures(
    world: World, signals: Signals, restrained: bool, cannot_run: Callable[[PodView], bool]
) -> tuple[frozenset[StageId], frozenset[StageId]]:
    """The stages that engines shall move away from, and those that they must not use.

    ``cannot_run``: whether something is the matter with a pod that waiting does not mend.
    """
    leaving, lost = set(), set()
    for slot in slots(world.instances, world.object.spec.stages):
        pod = world.current(slot)
        if slot.role is not Role.STAGE or pod is None or not is_to_go(pod, signals):
            continue
        if signals[pod.uid].action is NodeAction.BORROW:
            # What is not in use already may as well be forbidden.
            if not restrained or slot.stage_id not in users(world):
                lost.add(slot.stage_id)
        elif pod.leaving:
            leaving.add(slot.stage_id)
    if not restrained:
        leaving |= {stage for stages in _moving(world, signals, cannot_run).values() for stage in stages[:1]}
    return frozenset(leaving), frozenset(lost)


def _moving(world: World, signals: Signals, cannot_run: Callable[[PodView], bool]) -> dict[int, list[StageId]]:
    """For each column the stages that may move now, in this order: one after the other, so that one copy is at rest.

    Only when there is a place to go to, and nobody is served here who would have to move with it. A stage that works is
    not given up for a pod that does not come to run.
    """
    columns: dict[int, list[StageId]] = {}
    at_work = users(world)
    for slot in slots(world.instances, world.object.spec.stages):
        pod = world.current(slot)
        if slot.role is not Role.STAGE or pod is None or pod.leaving or not is_to_go(pod, signals):
            continue
        following = successor_of(world, pod, signals)
        guests = at_work.get(slot.stage_id, frozenset()) - {slot.instance}
        moves = signals[pod.uid].action is NodeAction.MOVE
        if moves and following is not None and following.node is not None and not guests and not cannot_run(following):
            columns.setdefault(slot.stage_id.stage, []).append(slot.stage_id)
    for stages in columns.values():
        # Who is on the way already goes on.
        stages.sort(key=lambda stage: (stage in at_work, stage.instance))
    return columns


def users(world: World) -> Mapping[StageId, frozenset[int]]:
    """The instances that each stage serves, by what their engines said last."""
    found: dict[StageId, set[int]] = {}
    for instance, place, server, _ in _places(world):
        if server is not None:
            found.setdefault(StageId(instance=server.instance, stage=place), set()).add(instance)
    return {stage: frozenset(instances) for stage, instances in found.items()}


def _places(world: World) -> Iterator[tuple[int, int, StageId | None, StageId | None]]:
    """Instance and place, who serves it, and who keeps its copies."""
    for instance in range(world.instances):
        engine = world.engine(world.engine_pod(instance))
        if (state := engine.state) is not None:
            keepers = {each.stage: each.kept_by for each in state.replication}
            for serving in state.stages:
                yield instance, serving.stage, serving.served_by, keepers.get(serving.stage)
            continue
        # An engine that does not answer the operator may serve all the same, as it did when it was heard last.
        for before in world.object.status.instances:
            if before.instance == instance:
                for stage in before.stages:
                    server = _parse(stage.served_by)
                    if server is None and engine.contact is Contact.UNKNOWN:
                        # It may have come back while nobody asked it, and goes to its own stages then.
                        server = StageId(instance=instance, stage=stage.stage)
                    yield instance, stage.stage, server, _parse(stage.kept_by)


def _occupant(world: World, slot: Slot) -> PodView | None:
    """Who filled the slot before, as long as that pod is there; else the oldest that is to stay."""
    mine = [pod for pod in world.pods if pod.slot == slot]
    recorded = {
        stage.pod
        for instance in world.object.status.instances
        for stage in instance.stages
        if (instance.instance, stage.stage) == (slot.instance, slot.stage)
    }
    before = next((pod for pod in mine if pod.name in recorded), None)
    youngest_leaving = sorted(mine, key=lambda pod: (pod.created, pod.name), reverse=True)
    return before or next(iter([*world.live(slot), *youngest_leaving]), None)


def _engine(world: World, slot: Slot, signals: Signals) -> PodView | None:
    """The oldest that is to stay; but not on a lost node, if there is another."""
    live = world.live(slot)
    return next((pod for pod in live if not is_to_go(pod, signals)), next(iter(live), None))


def _takes_over(world: World, old: PodView, new: PodView, signals: Signals, in_use: bool, now: datetime) -> bool:
    if new.ip is None:
        return False  # There is nothing to tell engines yet.
    signal = signals.get(old.uid)
    if old.ended or (signal is not None and signal.action is NodeAction.BORROW):
        return True
    if old.leaving:
        return not in_use or old.ends_by is None or now >= old.ends_by
    if signal is None or not signal.is_to_go:
        # Nothing speaks against the older any more; but what works is not given up for what does not.
        return new.ready and not old.ready
    if not new.ready:
        return False
    is_overdue = new.ready_since is not None and now - new.ready_since >= PATIENCE
    return is_overdue or not (in_use or _keeps_what_others_could(world, old.slot.stage_id))


def _keeps_what_others_could(world: World, keeper: StageId) -> bool:
    """Whether it keeps copies that another stage than its own successor could keep as well: that one soon does."""
    for _, place, server, kept_by in _places(world):
        if kept_by == keeper and place == keeper.stage:
            others = [
                pod
                for pod in world.pods
                if pod.slot.stage == place
                and pod.slot.role is Role.STAGE
                and pod.slot.stage_id not in (keeper, server)
                and pod.ready
                and not pod.leaving
            ]
            if others:
                return True
    return False


def _parse(stage: str | None) -> StageId | None:
    return StageId.parse(stage) if stage is not None else None
