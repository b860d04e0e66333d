"""The state of every instance, from its engine's words and its pods. Pure."""

from __future__ import annotations

from datetime import datetime

from resilientllm_api.crd import InstancePhase, InstanceStatus, StageStatus
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.pairing import Donors
from resilientllm_api.plan import StageId

from resilientllm_operator.names import Role, Slot
from resilientllm_operator.replication import lag_to_show
from resilientllm_operator.world import Contact, EngineView, PodView, World

_PHASES = {
    EnginePhase.STARTING: InstancePhase.STARTING,
    EnginePhase.ATTACHING: InstancePhase.STARTING,
    EnginePhase.SERVING: InstancePhase.SERVING,
    EnginePhase.DEGRADED: InstancePhase.DEGRADED,
    EnginePhase.RECOVERING: InstancePhase.RECOVERING,
    EnginePhase.WAITING: InstancePhase.WAITING,
    EnginePhase.FAILED: InstancePhase.FAILED,
}
_NEEDS_TOKEN = {EnginePhase.SERVING, EnginePhase.DEGRADED}

KEEPS_VERIFICATION = {EnginePhase.SERVING, EnginePhase.DEGRADED, EnginePhase.RECOVERING}
"""Phases of an engine that goes on serving. After any other, a new token has to prove that it serves."""


def incarnation(pod: PodView, state: EngineState) -> str:
    """Names one life of an engine: another process is another incarnation, and proves itself again."""
    return f"{pod.uid}/{pod.restarts}/{state.term}"


def instance_statuses(world: World, donors: Donors, now: datetime) -> tuple[InstanceStatus, ...]:
    """Of every instance that there is, also beyond those asked for; as if none were draining."""
    return tuple(_instance(world, instance, donors, now) for instance in range(world.instances))


def _instance(world: World, instance: int, donors: Donors, now: datetime) -> InstanceStatus:
    before = next((old for old in world.object.status.instances if old.instance == instance), None)
    pod = world.engine_pod(instance)
    view = world.engine(pod)
    if view.contact is Contact.UNKNOWN and before is not None and pod is not None and before.engine == pod.name:
        # A new operator that has not heard of the engine yet must not take it out of service.
        if before.phase is InstancePhase.DRAINING:
            before = before.model_copy(update={"phase": InstancePhase.SERVING, "serving": True})
        return before.model_copy(update={"stages": _stages(world, instance, None, before, donors)})

    state = view.state if view.contact is Contact.ANSWERS else None
    served_at = before.first_served_at if before else None
    status = InstanceStatus(
        instance=instance,
        phase=_phase(pod, view, state, served_before=served_at is not None),
        message=(state.message or None) if state else None,
        engine=pod.name if pod else None,
        node=pod.node if pod else None,
        stages=_stages(world, instance, state, before, donors),
        first_served_at=served_at,
    )
    if pod is None or state is None:
        return status
    verified = incarnation(pod, state) if view.verified == incarnation(pod, state) else None
    # A re-stitch lasts milliseconds: it is no reason to send requests elsewhere.
    goes_on = state.phase is EnginePhase.RECOVERING and not state.sick
    serving = verified is not None and (state.serving or goes_on)
    return status.model_copy(
        update={
            "serving": serving,
            "verified": verified,
            "first_served_at": served_at or (now if serving else None),
            "term": state.term,
            "epoch": state.epoch,
            "plan_version": state.plan_version,
        }
    )


def _phase(pod: PodView | None, view: EngineView, state: EngineState | None, *, served_before: bool) -> InstancePhase:
    if pod is None or state is None:
        return InstancePhase.UNREACHABLE if served_before else InstancePhase.PENDING
    if state.phase in _NEEDS_TOKEN and view.verified != incarnation(pod, state):
        return InstancePhase.VERIFYING
    return _PHASES[state.phase]


def _stages(
    world: World, instance: int, state: EngineState | None, before: InstanceStatus | None, donors: Donors
) -> tuple[StageStatus, ...]:
    served_by: dict[int, str | None]
    kept_by: dict[int, str | None]
    lag_seconds: dict[int, int | None]
    if state is not None:
        served_by = {each.stage: str(each.served_by) if each.served_by else None for each in state.stages}
        copies = {each.stage: each for each in state.replication if each.kept_by}
        kept_by = {place: str(each.kept_by) for place, each in copies.items()}
        lag_seconds = {place: lag_to_show(each.lag_seconds) for place, each in copies.items()}
    else:
        last_known = before.stages if before else ()
        served_by = {each.stage: each.served_by for each in last_known}
        kept_by = {each.stage: each.kept_by for each in last_known}
        lag_seconds = {each.stage: each.lag_seconds for each in last_known}
    result = []
    for stage in range(world.object.spec.stages):
        pod = world.current(Slot(instance, Role.STAGE, stage))
        pair = next(iter(donors[StageId(instance=instance, stage=stage)]), None)
        result.append(
            StageStatus(
                stage=stage,
                pod=pod.name if pod else None,
                node=pod.node if pod else None,
                ready=bool(pod and pod.ready),
                pair=str(pair) if pair else None,
                served_by=served_by.get(stage),
                kept_by=kept_by.get(stage),
                lag_seconds=lag_seconds.get(stage),
            )
        )
    return tuple(result)
