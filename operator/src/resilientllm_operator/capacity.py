"""Which pods to make and which to delete. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta

from resilientllm_api.crd import HoldStatus

from resilientllm_operator.actions import CreatePod, DeletePod
from resilientllm_operator.names import Slot, slots
from resilientllm_operator.pods import build_pod, spec_hash
from resilientllm_operator.world import PodView, World

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


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def is_wanted(world: World, slot: Slot) -> bool:
    return slot in slots(world.object.spec.instances, world.object.spec.stages)


def is_outdated(world: World, pod: PodView) -> bool:
    """Whether the pod was made from an older spec."""
    return is_wanted(world, pod.slot) and pod.spec_hash != spec_hash(world.object, pod.slot)


def pod_changes(
    world: World, hold: HoldStatus | None, expendable: Mapping[int, int | None], now: datetime
) -> Iterator[CreatePod | DeletePod]:
    """The next pods to make and to delete; ``expendable`` as :func:`draining.expendable` has it."""
    wanted = slots(world.object.spec.instances, world.object.spec.stages)
    for pod in world.pods:
        if pod.slot not in wanted and not pod.leaving:
            if pod.slot.instance in expendable:
                why = f"{pod.slot} is not wanted any more"
                yield DeletePod(pod.name, pod.uid, why, expendable[pod.slot.instance])
        elif pod.ended:
            yield DeletePod(pod.name, pod.uid, f"{pod.slot} has ended and will not run again")
    for slot in wanted:
        keep, *surplus = world.live(slot) or (None,)
        for pod in surplus:
            assert pod is not None
            yield DeletePod(pod.name, pod.uid, f"{slot} has another pod already")
        if keep is None:
            if hold is None:
                yield from _create(world, slot, now)
        elif hold is not None and keep.rejected_configuration:
            yield DeletePod(keep.name, keep.uid, f"{slot} cannot work as configured")
    if hold is None:
        yield from _roll_out(world, expendable)


def _create(world: World, slot: Slot, now: datetime) -> Iterator[CreatePod]:
    create = CreatePod(build_pod(world.object, slot, [pod.uid for pod in world.leaving(slot)]))
    refusal = world.refusals.get(create.name)
    if refusal is None or now - refusal.at >= REFUSED_POD_RETRY:
        yield create


def _roll_out(world: World, expendable: Mapping[int, int | None]) -> Iterator[DeletePod]:
    """All older pods of an instance at once: its engine and its stages must agree on their flags."""
    for pod in world.pods:
        if pod.slot.instance in expendable and not pod.leaving and is_outdated(world, pod):
            grace_seconds = expendable[pod.slot.instance]
            yield DeletePod(pod.name, pod.uid, f"{pod.slot} was made from an older spec", grace_seconds)
