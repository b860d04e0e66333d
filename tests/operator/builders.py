"""A world in which all is well, and small ways to spoil it: a test states only what differs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from resilientllm_api.crd import ResilientLLMSpec, ResilientLLMStatus
from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState, StageServing
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Action, ApplyBudget, ApplyEndpoints, ApplyService, WriteStatus
from resilientllm_operator.budgets import budget_essence
from resilientllm_operator.decide import decide
from resilientllm_operator.instances import incarnation
from resilientllm_operator.names import Role, Slot, pod_name, slots
from resilientllm_operator.pods import spec_hash
from resilientllm_operator.routing import endpoints_essence, service_essence
from resilientllm_operator.world import (
    Contact,
    EngineView,
    NodeCondition,
    NodeView,
    ObjectView,
    Owner,
    PodView,
    World,
)

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
A = TypeVar("A")
UID = "0b7c3f9e-0000-4000-8000-000000000001"


def spec(**changes: Any) -> ResilientLLMSpec:
    return ResilientLLMSpec.model_validate(
        {
            "image": "resilientllm/worker:dev",
            "model": {
                "path": "/models/tiny",
                "volume": {"persistentVolumeClaim": {"claimName": "models"}},
            },
            "instances": 2,
            "stages": 2,
        }
        | changes
    )


def obj(status: ResilientLLMStatus | None = None, **changes: Any) -> ObjectView:
    view = ObjectView(
        name="tiny", namespace="default", uid=UID, generation=1, spec=spec(), status=status or ResilientLLMStatus()
    )
    return replace(view, **changes)


def new_world(**spec_changes: Any) -> World:
    """Just created: nothing exists but the object."""
    return World(object=obj(spec=spec(**spec_changes)))


def pod(owner: ObjectView, slot: Slot, **changes: Any) -> PodView:
    """The ready pod of a slot."""
    number = 10 * slot.instance + (9 if slot.role is Role.ENGINE else slot.stage_id.stage)
    view = PodView(
        name=pod_name(owner.name, owner.uid, slot, ()),
        uid=f"uid-{number}",
        slot=slot,
        spec_hash=spec_hash(owner, slot),
        created=NOW - timedelta(minutes=5),
        ip=f"10.0.0.{number + 1}",
        node=f"node-{number % 3}",
        ready=True,
    )
    return replace(view, **changes)


def engine_state(instance: int, stages: int = 2, **changes: Any) -> EngineState:
    """An engine that serves on its own stages, whose KV blocks another instance's keep."""
    serving = tuple(
        StageServing(stage=k, served_by=StageId(instance=instance, stage=k), own_connected=True, donors_connected=1)
        for k in range(stages)
    )
    state = EngineState(
        instance=instance,
        phase=EnginePhase.SERVING,
        term=1,
        plan_version=1,
        serving=True,
        on_own_stages=True,
        stages=serving,
        replication=tuple(keeping(instance, k) for k in range(stages)),
        block_tokens=16,
    )
    return state.model_copy(update=changes)


def keeping(instance: int, place: int, **changes: Any) -> ReplicationState:
    """A place whose KV blocks are kept by the stage of another instance, without lag."""
    keeper = StageId(instance=(instance + 1) % 2, stage=place)
    return ReplicationState(stage=place, kept_by=keeper, healthy=True).model_copy(update=changes)


def with_place(state: EngineState, place: int, **changes: Any) -> EngineState:
    """Changes how one place of an engine is replicated."""
    places = tuple(each.model_copy(update=changes) if each.stage == place else each for each in state.replication)
    return state.model_copy(update={"replication": places})


def borrowed(instance: int, stage: int, donor: int, stages: int = 2, **changes: Any) -> EngineState:
    """An engine one of whose stages is served by a donor."""
    state = engine_state(instance, stages)
    serving = tuple(
        each.model_copy(update={"served_by": StageId(instance=donor, stage=stage), "own_connected": False})
        if each.stage == stage
        else each
        for each in state.stages
    )
    degraded = {"phase": EnginePhase.DEGRADED, "on_own_stages": False, "stages": serving}
    nobody = with_place(state, stage, kept_by=None, healthy=False, message=f"no other stage {stage} can keep copies")
    return nobody.model_copy(update=degraded | changes)


def answering(state: EngineState, engine_pod: PodView, verified: bool = True) -> EngineView:
    name = incarnation(engine_pod, state) if verified else None
    return EngineView(contact=Contact.ANSWERS, state=state, verified=name)


