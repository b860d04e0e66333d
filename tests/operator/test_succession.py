"""A stage that has to go: another pod at once and elsewhere, which takes over when nobody needs the older any more."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.plan import Plan, StageId
from resilientllm_operator.actions import Announce, CreatePod, DeletePod, PublishPlan
from resilientllm_operator.draining import SETTLE
from resilientllm_operator.names import Slot
from resilientllm_operator.node_affinity import nodes_kept_off
from resilientllm_operator.signals import NOT_READY_PATIENCE
from resilientllm_operator.succession import PATIENCE
from resilientllm_operator.world import Ailment, Exit, PodView, Waiting, World

from tests.operator.builders import (
    NOW,
    borrowed,
    condition,
    decided,
    engine,
    engine_state,
    healthy_world,
    of_type,
    pod,
    settled,
    silent,
    stage,
    status_of,
    with_condition,
    with_engine,
    with_node,
    with_nodes,
    with_place,
    with_pod,
    with_spec,
    without_node,
    without_pod,
)

SICK = Ailment("nvidia.com/gpu", "GPU-2", certain=True)
PLACE = stage(0, 1)
"""On node-1, where 1.0 is, too."""


def created(world: World, at: datetime = NOW) -> list[CreatePod]:
    return of_type(decided(world, at), CreatePod)


def deleted(world: World, at: datetime = NOW) -> list[str]:
    return [action.name for action in of_type(decided(world, at), DeletePod)]


def plans(world: World, at: datetime = NOW) -> dict[int, Plan]:
    return {each.plan.instance: each.plan for each in of_type(decided(world, at), PublishPlan)}


def leaving(world: World) -> list[str]:
    return [str(each) for plan in list(plans(world).values())[:1] for each in plan.leaving]


def lost(world: World) -> list[str]:
    return [str(each) for plan in list(plans(world).values())[:1] for each in plan.lost]


def addresses(world: World, at: datetime = NOW) -> set[str]:
    """Of 0.1, in all plans that are published."""
    own = {plan.stages[1].address for plan in plans(world, at).values() if plan.instance == 0}
    return own | {ref.address for plan in plans(world, at).values() for ref in plan.donors[1] if str(ref.id) == "0.1"}


def cordoned(node: str = "node-1", **spec: Any) -> World:
    return with_node(healthy_world(**spec), node, unschedulable=True)


def with_successor(world: World, slot: Slot = PLACE, **changes: Any) -> World:
    """The next pod of a slot, as it was decided; it runs and loads its weights."""
    (made,) = [each for each in created(world) if str(slot.stage_id) in each.name or _fills(each, slot)]
    view = replace(
        pod(world.object, slot),
        name=made.name,
        uid=f"uid-next-{slot.stage_id}",
        created=NOW,
        ip=f"10.0.9.{slot.instance}{slot.stage}",
        node="node-free",
        ready=False,
        kept_off=nodes_kept_off(made.manifest["spec"]),
    )
    return replace(world, pods=(*world.pods, replace(view, **changes)))


def _fills(made: CreatePod, slot: Slot) -> bool:
    labels = made.manifest["metadata"]["labels"]
    return bool(
        labels["resilientllm.dev/instance"] == str(slot.instance)
        and labels.get("resilientllm.dev/stage") == str(slot.stage)
    )


def going(**spec: Any) -> World:
    """0.1 has to move, and nobody else: what is on its node besides is somewhere else here."""
    world = healthy_world(**spec)
    apart = tuple(
        each if each.slot == PLACE else replace(each, node=f"{each.node}-{each.slot.role}") for each in world.pods
    )
    return with_node(settled(replace(world, pods=apart)), "node-1", unschedulable=True)


def moved_away(instances: int = 2) -> EngineState:
    """The engine of instance 0, after it went to a donor."""
    state = borrowed(0, 1, donor=1)
    keeper = StageId(instance=2 if instances > 2 else 0, stage=1)
    return with_place(state, 1, kept_by=keeper, healthy=True)


def next_pod(world: World) -> PodView:
    (found,) = [each for each in world.pods if each.uid == "uid-next-0.1"]
    return found


class TestAMove:
    def test_begins_with_another_pod_beside_the_one_that_works(self) -> None:
        (made,) = created(going())
        assert made.name.startswith("tiny-0-s1-") and made.name != pod(going().object, PLACE).name
        assert made.why == "node node-1 is cordoned"
        assert deleted(going()) == []

    def test_asks_for_the_same_pod_again_if_it_has_not_seen_the_first(self) -> None:
        assert [each.name for each in created(going())] == [each.name for each in created(settled(going()))]

    def test_of_all_stages_on_a_node_begins_at_once(self) -> None:
        assert [each.name.rsplit("-", 1)[0] for each in created(cordoned())] == ["tiny-0-s1", "tiny-1-s0"]

    def test_asks_engines_to_leave_when_there_is_a_place_to_go_to(self) -> None:
        assert leaving(going()) == []
        assert leaving(with_successor(going(), node=None, ip=None)) == []
        assert leaving(with_successor(going())) == ["0.1"]

    def test_keeps_the_address_while_engines_are_on_their_way(self) -> None:
        assert addresses(with_successor(going(), ready=True)) == {"10.0.0.2:7000"}

    def test_keeps_the_older_as_long_as_the_next_one_loads(self) -> None:
        world = with_engine(with_successor(going()), 0, moved_away())
        assert addresses(world) == {"10.0.0.2:7000"}
        assert deleted(world) == []

    def test_hands_over_when_the_next_one_is_ready_and_nobody_is_served_by_the_older(self) -> None:
        world = with_engine(with_successor(going(), ready=True), 0, moved_away())
        assert addresses(world) == {"10.0.9.01:7000"}
        assert leaving(world) == []
        assert deleted(world) == [pod(world.object, PLACE).name]

    def test_writes_down_who_fills_the_place_before_it_is_used(self) -> None:
        world = with_engine(with_successor(going(), ready=True), 0, moved_away())
        kinds = [type(each).__name__ for each in decided(world)]
        assert kinds.index("WriteStatus") < kinds.index("PublishPlan") < kinds.index("DeletePod")
        assert status_of(world).instances[0].stages[1].pod == next_pod(world).name

    def test_does_not_go_back_when_the_engine_is_home_again(self) -> None:
        """Its engine says that 0.1 serves: that is the next pod now, although the older is still there."""
        handed_over = settled(with_engine(with_successor(going(), ready=True), 0, moved_away()))
        home = with_engine(handed_over, 0, engine_state(0, plan_version=3))
        assert addresses(home) == {"10.0.9.01:7000"}
        ending = replace(
            home, pods=tuple(replace(p, leaving=p.name == pod(home.object, PLACE).name) for p in home.pods)
        )
        assert addresses(ending) == {"10.0.9.01:7000"}
        assert deleted(ending) == [] and created(ending) == []

    def test_waits_for_copies_that_another_stage_can_keep(self) -> None:
        world = with_successor(going(instances=3), ready=True, ready_since=NOW)
        kept = with_engine(world, 0, with_place(moved_away(), 1, kept_by=StageId(instance=0, stage=1)))
        assert deleted(kept) == []
        assert deleted(kept, NOW + PATIENCE) == [pod(world.object, PLACE).name]
        elsewhere = with_place(moved_away(3), 1, kept_by=StageId(instance=2, stage=1))
        third = with_place(engine_state(2), 1, kept_by=StageId(instance=1, stage=1))
        second = with_place(engine_state(1), 1, kept_by=StageId(instance=2, stage=1))
        free = with_engine(with_engine(with_engine(world, 0, elsewhere), 1, second), 2, third)
        assert deleted(free) == [pod(world.object, PLACE).name]

    def test_does_not_wait_for_ever_for_an_engine_that_stays(self) -> None:
        """With one instance there is no donor to go to."""
        world = with_successor(going(instances=1), ready=True, ready_since=NOW)
        assert deleted(world, NOW + PATIENCE / 2) == []
        assert deleted(world, NOW + PATIENCE) == [pod(world.object, PLACE).name]

    def test_takes_an_engine_that_is_silent_at_its_last_word(self) -> None:
        world = silent(with_successor(going(), ready=True, ready_since=NOW), 0)
        assert deleted(world) == []

    def test_waits_until_an_engine_has_been_asked_that_did_not_run_when_it_was_last(self) -> None:
        """It may have come back while no operator was there, and then it went to the stages of its plan."""
        state = engine_state(0)
        stages = tuple(each.model_copy(update={"served_by": None}) for each in state.stages)
        nowhere = state.model_copy(update={"stages": stages, "serving": False, "phase": EnginePhase.WAITING})
        before = with_successor(going(), ready=True, ready_since=NOW)
        known = replace(before.object, status=status_of(with_engine(going(), 0, nowhere)))
        world = replace(before, object=known)
        assert deleted(replace(world, engines={})) == []
        assert deleted(silent(world, 0)) == [pod(world.object, PLACE).name]

    def test_is_called_off_when_nothing_speaks_against_the_node_any_more(self) -> None:
        world = with_node(with_successor(going()), "node-1", unschedulable=False)
        assert deleted(world) == [next_pod(world).name]
        assert leaving(world) == []

    def test_does_not_give_up_a_pod_that_works_for_one_that_does_not(self) -> None:
        world = with_pod(with_node(with_successor(going(), ready=True), "node-1", unschedulable=False), PLACE)
        broken = replace(world, pods=tuple(replace(p, ready=p.uid != "uid-1" and p.ready) for p in world.pods))
        assert deleted(broken) == [pod(world.object, PLACE).name]

    def test_is_not_made_for_a_pod_that_a_roll_out_replaces_anyway(self) -> None:
        world = with_spec(going(), args=["--max-model-len=1024"])
        assert created(world) == []

    def test_does_not_stop_a_roll_out_and_rolls_nothing_out_itself(self) -> None:
        (made,) = created(going())
        assert (
            made.manifest["metadata"]["annotations"]["resilientllm.dev/spec-hash"]
            == pod(going().object, PLACE).spec_hash
        )


class TestWhereThereIsNoRoom:
    def world(self) -> World:
        unschedulable = "0/3 nodes are available: 3 node(s) didn't match pod anti-affinity rules."
        return with_successor(going(), ip=None, node=None, unschedulable=unschedulable)

    def test_the_one_that_works_stays(self) -> None:
        assert deleted(self.world()) == []
        assert leaving(self.world()) == lost(self.world()) == []

    def test_that_is_said(self) -> None:
        status, reason, message = condition(self.world(), "Progressing")
        assert (status, reason) == ("False", "Unschedulable")
        assert "Meanwhile it stays where it is, on node node-1, although node node-1 is cordoned" in message
        assert condition(self.world(), "Stalled")[:2] == ("True", "Unschedulable")
        assert condition(self.world(), "Ready")[0] == "True"
        assert condition(self.world(), "Degraded")[0] == "False"

    @pytest.mark.parametrize(
        "trouble",
        [
            {"waiting": Waiting("ImagePullBackOff", "not found")},
            {"waiting": Waiting("CrashLoopBackOff", ""), "restarts": 3, "last_exit": Exit(139, "Segmentation fault")},
        ],
    )
    def test_nobody_leaves_for_a_pod_that_does_not_come_to_run(self, trouble: dict[str, Any]) -> None:
        assert leaving(with_successor(going(), waiting=Waiting("ContainerCreating", ""))) == ["0.1"]
        world = with_successor(going(), **trouble)
        assert leaving(world) == [] and deleted(world) == []
        assert condition(world, "Stalled")[0] == "True"

    def test_a_pod_that_was_kept_off_a_node_which_is_fit_again_is_made_anew(self) -> None:
        faulty = with_condition(going(), "node-free", "GpuMemWatch")
        waiting = with_successor(faulty, ip=None, node=None, unschedulable="no node")
        assert next_pod(waiting).kept_off == {"node-free"}
        assert deleted(waiting) == []
        assert deleted(with_condition(waiting, "node-free", "GpuMemWatch", "False")) == [next_pod(waiting).name]


class TestOneAfterTheOther:
    """Both copies of a stage are on nodes that are cordoned: one of them stays at work."""

    def world(self) -> World:
        world = with_node(with_nodes(healthy_world(), "node-free-2"), "node-1", unschedulable=True)
        world = with_node(world, "node-2", unschedulable=True)
        made = [each for each in created(world) if _fills(each, stage(0, 1)) or _fills(each, stage(1, 1))]
        assert len(made) == 2
        return with_successor(with_successor(world, stage(0, 1)), stage(1, 1), node="node-free-2")

    def test_only_the_first_leaves(self) -> None:
        assert leaving(self.world()) == ["0.1"]

    def test_the_second_stays_while_it_serves_the_first(self) -> None:
        assert leaving(with_engine(self.world(), 0, moved_away())) == ["0.1"]

    def test_the_second_follows_when_the_first_is_home(self) -> None:
        world = settled(with_engine(self.world(), 0, moved_away()))
        ready = replace(world, pods=tuple(replace(p, ready=True) for p in world.pods))
        home = with_engine(settled(ready), 0, engine_state(0, plan_version=9))
        assert leaving(home) == ["1.1"]


class TestALossThatIsCertain:
    def sick(self, **spec: Any) -> World:
        return with_pod(with_nodes(healthy_world(**spec)), PLACE, ailments=(SICK,))

    def test_is_told_to_engines_at_once(self) -> None:
        assert lost(self.sick()) == ["0.1"]
        assert leaving(self.sick()) == []

    def test_gets_another_pod_off_that_node(self) -> None:
        (made,) = created(self.sick())
        assert nodes_kept_off(made.manifest["spec"]) == {"node-1"}
        assert deleted(self.sick()) == []

    def test_hands_over_as_soon_as_there_is_an_address(self) -> None:
        waiting = with_successor(self.sick(), ip=None)
        assert addresses(waiting) == {"10.0.0.2:7000"}
        loading = with_successor(self.sick())
        assert addresses(loading) == {"10.0.9.01:7000"}
        assert lost(loading) == []
        assert deleted(loading) == [pod(loading.object, PLACE).name]

    def test_of_a_node_replaces_all_that_was_on_it(self) -> None:
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))
        gone = without_node(with_engine(world, 1, borrowed(1, 0, donor=0)), "node-1")
        assert [each.name.rsplit("-", 1)[0] for each in created(gone)] == ["tiny-0-s1", "tiny-1-s0"]
        assert lost(gone) == ["0.1", "1.0"]

    def test_of_an_engine_brings_another_one_and_then_ends_the_first(self) -> None:
        world = without_node(silent(healthy_world(), 0), "node-0")
        made = [each for each in created(world) if "engine" in each.name]
        assert len(made) == 1
        successor = replace(pod(world.object, engine(0)), name=made[0].name, uid="uid-e", node="node-free", created=NOW)
        both = replace(world, pods=(*world.pods, successor))
        assert deleted(both) == [pod(world.object, engine(0)).name]
        assert status_of(both).instances[0].engine == made[0].name

    def test_of_an_engine_is_not_believed_while_it_answers(self) -> None:
        assert not [each for each in created(without_node(healthy_world(), "node-0")) if "engine" in each.name]


class TestAPodThatEnds:
    """An eviction, or a person: it serves on until engines do without it, or its time is over."""

    def world(self, **changes: Any) -> World:
        ends_by = NOW + timedelta(seconds=30)
        world = with_pod(with_nodes(healthy_world()), PLACE, leaving=True, ends_by=ends_by)
        return with_successor(world, **changes)

    def test_keeps_its_place_while_it_serves(self) -> None:
        assert addresses(self.world(ready=True)) == {"10.0.0.2:7000"}
        assert leaving(self.world()) == ["0.1"]

    def test_gives_it_up_when_engines_have_left(self) -> None:
        assert addresses(with_engine(self.world(), 0, moved_away())) == {"10.0.9.01:7000"}

    def test_gives_it_up_when_its_time_is_over(self) -> None:
        """Its node may be dead, and the pod stay there for ever."""
        assert addresses(self.world(), NOW + timedelta(seconds=30)) == {"10.0.9.01:7000"}

    def test_is_followed_by_one_pod_only(self) -> None:
        assert created(self.world()) == [] and deleted(self.world()) == []

    def test_may_run_again_on_the_same_node(self) -> None:
        (made,) = created(with_pod(with_nodes(healthy_world()), PLACE, leaving=True))
        assert nodes_kept_off(made.manifest["spec"]) == set()


class TestTheSuccessor:
    def test_is_not_given_up_at_once_for_a_node_that_is_called_not_ready_by_mistake(self) -> None:
        """It cannot be heard yet, since no engine knows it; and the older, which is lost, says nothing of it."""
        lost = with_condition(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), "node-1", "Ready", "Unknown")
        waiting = with_successor(settled(lost), node="node-0", ip=None)
        flickers = with_condition(waiting, "node-0", "Ready", "Unknown", since=NOW)
        assert deleted(waiting) == deleted(flickers) == []
        assert deleted(flickers, NOW + NOT_READY_PATIENCE) == [next_pod(flickers).name]

    def test_that_has_to_go_itself_gives_way_to_another(self) -> None:
        world = with_successor(going(), uid="uid-next-0.1")
        worse = with_node(world, "node-free", unschedulable=True)
        assert deleted(worse) == [next_pod(world).name]
        (made,) = created(worse)
        assert made.name not in {each.name for each in world.pods}

    def test_of_two_the_older_stays(self) -> None:
        world = with_successor(going())
        third = replace(next_pod(world), name="third", uid="uid-third", created=NOW + timedelta(seconds=1))
        assert deleted(replace(world, pods=(*world.pods, third))) == ["third"]


class TestTheStory:
    def test_is_told_in_the_status(self) -> None:
        world = with_successor(going())
        shown = status_of(world).instances[0].stages[1]
        assert shown.pod == pod(world.object, PLACE).name
        assert shown.leaving == "node node-1 is cordoned"
        assert shown.successor == next_pod(world).name

    def test_is_told_in_conditions(self) -> None:
        world = with_successor(going())
        status, reason, message = condition(world, "Recovering")
        assert (status, reason) == ("True", "Moving")
        assert f"Stage 0.1: pod {next_pod(world).name} is to take the place" in message
        assert condition(world, "Progressing")[:2] == ("True", "Moving")
        assert condition(world, "Stalled")[:2] == ("False", "AsSpecified")
        away = with_engine(world, 0, moved_away())
        assert condition(away, "Degraded")[:2] == ("True", "StageBorrowed")

    def test_is_over_when_it_is_over(self) -> None:
        for kind in ("Recovering", "Degraded", "Stalled", "Progressing"):
            assert condition(with_nodes(healthy_world()), kind)[:2] == ("False", "AsSpecified")

    @pytest.mark.parametrize(
        ("phase", "serving", "reason"),
        [(EnginePhase.RECOVERING, True, "Restitching"), (EnginePhase.WAITING, False, "Restitching")],
    )
    def test_of_a_re_stitch(self, phase: EnginePhase, serving: bool, reason: str) -> None:
        world = with_engine(healthy_world(), 0, engine_state(0, phase=phase, serving=serving))
        assert condition(world, "Recovering")[:2] == ("True", reason)

    def test_of_a_stage_that_comes_back(self) -> None:
        world = with_pod(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), PLACE, ready=False)
        status, reason, message = condition(world, "Recovering")
        assert (status, reason) == ("True", "Replacing")
        assert "Stage 0.1 is served by 1.1, its pod" in message

    def test_has_an_event_for_each_step(self) -> None:
        def events(world: World) -> list[str]:
            return [each.reason for each in of_type(decided(world), Announce)]

        assert events(going()) == ["StageLeaving"]
        begun = settled(going())
        assert events(begun) == []
        handed_over = with_engine(with_successor(begun, ready=True), 0, moved_away())
        assert "StageReplaced" in events(handed_over)
        assert events(settled(handed_over)) == []
        assert events(with_node(begun, "node-1", unschedulable=False)) == ["StageStays"]
        assert events(with_condition(healthy_world(), "node-1", "GpuDcgmConnectivityFailure")) == ["NodeWarning"] * 2

    def test_ends_where_it_began(self) -> None:
        world = with_engine(settled(with_successor(going(), ready=True)), 0, moved_away())
        world = settled(world)
        older = pod(world.object, PLACE).name
        world = replace(world, pods=tuple(each for each in world.pods if each.name != older))
        world = settled(with_engine(world, 0, engine_state(0, plan_version=3)))
        assert of_type(decided(world), CreatePod, DeletePod) == []
        assert condition(world, "Recovering")[0] == "False"
        assert created(without_pod(world, PLACE))


def test_a_roll_out_is_no_recovery() -> None:
    world = with_spec(healthy_world(), args=["--max-model-len=1024"])
    told = settled(settled(world), NOW + SETTLE)
    pods = tuple(replace(p, leaving=True, ready=False) if p.slot.instance == 0 else p for p in told.pods)
    ending = replace(told, pods=pods)
    assert condition(ending, "Recovering")[:2] == ("False", "AsSpecified")
    assert condition(ending, "Progressing")[:2] == ("True", "RollingOut")
