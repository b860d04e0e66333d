"""Whatever users, engines and the operator's restarts do: capacity less one is kept, and changes come to an end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from resilientllm_operator.actions import CreatePod, DeletePod
from resilientllm_operator.decide import decide
from resilientllm_operator.draining import is_to_go
from resilientllm_operator.names import SPEC_HASH_ANNOTATION, Role, slot_of
from resilientllm_operator.world import Contact, EngineView, PodView, World

from tests.operator.builders import (
    NOW,
    answering,
    engine_state,
    healthy_world,
    pod,
    settled,
    spec,
)

MOST = 3
DRAIN = timedelta(seconds=30)
numbers = st.integers(0, MOST - 1)


class Changes(RuleBasedStateMachine):
    """Pods start as soon as they are told to run, and end at once: only the operator takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.args = 0
        self.wanted = MOST
        self.silent: set[int] = set()
        self.load = [0] * MOST
        self.made = 0
        self.world: World = healthy_world(**self.spec())

    def spec(self) -> dict[str, object]:
        times = {"drainTimeout": f"{DRAIN.total_seconds():.0f}s"}
        return {"instances": self.wanted, "stages": 1, "args": [f"--seed={self.args}"], "recovery": times}

    def edit(self) -> None:
        obj = self.world.object
        changed = replace(obj, spec=spec(**self.spec()), generation=obj.generation + 1)
        self.world = replace(self.world, object=changed)

    # --- what happens ------------------------------------------------------------------------------------------

    @rule()
    def the_flags_change(self) -> None:
        self.args += 1
        self.edit()

    @rule(wanted=st.integers(1, MOST))
    def more_or_fewer_are_asked_for(self, wanted: int) -> None:
        self.wanted = wanted
        self.edit()

    @rule(paused=st.booleans())
    def changes_are_paused(self, paused: bool) -> None:
        self.world = replace(self.world, object=replace(self.world.object, paused=paused))

    @rule(instance=numbers, requests=st.integers(0, 2))
    def requests_come_and_go(self, instance: int, requests: int) -> None:
        self.load[instance] = requests

    @rule(instance=numbers)
    def an_engine_falls_silent(self, instance: int) -> None:
        self.silent.add(instance)

    @precondition(lambda self: self.silent)
    @rule()
    def they_are_heard_again(self) -> None:
        self.silent.clear()

    @rule(seconds=st.integers(1, 40))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.round()

    @rule()
    def the_operator_restarts(self) -> None:
        self.round(knows=False)

    # --- what follows ------------------------------------------------------------------------------------------

    @rule()
    def round(self, knows: bool = True) -> None:
        """One round of the operator, after a restart with no more than the status."""
        self.world = replace(self.world, engines=self.engines() if knows else {})
        serving, drain = self.serving(), self.world.object.status.drain
        actions = decide(self.world, self.now)
        gone = {action.uid: action for action in actions if isinstance(action, DeletePod)}
        for instance in {each.slot.instance for each in self.world.pods if each.uid in gone} & serving:
            others = {each for each in serving - {instance} if each < self.wanted}
            assert len(others) >= self.wanted - 1, f"{instance} is taken away, and only {others} are left"
            since = drain.since if drain is not None and drain.instance == instance else self.now
            assert not self.load[instance] or self.now - since >= DRAIN, "requests are cut off before their time"
        self.world = settled(self.world, self.now)
        kept = [each for each in self.world.pods if each.uid not in gone]
        kept += [self.started(action) for action in actions if isinstance(action, CreatePod)]
        self.world = replace(self.world, pods=tuple(kept))
        if knows:
            ready = sum(each["conditions"]["ready"] for each in (self.world.endpoints or {})["endpoints"])
            assert ready >= len(serving) - 1 - len(serving - set(range(self.wanted))), "too few endpoints"

    def teardown(self) -> None:
        """When nothing happens any more, all is as the spec says before long."""
        self.silent.clear()
        self.load = [0] * MOST
        self.changes_are_paused(False)
        for _ in range(40):
            self.now += timedelta(seconds=5)
            self.round()
        assert not [each for each in self.world.pods if is_to_go(self.world, each)]
        assert self.world.instances == len(self.serving()) == self.wanted
        assert self.world.object.status.drain is None
        assert self.world.object.status.ready == f"{self.wanted}/{self.wanted}"
        super().teardown()

    def started(self, action: CreatePod) -> PodView:
        metadata = action.manifest["metadata"]
        slot = slot_of(metadata["labels"])
        assert slot is not None
        self.made += 1
        name, spec_hash = metadata["name"], metadata["annotations"][SPEC_HASH_ANNOTATION]
        return pod(self.world.object, slot, name=name, uid=f"made-{self.made}", spec_hash=spec_hash, created=self.now)

    def serving(self) -> set[int]:
        """The instances that could take requests now."""
        complete = {
            instance
            for instance in range(MOST)
            if {each.slot.role for each in self.world.pods if each.slot.instance == instance} == set(Role)
        }
        return complete - self.silent

    def engines(self) -> dict[str, EngineView]:
        serving = self.serving()
        views = {}
        for each in self.world.pods:
            instance = each.slot.instance
            if each.slot.role is Role.ENGINE:
                state = engine_state(instance, 1, requests_running=self.load[instance], replication=())
                heard = instance in serving
                views[each.uid] = answering(state, each) if heard else EngineView(contact=Contact.SILENT)
        return views


TestChanges = Changes.TestCase
TestChanges.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
