"""The condition ``Recovering``: whether a re-stitch, a move, or the replacement of a stage is under way. Pure.

Abnormal when true. ``Degraded`` says what clients have less of meanwhile, and ``Stalled`` whether it goes on by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from resilientllm_api.crd import ConditionType, InstancePhase, InstanceStatus, StageStatus
from resilientllm_api.reasons import Reason

from resilientllm_operator.verdict import Verdict

_RESTITCHING = {InstancePhase.RECOVERING, InstancePhase.WAITING}
_URGENT_FIRST = (Reason.RESTITCHING, Reason.REPLACING, Reason.MOVING)


def recovering(instances: Sequence[InstanceStatus]) -> Verdict:
    """``instances``: without the one that gives way for a change."""
    found = [finding for each in instances if each.first_served_at is not None for finding in _of_an_instance(each)]
    if not found:
        message = "Every stage that served is in its place."
        return Verdict(ConditionType.RECOVERING, False, Reason.AS_SPECIFIED, message)
    reason = min((reason for reason, _ in found), key=_URGENT_FIRST.index)
    words = "; ".join(text for _, text in sorted(found, key=lambda each: _URGENT_FIRST.index(each[0])))
    return Verdict(ConditionType.RECOVERING, True, reason, f"{words[0].upper()}{words[1:]}.")


def _of_an_instance(instance: InstanceStatus) -> Iterator[tuple[Reason, str]]:
    if instance.phase in _RESTITCHING:
        yield Reason.RESTITCHING, f"instance {instance.instance} re-stitches (phase {instance.phase})"
    for stage in instance.stages:
        place = f"{instance.instance}.{stage.stage}"
        if stage.leaving is not None and stage.successor is not None:
            where = f"pod {stage.successor} is to take the place of pod {stage.pod}: {stage.leaving}"
            yield Reason.MOVING if stage.ready else Reason.REPLACING, f"stage {place}: {where}"
        elif stage.served_by != place or not stage.ready:
            yield Reason.REPLACING, f"stage {place} {_whereabouts(stage, place)}"


def _whereabouts(stage: StageStatus, place: str) -> str:
    pod = f"its pod {stage.pod} is {'ready' if stage.ready else 'not ready'}" if stage.pod else "it has no pod"
    by = (
        "by nobody" if stage.served_by is None else "by itself" if stage.served_by == place else f"by {stage.served_by}"
    )
    return f"is served {by}, {pod}"
