"""Which plan every engine should hold, and which engines have to be told. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from resilientllm_api.crd import DrainStatus, PlanStatus, RecoveryPolicy
from resilientllm_api.durations import parse_seconds
from resilientllm_api.pairing import Donors, make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_api.ports import STAGE_PORT

from resilientllm_operator.actions import PublishPlan
from resilientllm_operator.assessment import Assessment
from resilientllm_operator.capacity import is_outdated
from resilientllm_operator.draining import departing
from resilientllm_operator.names import Role, Slot, slots
from resilientllm_operator.succession import departures
from resilientllm_operator.trouble import pod_trouble
from resilientllm_operator.world import Contact, EngineView, World


def limits_of(policy: RecoveryPolicy) -> Limits:
    return Limits(
        heartbeat_interval_seconds=parse_seconds(policy.heartbeat_interval),
        heartbeat_timeout_seconds=parse_seconds(policy.heartbeat_timeout),
        sick_after_seconds=parse_seconds(policy.sick_after),
        step_floor_seconds=parse_seconds(policy.step_timeout),
        wait_for_donor_seconds=max(parse_seconds(policy.wait_for_donor), 0.001),
    )


def stage_addresses(world: World) -> dict[StageId, str]:
    """Where every stage listens: the pod that fills its slot. :mod:`succession` says when another one does."""
    addresses: dict[StageId, str] = {}
    for slot in slots(world.instances, world.object.spec.stages):
        pod = world.current(slot)
        if slot.role is Role.STAGE and pod is not None and pod.ip is not None:
            addresses[slot.stage_id] = f"{pod.ip}:{STAGE_PORT}"
    return addresses


def desired_plans(
    world: World, donors: Donors, drain: DrainStatus | None, assessment: Assessment
) -> tuple[PlanStatus | None, Mapping[int, Plan]]:
    """The plans, and the version that names them; the old version as long as nothing in them has changed.

    The version is raised above everything that any engine reports, so that engines listen even to an operator
    whose memory (the status) was lost.
    """
    obj, addresses = world.object, stage_addresses(world)
    restrained = assessment.restraint is not None
    leaving, lost = departures(world, assessment.signals, restrained, lambda pod: bool(pod_trouble(pod, obj.namespace)))
    gone = {"leaving": tuple(sorted(leaving, key=str)), "lost": tuple(sorted(lost, key=str))}

    def plans_of(version: int) -> dict[int, Plan]:
        name = f"{obj.namespace}/{obj.name}"
        limits, replication = limits_of(obj.spec.recovery), obj.spec.replication.mode
        plans = make_plans(name, version, world.instances, obj.spec.stages, addresses, limits, replication, donors)
        return {instance: _with_drain(world, plan.model_copy(update=gone), drain) for instance, plan in plans.items()}

    unversioned = plans_of(1)
    if not unversioned:
        return obj.status.plan, {}
    digest = _digest(unversioned)
    published = obj.status.plan
    reported = max((view.state.plan_version for view in world.engines.values() if view.state), default=0)
    if published is not None and published.hash == digest and published.version >= reported:
        status = published
    else:
        status = PlanStatus(version=max(published.version if published else 0, reported) + 1, hash=digest)
    return status, plans_of(status.version)


def publications(world: World, plans: Mapping[int, Plan]) -> Iterator[PublishPlan]:
    """The engines that hold another plan than they should."""
    for instance, plan in plans.items():
        pod = world.engine_pod(instance)
        state = world.engine(pod).state
        if pod is None or not pod.ip or state is None or state.plan_version == plan.version:
            continue
        if state.plan_version or _may_attach(world, instance):
            yield PublishPlan(pod.uid, pod.ip, plan)


def _with_drain(world: World, plan: Plan, drain: DrainStatus | None) -> Plan:
    """What the others need to know of the instance that gives way, and what it must know itself."""
    if drain is None or (plan.instance == drain.instance and drain.deleted_at is not None):
        return plan
    if plan.instance == drain.instance:
        return plan.model_copy(update={"draining": True})
    leaving = sorted({*plan.leaving, *departing(world, drain)}, key=str)
    return plan.model_copy(update={"leaving": tuple(leaving)})


def _may_attach(world: World, instance: int) -> bool:
    """Whether an engine that has no plan yet may take the instance over.

    Its term is higher than that of the engine before it, whose streams would end with its first word to a stage. And
    stages that were made from another spec than the engine would be refused, where those that follow them will not.
    """
    if any(
        _is_busy(world.engine(pod)) for pod in world.leaving(Slot(instance, Role.ENGINE)) if pod.ip and not pod.ended
    ):
        return False
    own = (world.current(Slot(instance, Role.STAGE, stage)) for stage in range(world.object.spec.stages))
    return world.object.paused or not any(pod is not None and is_outdated(world, pod) for pod in own)


def _is_busy(view: EngineView) -> bool:
    if view.state is None:
        return view.contact is Contact.UNKNOWN
    return bool(view.state.requests_running or view.state.requests_waiting)


def _digest(plans: Mapping[int, Plan]) -> str:
    text = json.dumps([plans[key].model_dump(mode="json", by_alias=True) for key in sorted(plans)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
