"""The operator against a simulated cluster and engines that obey: whatever happens, in whatever order.

After every round the invariants of this file hold; when the faults stop, everything comes back to Ready by itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from resilientllm_api.crd import RETRY_ANNOTATION, ConditionStatus, ConditionType, RecoveryMode
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Action, CreatePod, CreateToken, DeletePod, PublishPlan, WriteStatus
from resilientllm_operator.decide import decide
from resilientllm_operator.draining import is_to_go
from resilientllm_operator.names import Role, Slot, slots
from resilientllm_operator.succession import PATIENCE
from resilientllm_operator.world import World

from tests.operator.builders import NOW, obj, spec
from tests.operator.kstatus import Kstatus, kstatus
from tests.operator.recorded import as_json, recorded
from tests.operator.simulation import SICK, Simulation

ZONE = "topology.kubernetes.io/zone"
NODES = 6
QUIET_ROUNDS = 8
"""So many rounds without time passing settle whatever there is to do at one moment."""
FAULTY = "GpuMemWatch"
NAMES = st.sampled_from([f"n{i}" for i in range(NODES)])
WAITS = st.sampled_from([0, 5, 25, 60])
"""Seconds, after a fault: for the next one at once, amidst what follows, and after that."""


class OperatorModel(RuleBasedStateMachine):
    @initialize(instances=st.integers(2, 3), by_zone=st.booleans())
    def create(self, instances: int, by_zone: bool) -> None:
        self.changes: dict[str, Any] = {"instances": instances}
        if by_zone:
            self.changes["replication"] = {"topologyKey": ZONE}
        self.sim = Simulation(obj(spec=spec(**self.changes)), NODES, NOW)
        self.versions: dict[int, dict[StageId, str]] = {}
        for _ in range(12):
            self.tick(5.0)

    # The operator.

    def round(self, most: int | None = None) -> list[Action]:
        """One round; the operator dies after ``most`` actions."""
        world = self.sim.world()
        actions = decide(world, self.sim.now)
        self.check_status(world, actions)
        for action in actions if most is None else actions[:most]:
            self.check(action)
            self.sim.perform(action)
        return actions

    def check_status(self, world: World, actions: list[Action]) -> None:
        """Tools that wait by kstatus are told that it is done when every pod is of the present spec, and serves."""
        status = next((each.status for each in actions if isinstance(each, WriteStatus)), world.object.status)
        true = {each.type for each in status.conditions if each.status is ConditionStatus.TRUE}
        assert not {ConditionType.RECONCILING, ConditionType.STALLED} <= true, "told to wait and not to wait"
        if kstatus(recorded(world, as_json(status))) is Kstatus.CURRENT:
            assert [pod.name for pod in world.pods if is_to_go(world, pod) and not pod.leaving] == []
            assert status.ready == f"{world.object.spec.instances}/{world.object.spec.instances}"

    def check(self, action: Action) -> None:
        """What must be true of every action, before it is done."""
        observes = self.sim.object.spec.recovery.mode is RecoveryMode.OBSERVE
        assert not (observes and isinstance(action, CreatePod | DeletePod | CreateToken)), f"{action} while observing"
        if isinstance(action, PublishPlan):
            addresses = {ref.id: ref.address for refs in (action.plan.stages, *action.plan.donors) for ref in refs}
            known = self.versions.setdefault(action.plan.version, {})
            for stage, address in addresses.items():
                assert known.setdefault(stage, address) == address, f"{stage} has two addresses in one version"
            named = self.sim.object.status.plan
            assert named is not None and named.version == action.plan.version, "used before it was written down"
        if isinstance(action, DeletePod) and " has pod " in action.why:
            self.check_hand_over(action)

    def check_hand_over(self, action: DeletePod) -> None:
        """The older of two pods is deleted only when nobody is served by it, or it is not to be trusted."""
        pod = self.sim.pods[action.name]
        if self.sim.is_loaded(pod) and self.sim.users(pod):
            assert self.is_excused(action.name), f"{action.name} serves {self.sim.users(pod)}: {action.why}"

    def is_excused(self, name: str) -> bool:
        pod = self.sim.pods[name].view
        heirs = [each.view for each in self.sim.slot_pods(pod.slot) if each.view.name != name]
        late = any(each.ready_since and each.ready and self.sim.now - each.ready_since >= PATIENCE for each in heirs)
        return bool(pod.ailments) or pod.leaving or late

    @rule(seconds=st.sampled_from([1.0, 5.0, 30.0]))
    def tick(self, seconds: float) -> None:
        self.sim.pass_time(seconds)
        self.round()

    def go_on(self, seconds: int) -> None:
        for _ in range(seconds // 5):
            self.tick(5.0)

    @rule(most=st.integers(0, 8), away=st.sampled_from([0, 1, 30]))
    def die_between_two_actions(self, most: int, away: int) -> None:
        self.sim.pass_time(1.0)
        self.round(most)
        self.sim.pass_time(away)
        self.sim.heard.clear()  # The next operator has heard of no engine, and knows only what is in the status.
        self.round()

    # What befalls the cluster, and how long nothing else does.

    @rule(data=st.data(), wait=WAITS)
    def kill_a_process(self, data: st.DataObject, wait: int) -> None:
        self.sim.kill(data.draw(st.sampled_from(sorted(self.sim.pods))))
        self.go_on(wait)

    @rule(data=st.data())
    def kill_a_process_again_and_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sim.pods)))
        for _ in range(3):
            if name in self.sim.pods:
                self.sim.kill(name)
                self.go_on(30)

    @rule(name=NAMES, wait=WAITS)
    def kill_a_node(self, name: str, wait: int) -> None:
        if sum(not node.alive for node in self.sim.nodes.values()) < 2:
            self.sim.kill_node(name)
        self.go_on(wait)

    @rule(name=NAMES, wait=WAITS)
    def heal_a_node(self, name: str, wait: int) -> None:
        self.sim.heal_node(name)
        self.sim.cordon(name, False)
        self.say(name, "False")
        self.go_on(wait)

    @rule(data=st.data(), wait=WAITS)
    def cordon(self, data: st.DataObject, wait: int) -> None:
        self.sim.cordon(data.draw(st.sampled_from(self.sim.used_nodes())))
        self.go_on(wait)

    @rule(data=st.data(), wait=WAITS)
    def drain(self, data: st.DataObject, wait: int) -> None:
        name = data.draw(st.sampled_from(self.sim.used_nodes()))
        self.sim.cordon(name)
        for pod in [pod for pod, each in self.sim.pods.items() if each.view.node == name]:
            self.sim.end(pod)
        self.go_on(wait)

    @rule(data=st.data(), wait=WAITS)
    def say_that_a_node_is_faulty(self, data: st.DataObject, wait: int) -> None:
        self.say(data.draw(st.sampled_from(self.sim.used_nodes())), "True")
        self.go_on(wait)

    def say(self, node: str, status: str) -> None:
        known = self.sim.nodes[node].view.conditions.get(FAULTY)
        if known is None or known.status != status:
            self.sim.nodes[node].say(FAULTY, status, self.sim.now)

    @precondition(lambda self: self.sim.stage_pods())
    @rule(data=st.data(), wait=WAITS)
    def sicken_a_device(self, data: st.DataObject, wait: int) -> None:
        pod = self.sim.pods[data.draw(st.sampled_from(self.sim.stage_pods()))]
        pod.view = replace(pod.view, ailments=(SICK,))
        self.go_on(wait)

    # What people do.

    def edit(self, **changes: Any) -> None:
        self.changes |= changes
        old = self.sim.object
        self.sim.object = replace(old, spec=spec(**self.changes), generation=old.generation + 1)

    @rule(instances=st.integers(1, 3))
    def scale(self, instances: int) -> None:
        self.edit(instances=instances)

    @rule(length=st.sampled_from([64, 128]))
    def change_the_flags(self, length: int) -> None:
        self.edit(args=[f"--max-model-len={length}"])

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.sim.object = replace(self.sim.object, paused=paused)

    @rule(mode=st.sampled_from(["Act", "Observe"]), wait=WAITS)
    def observe(self, mode: str, wait: int) -> None:
        self.edit(recovery={"mode": mode})
        self.go_on(wait)

    @precondition(lambda self: self.sim.object.status.breaker is not None)
    @rule()
    def reset_the_breaker(self) -> None:
        self.sim.object = replace(self.sim.object, retry=f"{RETRY_ANNOTATION} at {self.sim.now}")

    # Invariants.

    @invariant()
    def what_works_is_not_taken_away(self) -> None:
        taken, self.sim.taken_away = self.sim.taken_away, []
        assert all(name not in self.sim.pods or self.is_excused(name) for name in taken), taken

    @invariant()
    def a_slot_has_at_most_two_pods_that_are_to_stay(self) -> None:
        live = Counter(pod.view.slot for pod in self.sim.pods.values() if not pod.view.leaving)
        assert max(live.values(), default=0) <= 2, live

    @invariant()
    def no_two_copies_of_a_stage_share_a_node(self) -> None:
        places = Counter(
            (pod.view.slot.stage, pod.view.node)
            for pod in self.sim.pods.values()
            if pod.view.slot.role is Role.STAGE and pod.view.node is not None
        )
        assert max(places.values(), default=0) <= 1, places

    @invariant()
    def deciding_again_gives_nothing(self) -> None:
        """At one moment everything is decided once; and what is done is not undone."""
        made: set[str] = set()
        for _ in range(QUIET_ROUNDS):
            actions = self.round()
            made |= {each.name for each in actions if isinstance(each, CreatePod)}
            assert not {each.name for each in actions if isinstance(each, DeletePod)} & made
            if not actions:
                return
        raise AssertionError(f"still {actions} after {QUIET_ROUNDS} rounds")

    @invariant()
    def who_can_serve_has_an_endpoint(self) -> None:
        endpoints = (self.sim.services.get("endpoints") or {"endpoints": []})["endpoints"]
        ready = {each["targetRef"]["name"] for each in endpoints if each["conditions"]["ready"]}
        drain = self.sim.object.status.drain
        for instance in range(self.sim.object.spec.instances):
            pods = {
                pod.view.name: pod for pod in self.sim.slot_pods(Slot(instance, Role.ENGINE)) if not pod.view.leaving
            }
            told = ready & pods.keys()
            gives_way = drain is not None and drain.instance == instance
            if not self.sim.can_serve(instance) or gives_way or len(pods) > 1:
                continue
            assert told, f"instance {instance} can serve and gets no requests"
        for pod in self.sim.pods.values():
            heard = pod.view.uid in self.sim.heard
            if pod.view.slot.role is Role.ENGINE and heard and not self.sim.works(pod):
                assert pod.view.name not in ready, f"{pod.view.name} is dead and gets requests"

    @invariant()
    def pairs_are_apart_if_they_can_be(self) -> None:
        status = self.sim.object.status
        wanted = self.sim.object.spec.instances
        for place in range(self.sim.object.spec.stages):
            domains = {}
            for instance in status.instances[:wanted]:
                node = self.sim.nodes.get(instance.stages[place].node or "")
                domains[instance.instance] = node and node.zone if "replication" in self.changes else node and node.name
            if len(status.instances) != wanted or None in domains.values() or wanted < 2:
                continue
            risky = sum(
                domains[instance.instance] == domains[StageId.parse(instance.stages[place].pair or "").instance]
                for instance in status.instances
            )
            best = min(
                sum(domains[i] == domains[j] for i, j in enumerate(order))
                for order in permutations(range(wanted))
                if all(i != j for i, j in enumerate(order))
            )
            assert risky == best, f"{risky} pairs of place {place} share a domain, where {best} need to"

    def teardown(self) -> None:
        """The faults stop: everything comes back by itself."""
        if not hasattr(self, "sim"):
            return
        self.sim.object = replace(self.sim.object, paused=False)
        self.edit(recovery={})
        for name in self.sim.nodes:
            self.sim.heal_node(name)
            self.sim.cordon(name, False)
            self.say(name, "False")
        for pod in self.sim.pods.values():
            pod.view = replace(pod.view, ailments=())
        # A node that is avoided is so for an hour, and the spec has time to be rolled out.
        deadline = self.sim.now + timedelta(hours=1, minutes=20)
        self.tick(20.0)  # Until then the status speaks of the time before.
        while not (done := self.is_done()) and self.sim.now < deadline:
            self.tick(20.0)
        conditions = {each.type: (each.status, each.reason, each.message) for each in self.sim.object.status.conditions}
        assert done, conditions
        for _ in range(QUIET_ROUNDS):
            self.tick(20.0)
        assert self.is_done(), "it does not last"

    def is_done(self) -> bool:
        status = self.sim.object.status
        conditions = {each.type: str(each.status) for each in status.conditions}
        rest = {"Ready": "True", "Degraded": "False", "Progressing": "False", "Recovering": "False", "Stalled": "False"}
        wanted = slots(self.sim.object.spec.instances, self.sim.object.spec.stages)
        alone = Counter(pod.view.slot for pod in self.sim.pods.values()) == Counter(wanted)
        return alone and all(conditions.get(kind) == value for kind, value in rest.items())


OperatorModel.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestOperatorModel = OperatorModel.TestCase
