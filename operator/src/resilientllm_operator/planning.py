"""Which plan every engine should hold, and which engines have to be told. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from resilientllm_api.crd import PlanStatus, RecoveryPolicy
from resilientllm_api.durations import parse_seconds
from resilientllm_api.pairing import Donors, make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_api.ports import STAGE_PORT

from resilientllm_operator.actions import PublishPlan
from resilientllm_operator.names import Role, slots
from resilientllm_operator.world import World


def limits_of(policy: RecoveryPolicy) -> Limits:
    return Limits(
        heartbeat_interval_seconds=parse_seconds(policy.heartbeat_interval),
        heartbeat_timeout_seconds=parse_seconds(policy.heartbeat_timeout),
        wait_for_donor_seconds=max(parse_seconds(policy.wait_for_donor), 0.001),
    )


def stage_addresses(world: World) -> dict[StageId, str]:
    """Where every stage listens. A pod on its way out keeps its place until its successor has an address:

    an engine that still reaches it loses nothing by that, and the plan changes once instead of twice.
    """
    addresses: dict[StageId, str] = {}
    for slot in slots(world.object.spec.instances, world.object.spec.stages):
        if slot.role is Role.STAGE:
            leaving = sorted(world.leaving(slot), key=lambda pod: pod.created, reverse=True)
            ip = next((pod.ip for pod in (*world.live(slot), *leaving) if pod.ip), None)
            if ip is not None:
                addresses[slot.stage_id] = f"{ip}:{STAGE_PORT}"
    return addresses


def desired_plans(world: World, donors: Donors) -> tuple[PlanStatus | None, Mapping[int, Plan]]:
    """The plans, and the version that names them; the old version as long as nothing in them has changed.

    The version is raised above everything that any engine reports, so that engines listen even to an operator
    whose memory (the status) was lost.
    """
    obj, addresses = world.object, stage_addresses(world)

    def plans_of(version: int) -> dict[int, Plan]:
        name = f"{obj.namespace}/{obj.name}"
        limits, replication = limits_of(obj.spec.recovery), obj.spec.replication.mode
        return make_plans(name, version, obj.spec.instances, obj.spec.stages, addresses, limits, replication, donors)

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
        if pod is not None and pod.ip and state is not None and state.plan_version != plan.version:
            yield PublishPlan(pod.uid, pod.ip, plan)


def _digest(plans: Mapping[int, Plan]) -> str:
    text = json.dumps([plans[key].model_dump(mode="json", by_alias=True) for key in sorted(plans)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
