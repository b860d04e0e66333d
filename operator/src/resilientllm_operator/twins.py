"""From whom a new stage can have its weights. Pure."""

from __future__ import annotations

from resilientllm_api.crd import NodeAction, WeightsSource
from resilientllm_api.ports import STAGE_PORT

from resilientllm_operator.names import Role, Slot
from resilientllm_operator.pods import spec_hash
from resilientllm_operator.signals import Signals
from resilientllm_operator.succession import is_to_go
from resilientllm_operator.world import PodView, World

MAX_TWINS = 3
"""The pod asks them one after the other, and one that has gone by then costs it seconds."""


def twins(world: World, slot: Slot, signals: Signals) -> tuple[str, ...]:
    """Where the twins of a stage listen that is about to be made, in the order in which it should ask.

    Only pods of the spec as it is now: after a change of the model's files, a roll-out must not hand the old ones on.
    Those that have to go come last, the one that is replaced among them; one that is not to be trusted does not come.
    Otherwise the next instance's comes first, so that several new stages do not all ask the same one.
    """
    spec = world.object.spec
    if slot.role is not Role.STAGE or spec.recovery.weights is not WeightsSource.TWIN:
        return ()

    def order(pod: PodView) -> tuple[bool, int, str]:
        instances_on = (pod.slot.instance - slot.instance - 1) % world.instances
        return is_to_go(pod, signals), instances_on, pod.name

    living = [
        pod
        for pod in world.pods
        if (pod.slot.role, pod.slot.stage) == (slot.role, slot.stage)
        and pod.ready
        and pod.ip
        and not pod.leaving
        and pod.spec_hash == spec_hash(world.object, pod.slot)
        and not (pod.uid in signals and signals[pod.uid].action is NodeAction.BORROW)
    ]
    return tuple(f"{pod.ip}:{STAGE_PORT}" for pod in sorted(living, key=order)[:MAX_TWINS])
