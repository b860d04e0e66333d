"""Which pods to make and which to delete. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from resilientllm_api.crd import HoldStatus

from resilientllm_operator.actions import CreatePod, DeletePod
from resilientllm_operator.assessment import Assessment
from resilientllm_operator.breaker import Restraint
from resilientllm_operator.names import Role, Slot, slots
from resilientllm_operator.node_affinity import keep_off
from resilientllm_operator.pods import build_pod, spec_hash
from resilientllm_operator.succession import is_to_go, successor_of
from resilientllm_operator.twins import twins
from resilientllm_operator.world import PodView, World, last_line

REFUSED_POD_RETRY = timedelta(seconds=15)
"""A quota or a policy may change; asking in every round would only fill logs."""


def hold_of(world: World, now: datetime) -> HoldStatus | None:
    """The evidence that no pod of this spec can work, until the spec or the retry annotation changes.

    A process that ends with exit code 2 says that no restart helps. Restarting it for ever would hide that.
    """
    obj = world.object
    held = obj.status.hold
    if held is not None and held.generation == obj.generation and held.retry == obj.retry:
        return held
    for pod in sorted(world.pods, key=lambda pod: pod.name):
        if pod.rejected_configuration and not pod.leaving and not is_outdated(world, pod):
            assert pod.last_exit is not None
            return HoldStatus(
                generation=obj.generation,
                retry=obj.retry,
                pod=pod.name,
                role=str(pod.slot),
                message=last_line(pod.last_exit.message),
                at=now,
            )
    return None


def is_wanted(world: World, slot: Slot) -> bool:
    spec = world.object.spec
    return slot.instance < spec.instances and (slot.stage is None or slot.stage < spec.stages)


def is_outdated(world: World, pod: PodView) -> bool:
    """Whether the pod was made from an older spec."""
    return is_wanted(world, pod.slot) and pod.spec_hash != spec_hash(world.object, pod.slot)


def pod_changes(
    world: World,
    hold: HoldStatus | None,
    expendable: Mapping[str, int | None],
    assessment: Assessment,
    now: datetime,
) -> Iterator[CreatePod | DeletePod]:
    """The next pods to make and to delete; ``expendable`` as :func:`draining.expendable` has it.

    What would be done in mode Observe is decided as if it were to be done.
    """
    wanted = slots(world.object.spec.instances, world.object.spec.stages)
    for pod in world.pods:
        if pod.slot not in wanted and not pod.leaving:
            if pod.uid in expendable:
                yield DeletePod(pod.name, pod.uid, f"{pod.slot} is not wanted any more", expendable[pod.uid])
        elif pod.ended:
            yield DeletePod(pod.name, pod.uid, f"{pod.slot} has ended and will not run again")
    for slot in wanted:
        yield from _fill(world, slot, hold, assessment, now)
    if hold is None:
        yield from _roll_out(world, expendable)


def _fill(
    world: World, slot: Slot, hold: HoldStatus | None, assessment: Assessment, now: datetime
) -> Iterator[CreatePod | DeletePod]:
    """Makes of the pods of a slot the one that is to fill it, and its successor where it has to go."""
    restrained = assessment.restraint in (Restraint.PAUSED, Restraint.TRIPPED)
    keep, signals = world.current(slot), assessment.signals
    following = successor_of(world, keep, signals) if keep is not None else None
    goes = keep is not None and (keep.leaving or is_to_go(keep, signals))
    for pod in world.live(slot):
        if hold is not None and pod.rejected_configuration:
            yield DeletePod(pod.name, pod.uid, f"{slot} cannot work as configured")
        elif pod is keep or (pod is following and goes):
            if pod.unschedulable is not None and pod.kept_off - assessment.unfit_nodes(world):
                yield DeletePod(pod.name, pod.uid, f"{slot} finds no node, and was kept off nodes that are fit again")
        elif not (restrained and pod.ready):
            assert keep is not None
            reason = f": {signals[pod.uid].reason}" if is_to_go(pod, signals) else ""
            yield DeletePod(pod.name, pod.uid, f"{slot} has pod {keep.name}{reason}")
    if hold is not None or following is not None:
        return
    if keep is None or keep.leaving:
        yield from _create(world, slot, assessment, now)
    elif goes and not restrained and not is_outdated(world, keep):
        yield from _create(world, slot, assessment, now, signals[keep.uid].reason)


def _create(world: World, slot: Slot, assessment: Assessment, now: datetime, why: str = "") -> Iterator[CreatePod]:
    predecessors = [pod.uid for pod in world.pods if pod.slot == slot]
    pod = build_pod(world.object, slot, predecessors, twins(world, slot, assessment.signals))
    create = CreatePod(keep_off(pod, assessment.unfit_nodes(world)) if slot.role is Role.STAGE else pod, why)
    refusal = world.refusals.get(create.name)
    if refusal is None or now - refusal.at >= REFUSED_POD_RETRY:
        yield create


def _roll_out(world: World, expendable: Mapping[str, int | None]) -> Iterator[DeletePod]:
    """All older pods of an instance at once: its engine and its stages must agree on their flags."""
    for pod in world.pods:
        if pod.uid in expendable and is_outdated(world, pod):
            yield DeletePod(pod.name, pod.uid, f"{pod.slot} was made from an older spec", expendable[pod.uid])
