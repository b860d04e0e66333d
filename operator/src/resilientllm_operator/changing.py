"""How far a change of the spec has come, for ``Progressing``. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from resilientllm_api.crd import PAUSED_ANNOTATION, ConditionType, DrainReason, DrainStatus, HoldStatus, InstanceStatus
from resilientllm_api.reasons import Reason

from resilientllm_operator.draining import is_to_go, waiting
from resilientllm_operator.trouble import Trouble, pod_trouble, takes_over_soon
from resilientllm_operator.verdict import Verdict
from resilientllm_operator.world import World

READY_PATIENCE = timedelta(minutes=10)
"""So long pods of a new spec may take to load; their startup probe allows them as much."""


def change(
    world: World,
    instances: Sequence[InstanceStatus],
    hold: HoldStatus | None,
    troubles: Sequence[Trouble],
    drain: DrainStatus | None,
    now: datetime,
) -> Verdict | None:
    """What is to be said of pods that are to go; None if there are none. ``instances``: as if none were draining."""
    older = [pod for pod in world.pods if not pod.leaving and is_to_go(world, pod)]
    if world.object.paused:
        return _verdict(False, Reason.PAUSED, _paused(world, len(older)))
    if not older and drain is None:
        return None
    if (culprit := _culprit(world, hold, troubles, drain, now)) is not None:
        old = sorted({pod.slot.instance for pod in older})
        left = f" Instance {', '.join(map(str, old))} goes on with pods of an older spec." if old else ""
        return _verdict(False, Reason.ROLL_OUT_STOPPED, f"The roll-out has stopped: {culprit}{left}")
    if drain is not None:
        return _verdict(True, _REASONS[drain.reason], _gives_way(drain))
    for instance, reason, obstacles in waiting(world, instances):
        if obstacles:
            words = f"Instance {instance} is left as it is until {' and '.join(obstacles)}."
            return _verdict(True, _REASONS[reason], words)
    message = "Pods made from an older spec are replaced, one instance at a time."
    return _verdict(True, Reason.ROLLING_OUT, message)


_REASONS = {DrainReason.ROLL_OUT: Reason.ROLLING_OUT, DrainReason.SCALE_DOWN: Reason.SCALING_DOWN}


def _verdict(status: bool, reason: Reason, message: str) -> Verdict:
    return Verdict(ConditionType.PROGRESSING, status, reason, message)


def _paused(world: World, older: int) -> str:
    name, namespace = world.object.name, world.object.namespace
    held = f" {older} pods are to go and stay meanwhile." if older else ""
    return (
        f"Changes are paused, only what is lost is replaced.{held} To go on: kubectl -n {namespace} annotate rllm "
        f"{name} {PAUSED_ANNOTATION}-."
    )


def _gives_way(drain: DrainStatus) -> str:
    if drain.deleted_at is None:
        then = "are replaced" if drain.reason is DrainReason.ROLL_OUT else "are deleted"
        return f"Instance {drain.instance} gets no new requests and finishes those that it has; then its pods {then}."
    if drain.reason is DrainReason.ROLL_OUT:
        return f"The pods of instance {drain.instance} are made anew from the changed spec."
    return f"The pods of instance {drain.instance} end."


def _culprit(
    world: World, hold: HoldStatus | None, troubles: Sequence[Trouble], drain: DrainStatus | None, now: datetime
) -> str | None:
    """What shows that the new spec does not work, naming the pod."""
    if hold is not None:
        return troubles[0].message
    late = drain is not None and drain.deleted_at is not None and now - drain.deleted_at > READY_PATIENCE
    for pod in world.pods:
        if pod.leaving or pod.ready or is_to_go(world, pod):
            continue
        if (trouble := pod_trouble(pod, world.object.namespace)) and not takes_over_soon(world, pod, now):
            return trouble.message
        if late and drain is not None and pod.slot.instance == drain.instance:
            minutes = int(READY_PATIENCE.total_seconds() / 60)
            return (
                f"pod {pod.name} ({pod.slot}) of the new spec is not ready after {minutes} minutes. "
                f"See kubectl -n {world.object.namespace} logs {pod.name}, and correct the spec."
            )
    return None
