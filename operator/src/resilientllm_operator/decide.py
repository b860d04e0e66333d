"""Decide: from the observed world and the time to a list of actions. Pure; the heart of the operator.

Level-triggered: the same world gives the same actions, however it came about. What must outlive the operator is
in the object's status: which plan was published, what was given up, which engine proved itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from resilientllm_api.crd import DrainStatus, HoldStatus, InstanceStatus, PlanStatus, ResilientLLMStatus
from resilientllm_api.plan import Plan

from resilientllm_operator import capacity, draining, planning, routing
from resilientllm_operator.actions import (
    Action,
    ApplyBudget,
    ApplyEndpoints,
    ApplyService,
    CreatePod,
    CreateToken,
    DeletePod,
    VerifyEngine,
    WriteStatus,
    in_words,
)
from resilientllm_operator.announcements import announcements
from resilientllm_operator.assessment import Assessment, assess, with_findings
from resilientllm_operator.breaker import Restraint
from resilientllm_operator.budgets import budget_essence, build_budgets
from resilientllm_operator.changing import change
from resilientllm_operator.conditions import conditions
from resilientllm_operator.failure_domains import ranked_donors
from resilientllm_operator.instances import KEEPS_VERIFICATION, incarnation, instance_statuses
from resilientllm_operator.names import common_labels, token_secret_name
from resilientllm_operator.pods import owner_references, served_name
from resilientllm_operator.recoveries import last_loss, recovery_record
from resilientllm_operator.trouble import troubles_of
from resilientllm_operator.world import Owner, World


def decide(world: World, now: datetime) -> list[Action]:
    """What to do, in order. An action that fails ends the round: a later one may rely on it."""
    if world.object.deleting:
        return []  # The garbage collector deletes what the object owns; making more would be a race with it.
    assessment, world = assess(world, now)
    intent = _intent(world, assessment, now)
    changes: list[CreateToken | CreatePod | DeletePod] = [*_token(world)]
    if world.token is not Owner.FOREIGN:
        expendable = draining.expendable(world, intent.able, intent.drain)
        changes += capacity.pod_changes(world, intent.hold, expendable, assessment, now)
    would_do: tuple[str, ...] = ()
    if assessment.restraint is Restraint.OBSERVING:
        would_drain = draining.drain_of(world, intent.able, intent.hold, False, now)
        would_do = tuple([*map(in_words, changes), *draining.in_words(would_drain)])
        changes = []
    status = _status(world, assessment, intent, would_do, now)
    endpoints = [*_endpoints(world, intent.instances)]
    gains = all(routing.only_adds(world.endpoints, each.manifest) for each in endpoints)
    return [
        # A dead engine must leave the Service before anything else is done about it. One that has proved itself comes
        # in when that is written down: an operator that ends in between would have it leave again.
        *([] if gains else endpoints),
        *_service(world),
        *_record(world, status),
        *(endpoints if gains else []),
        # After the record: a version must never name two plans, so it is written down before it is used. So are pairs.
        *planning.publications(world, intent.plans),
        *_verifications(world),
        *_budgets(world),
        *changes,
    ]


@dataclass(frozen=True)
class _Intent:
    """What is meant to become of the instances, before it is put into actions."""

    able: tuple[InstanceStatus, ...]
    """As if none gave way."""
    hold: HoldStatus | None
    drain: DrainStatus | None
    instances: tuple[InstanceStatus, ...]
    """As they are told."""
    plan: PlanStatus | None
    plans: Mapping[int, Plan]


def _intent(world: World, assessment: Assessment, now: datetime) -> _Intent:
    donors = ranked_donors(world)
    able = with_findings(world, instance_statuses(world, donors, now), assessment)
    hold = capacity.hold_of(world, now)
    drain = draining.drain_of(world, able, hold, assessment.restraint is not None, now)
    plan, plans = planning.desired_plans(world, donors, drain, assessment)
    return _Intent(able, hold, drain, draining.shown(world, able, drain), plan, plans)


def _status(
    world: World, assessment: Assessment, intent: _Intent, would_do: tuple[str, ...], now: datetime
) -> ResilientLLMStatus:
    recoveries = recovery_record(world)
    wanted = intent.instances[: world.object.spec.instances]
    troubles = troubles_of(world, intent.hold, wanted, assessment, now)
    changing = change(world, intent.able, intent.hold, troubles, intent.drain, now)
    return ResilientLLMStatus(
        observed_generation=world.object.generation,
        conditions=conditions(world, wanted, troubles, now, intent.drain, changing, would_do),
        ready=f"{sum(each.serving for each in wanted)}/{len(wanted)}",
        endpoint=routing.endpoint_url(world.object),
        instances=intent.instances,
        last_recovery=last_loss(recoveries) or world.object.status.last_recovery,
        recoveries=recoveries,
        plan=intent.plan,
        hold=intent.hold,
        drain=intent.drain,
        failures=assessment.failures,
        nodes=assessment.nodes,
        breaker=assessment.breaker,
        would_do=would_do,
    )


def _record(world: World, status: ResilientLLMStatus) -> Iterator[Action]:
    if status != world.object.status:
        # Events first: once the status is written, nobody can see what changed with it.
        for announce in announcements(world.object.status, status):
            yield replace(announce, about=announce.about or _digest(world.object.status))
        yield WriteStatus(status, world.object.resource_version)


def _digest(status: ResilientLLMStatus) -> str:
    return hashlib.sha256(status.model_dump_json().encode()).hexdigest()


def _endpoints(world: World, instances: tuple[InstanceStatus, ...]) -> Iterator[ApplyEndpoints]:
    if world.endpoints_owner is not Owner.FOREIGN:
        endpoints = routing.build_endpoints(world, instances)
        if world.endpoints != routing.endpoints_essence(endpoints):
            yield ApplyEndpoints(endpoints)


def _service(world: World) -> Iterator[ApplyService]:
    if world.service_owner is not Owner.FOREIGN:
        service = routing.build_service(world.object)
        if world.service != routing.service_essence(service):
            yield ApplyService(service)


def _token(world: World) -> Iterator[CreateToken]:
    if world.token is Owner.NOBODY:
        obj = world.object
        yield CreateToken(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "type": "Opaque",
                "metadata": {
                    "name": token_secret_name(obj.name),
                    "namespace": obj.namespace,
                    "labels": common_labels(obj.name),
                    "ownerReferences": owner_references(obj.name, obj.uid),
                },
            }
        )


def _budgets(world: World) -> Iterator[Action]:
    """Before the pods that they are about."""
    for budget in build_budgets(world.object):
        name = budget["metadata"]["name"]
        if name not in world.budgets or world.budgets[name] not in (None, budget_essence(budget)):
            yield ApplyBudget(budget)


def _verifications(world: World) -> Iterator[Action]:
    """Nothing is called recovered, or ready, before it has served a real token."""
    for instance in range(world.object.spec.instances):
        pod = world.engine_pod(instance)
        state = world.engine(pod).state
        if pod is None or not pod.ip or state is None:
            continue
        name = incarnation(pod, state)
        if state.serving and state.phase in KEEPS_VERIFICATION and world.engine(pod).verified != name:
            yield VerifyEngine(pod.uid, pod.ip, name, served_name(world.object))
