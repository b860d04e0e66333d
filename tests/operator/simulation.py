"""A cluster and engines that obey: Kubernetes and vLLM in a few hundred lines, for the model test of the operator.

Engines choose their stages with the worker's own function (:mod:`resilientllm_worker.engine.topology`), so what the
operator plans meets what engines make of it. Time passes only in :meth:`Simulation.pass_time`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState, StageServing
from resilientllm_api.plan import Plan, StageId
from resilientllm_operator.actions import (
    Action,
    ApplyBudget,
    ApplyEndpoints,
    ApplyService,
    CreatePod,
    CreateToken,
    DeletePod,
    PublishPlan,
    VerifyEngine,
    WriteStatus,
)
from resilientllm_operator.budgets import budget_essence
from resilientllm_operator.names import SPEC_HASH_ANNOTATION, Role, Slot, slot_of
from resilientllm_operator.node_affinity import nodes_kept_off
from resilientllm_operator.routing import endpoints_essence, service_essence
from resilientllm_operator.world import (
    Ailment,
    Contact,
    EngineView,
    Exit,
    NodeCondition,
    NodeView,
    ObjectView,
    Owner,
    PodView,
    World,
)
from resilientllm_worker.engine.topology import Assignment, Sight, assign, is_complete, is_home, keepers

LOADS = timedelta(seconds=20)
NOTICED = timedelta(seconds=40)
"""So long Kubernetes takes to say that a node is not Ready."""
EVICTED = timedelta(seconds=30)
"""After that, pods there are told to end."""
GRACE = timedelta(seconds=60)
SICK = Ailment("nvidia.com/gpu", "GPU-0", certain=True)


@dataclass
class Node:
    name: str
    zone: str
    alive: bool = True
    died: datetime | None = None
    view: NodeView = field(init=False)

    def __post_init__(self) -> None:
        labels = {"topology.kubernetes.io/zone": self.zone}
        self.view = NodeView(self.name, labels=labels, conditions={"Ready": NodeCondition("True")})

    def say(self, kind: str, status: str, since: datetime) -> None:
        conditions = {**self.view.conditions, kind: NodeCondition(status, since=since)}
        self.view = replace(self.view, conditions=conditions)


@dataclass
class Pod:
    view: PodView
    runs_since: datetime | None = None
    """When the process began to load; None while it does not run."""


@dataclass
class Engine:
    """Lives as long as its pod; its process may be another."""

    term: int
    plan: Plan | None = None
    attached: bool = False
    current: Assignment = ()
    keeping: Assignment = ()
    caught_up: dict[StageId, str] = field(default_factory=dict)
    """Stages that have all copies of what they may take over, and the address that had."""
    verified: str | None = None


class Simulation:
    def __init__(self, obj: ObjectView, nodes: int, now: datetime) -> None:
        self.now = now
        self.object = obj
        self.nodes = {f"n{i}": Node(f"n{i}", zone="abc"[i % 3]) for i in range(nodes)}
        self.pods: dict[str, Pod] = {}
        self.engines: dict[str, Engine] = {}
        self.services: dict[str, Any] = {}
        self.token = Owner.NOBODY
        self.heard: set[str] = set()
        """Engines that this operator has heard of since it started."""
        self.taken_away: list[str] = []
        """Stages that worked and served, and were lost by what the operator did."""
        self._made = 0
        self._terms = 0

    # What the operator sees.

    def world(self) -> World:
        return World(
            object=self.object,
            pods=tuple(sorted((pod.view for pod in self.pods.values()), key=lambda view: (view.slot, view.name))),
            nodes={name: node.view for name, node in self.nodes.items()},
            engines=dict(self._engine_views()),
            token=self.token,
            service_owner=Owner.OURS if "service" in self.services else Owner.NOBODY,
            service=self.services.get("service"),
            endpoints_owner=Owner.OURS if "endpoints" in self.services else Owner.NOBODY,
            endpoints=self.services.get("endpoints"),
            budgets={
                name.removeprefix("budget/"): each for name, each in self.services.items() if name.startswith("budget/")
            },
        )

    def _engine_views(self) -> Iterator[tuple[str, EngineView]]:
        for pod in self.pods.values():
            if pod.view.slot.role is Role.ENGINE and pod.view.ip and not pod.view.ended:
                yield pod.view.uid, self.engine_view(pod)

    def engine_view(self, pod: Pod) -> EngineView:
        remembered = next(
            (each.verified for each in self.object.status.instances if (each.verified or "").startswith(pod.view.uid)),
            None,
        )
        if pod.view.uid not in self.heard:
            return EngineView(verified=remembered)
        if not self.works(pod):
            return EngineView(contact=Contact.SILENT)
        engine = self.engines[pod.view.uid]
        return EngineView(contact=Contact.ANSWERS, state=self.state(pod), verified=engine.verified)

    def state(self, pod: Pod) -> EngineState:
        engine, plan = self.engines[pod.view.uid], self.engines[pod.view.uid].plan
        serving = plan is not None and engine.attached and is_complete(engine.current)
        if plan is None:
            phase = EnginePhase.STARTING
        elif not engine.attached:
            phase = EnginePhase.ATTACHING
        elif not serving:
            phase = EnginePhase.WAITING
        else:
            phase = EnginePhase.SERVING if is_home(plan, engine.current) else EnginePhase.DEGRADED
        places = range(len(plan.stages)) if plan is not None and engine.attached else ()
        return EngineState(
            instance=pod.view.slot.instance,
            phase=phase,
            term=engine.term,
            plan_version=plan.version if plan else 0,
            serving=serving,
            on_own_stages=phase is EnginePhase.SERVING,
            stages=tuple(self._serving(engine, plan, place) for place in places if plan is not None),
            replication=tuple(self._replication(engine, place) for place in places),
        )

    def _serving(self, engine: Engine, plan: Plan, place: int) -> StageServing:
        own = plan.stages[place]
        return StageServing(
            stage=place,
            served_by=engine.current[place],
            own_connected=self._reaches(own.address),
            donors_connected=sum(self._reaches(donor.address) for donor in plan.donors[place]),
        )

    @staticmethod
    def _replication(engine: Engine, place: int) -> ReplicationState:
        return ReplicationState(stage=place, kept_by=engine.keeping[place], healthy=engine.keeping[place] is not None)

    # What is true.

    def works(self, pod: Pod) -> bool:
        """Its process runs, and can be reached."""
        node = self.nodes.get(pod.view.node or "")
        return node is not None and node.alive and pod.runs_since is not None

    def is_loaded(self, pod: Pod) -> bool:
        return self.works(pod) and pod.runs_since is not None and self.now - pod.runs_since >= LOADS

    def at(self, address: str) -> Pod | None:
        """The stage that listens there."""
        ip = address.rpartition(":")[0]
        return next((pod for pod in self.pods.values() if pod.view.ip == ip), None)

    def users(self, pod: Pod) -> list[int]:
        """The instances that a stage serves at this moment."""
        return [
            engine_pod.view.slot.instance
            for engine_pod, engine in self._engines_at_work()
            if pod.view.ip in {address.rpartition(":")[0] for address in self._used(engine).values()}
        ]

    def can_serve(self, instance: int) -> bool:
        """Whether its engine would answer a request, and says so to the operator."""
        return any(
            pod.view.slot.instance == instance and not pod.view.leaving and self.state(pod).serving and engine.verified
            for pod, engine in self._engines_at_work()
            if pod.view.uid in self.heard
        )

    def _engines_at_work(self) -> Iterator[tuple[Pod, Engine]]:
        for pod in self.pods.values():
            if pod.view.slot.role is Role.ENGINE and pod.view.uid in self.engines and self.works(pod):
                yield pod, self.engines[pod.view.uid]

    @staticmethod
    def _used(engine: Engine) -> dict[StageId, str]:
        """The stages at work in a pipeline, and where they are."""
        if engine.plan is None:
            return {}
        known = {ref.id: ref.address for refs in (engine.plan.stages, *engine.plan.donors) for ref in refs}
        return {stage: known[stage] for stage in engine.current if stage is not None and stage in known}

    def _reaches(self, address: str) -> bool:
        pod = self.at(address)
        return pod is not None and self.is_loaded(pod)

    # What the operator does.

    def perform(self, action: Action) -> None:
        match action:
            case WriteStatus(status):
                # As the API server keeps it: times and all.
                kept = type(status).model_validate(status.model_dump(mode="json", by_alias=True, exclude_none=True))
                self.object = replace(self.object, status=kept)
            case CreatePod():
                self._create(action)
            case DeletePod(name, uid):
                if name in self.pods and self.pods[name].view.uid == uid:
                    self.end(name)
            case PublishPlan(uid, _, plan):
                self._take(uid, plan)
            case VerifyEngine(uid, _, name):
                if uid in self.engines:
                    self.engines[uid].verified = name
            case ApplyService(manifest):
                self.services["service"] = service_essence(manifest)
            case ApplyEndpoints(manifest):
                self.services["endpoints"] = endpoints_essence(manifest)
            case ApplyBudget(manifest):
                self.services[f"budget/{manifest['metadata']['name']}"] = budget_essence(manifest)
            case CreateToken():
                self.token = Owner.OURS

    def _create(self, action: CreatePod) -> None:
        if action.name in self.pods:
            return  # AlreadyExists
        self._made += 1
        manifest = action.manifest
        slot = slot_of(manifest["metadata"]["labels"])
        assert slot is not None
        view = PodView(
            name=action.name,
            uid=f"uid-{self._made}",
            slot=slot,
            spec_hash=manifest["metadata"]["annotations"][SPEC_HASH_ANNOTATION],
            created=self.now,
            kept_off=nodes_kept_off(manifest["spec"]),
        )
        self.pods[action.name] = Pod(view)

    def end(self, name: str) -> None:
        """Tells a pod to end, as an eviction does too."""
        pod = self.pods[name]
        if pod.view.node is None:
            del self.pods[name]
        elif pod.view.ends_by is None:
            pod.view = replace(pod.view, leaving=True, ends_by=self.now + GRACE)

    def _take(self, uid: str, plan: Plan) -> None:
        engine = self.engines.get(uid)
        if engine is None or (engine.plan is not None and plan.version <= engine.plan.version):
            return
        before, engine.plan = self._used(engine), plan
        after = {ref.id: ref.address for refs in (plan.stages, *plan.donors) for ref in refs}
        for stage, address in before.items():
            if after.get(stage) != address:
                if self._reaches(address):
                    pod = self.at(address)
                    assert pod is not None
                    self.taken_away.append(pod.view.name)
                engine.current = tuple(None if each == stage else each for each in engine.current)

    # What happens by itself.

    def pass_time(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self._notice_nodes()
        self._schedule()
        for name in list(self.pods):
            self._run(name)
        # Twice: an engine that begins to have copies kept may move in the next moment.
        for _ in range(2):
            for pod, engine in self._engines_at_work():
                self._stitch(pod, engine)
        self.heard |= {pod.view.uid for pod in self.pods.values() if pod.view.slot.role is Role.ENGINE}

    def _notice_nodes(self) -> None:
        for node in self.nodes.values():
            ready = node.view.ready
            if node.alive and ready is not True:
                node.say("Ready", "True", self.now)
            if not node.alive and node.died is not None and self.now - node.died >= NOTICED:
                if ready is True:
                    node.say("Ready", "Unknown", self.now)
                if self.now - node.died >= NOTICED + EVICTED:
                    for name in [name for name, pod in self.pods.items() if pod.view.node == node.name]:
                        self.end(name)

    def _schedule(self) -> None:
        for pod in self.pods.values():
            if pod.view.node is not None:
                continue
            taken = {
                other.view.node
                for other in self.pods.values()
                if pod.view.slot.role is Role.STAGE
                and other.view.slot.role is Role.STAGE
                and other.view.slot.stage == pod.view.slot.stage
            }
            load = {name: sum(other.view.node == name for other in self.pods.values()) for name in self.nodes}
            free = [
                name
                for name, node in sorted(self.nodes.items(), key=lambda item: (load[item[0]], item[0]))
                if node.view.ready is True
                and not node.view.unschedulable
                and name not in taken
                and name not in pod.view.kept_off
            ]
            if free:
                number = int(pod.view.uid.removeprefix("uid-"))
                address = f"10.{number // 250}.{number % 250}.1"
                pod.view = replace(pod.view, node=free[0], ip=address, unschedulable=None)
            else:
                pod.view = replace(pod.view, unschedulable="0 nodes are available")

    def _run(self, name: str) -> None:
        pod = self.pods[name]
        node = self.nodes.get(pod.view.node or "")
        if node is None:
            return
        if not node.alive:
            pod.runs_since = None
            return  # The kubelet is gone: what it said last still stands there.
        if pod.view.leaving:
            assert pod.view.ends_by is not None
            serves = self.users(pod) if pod.view.slot.role is Role.STAGE else []
            if not serves or not self.works(pod) or self.now >= pod.view.ends_by:
                del self.pods[name]
                self.engines.pop(pod.view.uid, None)
            return
        if pod.runs_since is None:
            pod.runs_since = self.now
            if pod.view.slot.role is Role.ENGINE:
                self._terms += 1
                known = self.engines.get(pod.view.uid)
                self.engines[pod.view.uid] = Engine(self._terms, plan=known.plan if known else None)
        loaded = self.is_loaded(pod) if pod.view.slot.role is Role.STAGE else True
        if loaded != pod.view.ready:
            pod.view = replace(pod.view, ready=loaded, ready_since=self.now)

    def _stitch(self, pod: Pod, engine: Engine) -> None:
        plan = engine.plan
        if plan is None or self._is_fenced(pod, engine):
            engine.attached, engine.current, engine.keeping = False, (), ()
            return
        own = all(self._reaches(ref.address) for ref in plan.stages)
        if not engine.attached and not own:
            return
        engine.attached = True
        refs = {ref.id: ref.address for refs in (plan.stages, *plan.donors) for ref in refs}
        seen = {stage: self._sight(engine, stage, address) for stage, address in refs.items()}
        engine.current = assign(plan, seen, engine.current, 0.0, engine.keeping)
        engine.keeping = keepers(plan, seen, engine.current, engine.keeping, 0.0)
        kept = {stage: refs[stage] for stage in (*engine.keeping, *engine.current) if stage is not None}
        engine.caught_up = {stage: address for stage, address in kept.items() if self._reaches(address)}

    def _sight(self, engine: Engine, stage: StageId, address: str) -> Sight:
        pod, reached = self.at(address), self._reaches(address)
        leaving = pod is not None and pod.view.leaving
        return Sight(reached, reached, caught_up=engine.caught_up.get(stage) == address, leaving=leaving)

    def _is_fenced(self, pod: Pod, engine: Engine) -> bool:
        """Whether another engine of the instance, with a higher term, has attached."""
        return any(
            other.term > engine.term and other.attached
            for other_pod, other in self._engines_at_work()
            if other_pod.view.slot.instance == pod.view.slot.instance
        )

    # What befalls it.

    def kill(self, name: str, code: int = 137) -> None:
        """The process of a pod ends, and the kubelet starts it again."""
        pod = self.pods[name]
        if self.works(pod) and not pod.view.leaving:
            pod.runs_since = None
            ended = Exit(code, "killed", self.now.replace(microsecond=0))
            pod.view = replace(pod.view, ready=False, restarts=pod.view.restarts + 1, last_exit=ended)

    def kill_node(self, name: str) -> None:
        if self.nodes[name].alive:
            self.nodes[name].alive, self.nodes[name].died = False, self.now
            for pod in self.pods.values():
                if pod.view.node == name:
                    pod.runs_since = None

    def heal_node(self, name: str) -> None:
        self.nodes[name].alive, self.nodes[name].died = True, None

    def cordon(self, name: str, unschedulable: bool = True) -> None:
        self.nodes[name].view = replace(self.nodes[name].view, unschedulable=unschedulable)

    def stage_pods(self) -> list[str]:
        return sorted(name for name, pod in self.pods.items() if pod.view.slot.role is Role.STAGE)

    def used_nodes(self) -> list[str]:
        """Where stages are; any node, if they are nowhere."""
        used = {pod.view.node for pod in self.pods.values() if pod.view.slot.role is Role.STAGE and pod.view.node}
        return sorted(used) or sorted(self.nodes)

    def slot_pods(self, slot: Slot) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.view.slot == slot]