def with_pods(world: World) -> World:
    """All pods run; the engines do not answer yet."""
    owner = world.object
    pods = tuple(pod(owner, slot) for slot in slots(owner.spec.instances, owner.spec.stages))
    return replace(world, pods=pods, token=Owner.OURS)


def healthy_world(**spec_changes: Any) -> World:
    """All instances serve and are verified, and everything that can be written down is written down."""
    world = settled(with_pods(new_world(**spec_changes)))
    for instance in range(world.object.spec.instances):
        world = with_engine(world, instance, engine_state(instance, world.object.spec.stages))
    return settled(world)


def with_engine(world: World, instance: int, state: EngineState, verified: bool = True) -> World:
    engine_pod = world.engine_pod(instance)
    assert engine_pod is not None
    return replace(world, engines={**world.engines, engine_pod.uid: answering(state, engine_pod, verified)})


def silent(world: World, instance: int) -> World:
    engine_pod = world.engine_pod(instance)
    assert engine_pod is not None
    return replace(world, engines={**world.engines, engine_pod.uid: EngineView(contact=Contact.SILENT)})


def with_pod(world: World, slot: Slot, **changes: Any) -> World:
    """Changes the pod of a slot."""
    return replace(world, pods=tuple(replace(p, **changes) if p.slot == slot else p for p in world.pods))


def without_pod(world: World, slot: Slot) -> World:
    return replace(world, pods=tuple(p for p in world.pods if p.slot != slot))


def with_nodes(world: World, *names: str) -> World:
    """The operator sees nodes: those of the pods, one that is free, and ``names``; all are well."""
    known = {pod.node for pod in world.pods if pod.node} | {"node-free", *names}
    return replace(world, nodes={name: NodeView(name, conditions={"Ready": NodeCondition("True")}) for name in known})


def with_node(world: World, name: str, **changes: Any) -> World:
    """Changes one node."""
    seen = world if world.nodes else with_nodes(world)
    return replace(seen, nodes={**seen.nodes, name: replace(seen.nodes[name], **changes)})


def with_condition(world: World, node: str, kind: str, status: str = "True", **changes: Any) -> World:
    """Says something of a node."""
    seen = world if world.nodes else with_nodes(world)
    conditions = {**seen.nodes[node].conditions, kind: NodeCondition(status, **changes)}
    return with_node(seen, node, conditions=conditions)


def without_node(world: World, name: str) -> World:
    seen = world if world.nodes else with_nodes(world)
    return replace(seen, nodes={known: node for known, node in seen.nodes.items() if known != name})


def with_status(world: World, status: ResilientLLMStatus) -> World:
    return replace(world, object=replace(world.object, status=status))


def with_spec(world: World, **changes: Any) -> World:
    """The user edits the spec."""
    changed = replace(world.object, spec=spec(**changes), generation=world.object.generation + 1)
    return replace(world, object=changed)


def settled(world: World, at: datetime = NOW) -> World:
    """The world after everything that was decided about routes and status has been done."""
    for action in decide(world, at):
        match action:
            case WriteStatus(status):
                world = with_status(world, status)
            case ApplyService(manifest):
                world = replace(world, service_owner=Owner.OURS, service=service_essence(manifest))
            case ApplyBudget(manifest):
                budget = {manifest["metadata"]["name"]: budget_essence(manifest)}
                world = replace(world, budgets={**world.budgets, **budget})
            case ApplyEndpoints(manifest):
                world = replace(world, endpoints_owner=Owner.OURS, endpoints=endpoints_essence(manifest))
    return world


def stage(instance: int, number: int) -> Slot:
    return Slot(instance, Role.STAGE, number)


def engine(instance: int) -> Slot:
    return Slot(instance, Role.ENGINE)


def of_type(actions: Iterable[Action], *kinds: type[A]) -> list[A]:
    return [action for action in actions if isinstance(action, kinds)]


def decided(world: World, at: datetime = NOW) -> list[Action]:
    return decide(world, at)


def status_of(world: World, at: datetime = NOW) -> ResilientLLMStatus:
    """The status that is decided upon, or the one that stands."""
    written = of_type(decide(world, at), WriteStatus)
    return written[0].status if written else world.object.status


def condition(world: World, kind: str) -> tuple[str, str, str]:
    """Status, reason and message of a condition."""
    (found,) = [each for each in status_of(world).conditions if each.type == kind]
    return found.status, found.reason, found.message
