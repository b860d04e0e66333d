"""Roll-outs and fewer instances: one instance at a time gives way, and loses nothing that the others cannot make up."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.plan import Plan, StageId
from resilientllm_operator.actions import Announce, ApplyEndpoints, CreatePod, DeletePod, PublishPlan
from resilientllm_operator.draining import KEEPERS_PATIENCE, SETTLE
from resilientllm_operator.pods import spec_hash
from resilientllm_operator.world import Contact, EngineView, Exit, World

from tests.operator.builders import (
    NOW,
    answering,
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
    with_nodes,
    with_pod,
    with_spec,
    without_node,
    without_pod,
)

LATER = NOW + SETTLE
OVERDUE = NOW + timedelta(minutes=5)
NEW_ARGS = {"args": ["--max-model-len=1024"]}


def changed(instances: int = 2, **spec: Any) -> World:
    """All serves, and the user has changed the flags."""
    return with_spec(healthy_world(instances=instances), **({"instances": instances} | NEW_ARGS | spec))


def fewer(wanted: int = 2, instances: int = 3) -> World:
    return with_spec(healthy_world(instances=instances), instances=wanted)


def busy(world: World, instance: int, running: int = 3) -> World:
    return with_engine(world, instance, engine_state(instance, requests_running=running))


def deleted(world: World, at: datetime = LATER) -> set[str]:
    """What is deleted, without the suffixes of the names."""
    return {action.name.rsplit("-", 1)[0] for action in of_type(decided(world, at), DeletePod)}


def pods_of(instance: int) -> set[str]:
    return {f"tiny-{instance}-s0", f"tiny-{instance}-s1", f"tiny-{instance}-engine"}


def endpoints(world: World) -> dict[str, tuple[bool, bool, bool]]:
    """By address, as they will be: ready, serving, terminating."""
    written = of_type(decided(world), ApplyEndpoints)
    told = written[0].manifest["endpoints"] if written else (world.endpoints or {})["endpoints"]
    return {
        each["addresses"][0]: tuple(each["conditions"][key] for key in ("ready", "serving", "terminating"))
        for each in told
    }


def plans(world: World) -> dict[int, Plan]:
    return {each.plan.instance: each.plan for each in of_type(decided(world), PublishPlan)}


def replaced(world: World, instance: int, **changes: Any) -> World:
    """The pods of an instance have been made anew from the present spec."""
    for slot in (stage(instance, 0), stage(instance, 1), engine(instance)):
        world = with_pod(world, slot, **({"spec_hash": spec_hash(world.object, slot)} | changes))
    return world


class TestAnInstanceThatGivesWay:
    def test_gets_no_new_requests_and_goes_on_with_those_that_it_has(self) -> None:
        world = busy(changed(), 0)
        assert endpoints(world) == {"10.0.0.10": (False, True, False), "10.0.0.20": (True, True, False)}
        assert [each.phase for each in status_of(world).instances] == ["Draining", "Serving"]
        assert status_of(world).ready == "1/2"

    def test_is_left_by_the_others_and_knows_it(self) -> None:
        told = plans(changed())
        assert [str(each) for each in told[1].leaving] == ["0.0", "0.1"]
        assert (told[0].leaving, told[0].draining, told[1].draining) == ((), True, False)

    def test_keeps_stages_that_are_not_to_go(self) -> None:
        """Nobody has to leave them when the engine alone is replaced."""
        world = with_spec(healthy_world(), engine={"env": [{"name": "A", "value": "1"}]})
        assert plans(world)[1].leaving == ()
        assert deleted(settled(world)) == {"tiny-0-engine"}

    def test_keeps_its_pods_while_requests_run_or_wait(self) -> None:
        for load in ({"requests_running": 1}, {"requests_waiting": 1}):
            assert deleted(settled(with_engine(changed(), 0, engine_state(0, **load)))) == set()

    def test_keeps_its_pods_until_every_node_knows_that_it_is_not_ready(self) -> None:
        assert deleted(settled(changed()), NOW + SETTLE / 2) == set()

    def test_is_replaced_as_a_whole_when_it_is_idle(self) -> None:
        assert deleted(settled(changed())) == pods_of(0)

    def test_is_not_waited_for_for_ever(self) -> None:
        world = settled(busy(changed(), 0))
        assert deleted(world, OVERDUE - timedelta(seconds=1)) == set()
        assert deleted(world, OVERDUE) == pods_of(0)
        assert {each.grace_seconds for each in of_type(decided(world, OVERDUE), DeletePod)} == {5}

    def test_otherwise_has_the_grace_of_its_pods(self) -> None:
        assert {each.grace_seconds for each in of_type(decided(settled(changed()), LATER), DeletePod)} == {None}

    def test_has_the_time_that_the_spec_gives(self) -> None:
        world = settled(busy(changed(recovery={"drainTimeout": "10s"}), 0))
        assert deleted(world, NOW + timedelta(seconds=10)) == pods_of(0)

    def test_is_waited_for_by_an_operator_that_has_just_started(self) -> None:
        """Not heard of yet is not idle, and not silent either."""
        world = replace(settled(busy(changed(), 0)), engines={})
        assert deleted(world) == set()
        assert deleted(world, OVERDUE) == pods_of(0)

    def test_is_not_taken_for_dead_before_its_engine_was_heard(self) -> None:
        """It may serve again since the operator before this one ended, or be about to say so."""
        world = settled(silent(changed(), 0))
        assert deleted(replace(world, engines={})) == set()
        assert deleted(world) == pods_of(0)

    def test_keeps_its_stages_a_moment_for_those_whose_blocks_they_keep(self) -> None:
        world = settled(with_engine(changed(3), 1, kept_by(1, 0)))
        assert deleted(world) == set()
        assert deleted(world, NOW + KEEPERS_PATIENCE) == pods_of(0)

    def test_does_not_wait_for_keepers_where_there_can_be_no_other(self) -> None:
        assert deleted(settled(with_engine(changed(), 1, kept_by(1, 0)))) == pods_of(0)

    def test_is_announced_once_and_is_no_loss(self) -> None:
        def events(world: World) -> list[str]:
            return [event.reason for event in of_type(decided(world), Announce)]

        assert events(changed()) == ["InstanceDraining"]
        assert events(settled(changed())) == []
        assert condition(changed(), "Degraded")[0] == "False"

    def test_says_what_happens(self) -> None:
        status, reason, message = condition(changed(), "Progressing")
        assert (status, reason) == ("True", "RollingOut")
        assert message.startswith("Instance 0 gets no new requests and finishes those that it has")
        assert condition(changed(), "Ready")[:2] == ("False", "RollingOut")

    def test_serves_again_when_the_change_is_taken_back(self) -> None:
        world = with_spec(settled(changed()))
        assert endpoints(world)["10.0.0.10"] == (True, True, False)
        assert status_of(world).drain is None
        assert plans(world)[1].leaving == ()


def kept_by(instance: int, keeper: int) -> EngineState:
    state = engine_state(instance)
    places = tuple(
        each.model_copy(update={"kept_by": StageId(instance=keeper, stage=each.stage)}) for each in state.replication
    )
    return state.model_copy(update={"replication": places})


class TestOneAtATime:
    def test_no_instance_gives_way_while_another_does_not_serve(self) -> None:
        world = settled(silent(replaced(changed(), 1), 1))
        assert deleted(world) == set()
        assert status_of(world).drain is None
        assert "Instance 0 is left as it is until instance 1 serves" in condition(world, "Progressing")[2]

    def test_no_instance_gives_way_while_it_serves_another(self) -> None:
        world = with_engine(changed(), 1, borrowed(1, 0, donor=0))
        world = replaced(world, 1)
        assert status_of(world).drain is None
        assert (
            "Instance 0 is left as it is until instance 1 is served by its own stages"
            in condition(world, "Progressing")[2]
        )

    def test_an_instance_that_serves_another_is_not_replaced_at_once_although_it_does_not_serve(self) -> None:
        world = silent(with_engine(changed(), 1, borrowed(1, 0, donor=0)), 0)
        assert deleted(world) == set()

    def test_a_drain_is_called_off_when_another_instance_is_lost(self) -> None:
        world = silent(settled(busy(changed(), 0)), 1)
        assert endpoints(world)["10.0.0.10"] == (True, True, False)
        assert status_of(world).drain is None

    def test_a_drain_is_called_off_when_a_stage_of_it_is_needed(self) -> None:
        world = with_engine(settled(replaced(changed(), 1)), 1, borrowed(1, 0, donor=0))
        assert status_of(world, OVERDUE).drain is None
        assert deleted(world, OVERDUE) == set()

    def test_who_needs_another_gives_way_first(self) -> None:
        world = settled(with_engine(settled(changed()), 1, borrowed(1, 0, donor=0)))
        drain = status_of(world).drain
        assert drain is not None
        assert (drain.instance, drain.since) == (1, NOW)

    def test_no_instance_gives_way_before_it_is_written_down_that_another_serves_again(self) -> None:
        world = with_engine(settled(changed()), 1, borrowed(1, 0, donor=0))
        assert status_of(world).drain is None
        assert endpoints(world) == {"10.0.0.10": (True, True, False), "10.0.0.20": (True, True, False)}

    def test_what_was_told_to_go_goes_whatever_happens_then(self) -> None:
        world = silent(settled(settled(changed()), LATER), 1)
        assert deleted(world) >= pods_of(0)

    def test_the_next_one_waits_until_the_first_is_at_home_again(self) -> None:
        world = replaced(settled(settled(changed()), LATER), 0)
        assert not deleted(with_engine(world, 0, borrowed(0, 1, donor=1))) & pods_of(1)
        assert not deleted(silent(world, 0)) & pods_of(1)
        assert status_of(silent(world, 0)).drain is not None
        following = status_of(settled(with_engine(world, 0, engine_state(0)))).drain
        assert following is not None
        assert (following.instance, following.deleted_at) == (1, None)

    def test_what_followed_finishes_its_own_requests_when_the_spec_changes_again(self) -> None:
        world = busy(replaced(settled(settled(changed()), LATER), 0, created=LATER), 0)
        assert deleted(with_spec(world, args=["--max-model-len=512"]), LATER) == set()

    def test_a_single_instance_gives_way_all_the_same(self) -> None:
        assert deleted(settled(changed(1))) == pods_of(0)


class TestAnEngineThatFollowsAnother:
    @staticmethod
    def world(load: int, contact: Contact = Contact.ANSWERS) -> World:
        world = replaced(settled(settled(changed()), LATER), 0)
        before = pod(world.object, engine(0), name="before", uid="before", ip="10.0.9.1", leaving=True)
        state = engine_state(0, requests_running=load, serving=False, leaving=True)
        view = answering(state, before) if contact is Contact.ANSWERS else EngineView(contact=contact)
        starting = engine_state(0, phase=EnginePhase.STARTING, serving=False, plan_version=0)
        world = with_engine(replace(world, pods=(*world.pods, before)), 0, starting, verified=False)
        return replace(world, engines={**world.engines, "before": view})

    @pytest.mark.parametrize(
        ("load", "contact", "attaches"),
        [
            (2, Contact.ANSWERS, False),
            (0, Contact.ANSWERS, True),
            (0, Contact.SILENT, True),
            (0, Contact.UNKNOWN, False),
        ],
    )
    def test_gets_its_plan_when_it_cuts_nobody_off(self, load: int, contact: Contact, attaches: bool) -> None:
        assert (0 in plans(self.world(load, contact))) is attaches

    def test_gets_its_plan_when_its_stages_are_of_the_same_spec(self) -> None:
        world = self.world(0)
        assert 0 not in plans(with_pod(world, stage(0, 1), spec_hash="older"))

    def test_the_leaving_one_is_told_truthfully(self) -> None:
        assert endpoints(self.world(2))["10.0.9.1"] == (False, True, True)
        assert endpoints(self.world(2, Contact.SILENT))["10.0.9.1"] == (False, False, True)


class TestFewerInstances:
    def test_the_highest_gives_way_and_its_pods_go_when_it_is_idle(self) -> None:
        world = fewer()
        assert endpoints(world)["10.0.0.30"] == (False, True, False)
        assert deleted(settled(busy(world, 2))) == set()
        assert deleted(settled(world)) == pods_of(2)

    def test_the_object_stays_ready(self) -> None:
        world = fewer()
        assert condition(world, "Ready")[0] == "True"
        assert condition(world, "Progressing")[:2] == ("True", "ScalingDown")
        assert [each.phase for each in status_of(world).instances] == ["Serving", "Serving", "Draining"]
        assert status_of(world).ready == "2/2"

    def test_the_others_keep_its_stages_in_their_plans_until_it_is_gone(self) -> None:
        world = fewer()
        told = plans(world)
        assert [str(each.id) for each in told[0].donors[0]] == ["1.0", "2.0"]
        assert [str(each) for each in told[0].leaving] == ["2.0", "2.1"]
        ending = settled(settled(world), LATER)
        for slot in (stage(2, 0), stage(2, 1), engine(2)):
            ending = with_pod(ending, slot, leaving=True)
        assert [str(each.id) for each in plans(ending)[0].donors[0]] == ["1.0"]
        assert len(status_of(ending).instances) == 2
        assert status_of(ending).drain is None

    def test_may_go_although_one_of_the_rest_is_lost(self) -> None:
        """Perhaps it is for want of a node that this one waits for: one less than asked for is enough."""
        assert status_of(silent(fewer(), 0)).drain is not None
        assert status_of(silent(silent(fewer(), 0), 1)).drain is None

    def test_one_that_does_not_serve_goes_at_once(self) -> None:
        assert deleted(silent(fewer(), 2), NOW) == pods_of(2)

    def test_several_go_one_after_the_other(self) -> None:
        assert deleted(settled(fewer(1))) == pods_of(2)

    def test_come_first_and_a_roll_out_after_them(self) -> None:
        world = with_spec(healthy_world(instances=3), instances=2, **NEW_ARGS)
        assert deleted(settled(world)) == pods_of(2)

    def test_more_again_calls_it_off(self) -> None:
        world = with_spec(settled(fewer()), instances=3)
        assert endpoints(world)["10.0.0.30"] == (True, True, False)
        assert status_of(world).drain is None


class TestARollOutThatDoesNotWork:
    BROKEN = Exit(1, "Traceback\nValueError: no such thing\n")

    def world(self, **broken: Any) -> World:
        world = replaced(settled(settled(changed()), LATER), 0, uid="new", ready=False)
        return silent(with_pod(world, stage(0, 1), **broken), 0)

    def test_stops_at_the_first_instance_and_names_the_pod(self) -> None:
        world = self.world(restarts=3, last_exit=self.BROKEN)
        assert not of_type(decided(world, OVERDUE), DeletePod)
        status, reason, message = condition(world, "Progressing")
        assert (status, reason) == ("False", "RollOutStopped")
        assert pod(world.object, stage(0, 1)).name in message
        assert "ValueError: no such thing" in message
        assert "Instance 1 goes on with pods of an older spec" in message
        assert condition(world, "Available")[0] == "True"
        assert condition(world, "Degraded")[0] == "True"

    def test_stops_for_a_configuration_that_is_refused(self) -> None:
        world = self.world(restarts=1, last_exit=Exit(2, "resilientllm-stage: no such flag\n"))
        assert condition(world, "Progressing")[1] == "RollOutStopped"
        assert deleted(settled(world), OVERDUE) == {"tiny-0-s1"}, "what cannot work is not restarted for ever"

    def test_stops_for_pods_that_never_become_ready(self) -> None:
        def progressing(at: datetime) -> str:
            return next(each.reason for each in status_of(self.world(), at).conditions if each.type == "Progressing")

        assert progressing(LATER + timedelta(minutes=10)) == "RollingOut"
        assert progressing(LATER + timedelta(minutes=11)) == "RollOutStopped"

    def test_is_announced_once(self) -> None:
        world = self.world(restarts=3, last_exit=self.BROKEN)
        assert "RollOutStopped" in [event.reason for event in of_type(decided(world), Announce)]
        assert not of_type(decided(settled(world)), Announce)

    def test_waits_for_a_place_that_is_about_to_be_free(self) -> None:
        world = self.world(unschedulable="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
        ending = pod(world.object, stage(0, 1), name="before", leaving=True, ends_by=LATER, node="node-then")
        assert condition(world, "Progressing")[1] == "RollOutStopped"
        both = with_nodes(replace(world, pods=(*world.pods, ending)))
        assert condition(both, "Progressing")[1] == "RollingOut"
        for lost in (without_node(both, "node-then"), with_condition(both, "node-then", "Ready", "Unknown")):
            assert condition(lost, "Progressing")[1] == "RollOutStopped", "nobody is there to end it"

    def test_goes_on_with_a_corrected_spec(self) -> None:
        world = with_spec(self.world(restarts=3, last_exit=self.BROKEN), args=["--max-model-len=512"])
        assert deleted(world) == pods_of(0)
        well = with_engine(replaced(world, 0, ready=True, restarts=0, last_exit=None), 0, engine_state(0))
        assert deleted(settled(settled(well), LATER), LATER + SETTLE) == pods_of(1)


class TestAPause:
    @staticmethod
    def paused(world: World) -> World:
        return replace(world, object=replace(world.object, paused=True))

    def test_holds_a_roll_out_and_says_so(self) -> None:
        world = self.paused(changed())
        assert status_of(world).drain is None
        assert deleted(settled(world)) == set()
        status, reason, message = condition(world, "Progressing")
        assert (status, reason) == ("False", "Paused")
        assert "6 pods are to go" in message
        assert "kubectl -n default annotate rllm tiny resilientllm.dev/paused-" in message

    def test_holds_it_also_where_nothing_serves(self) -> None:
        assert deleted(self.paused(silent(changed(), 0))) == set()

    def test_keeps_instances_that_are_not_asked_for_any_more(self) -> None:
        assert deleted(settled(self.paused(fewer()))) == set()

    def test_calls_a_drain_off(self) -> None:
        assert endpoints(self.paused(settled(changed())))["10.0.0.10"] == (True, True, False)

    def test_still_replaces_what_is_lost(self) -> None:
        world = self.paused(without_pod(healthy_world(), stage(0, 1)))
        assert len(of_type(decided(world), CreatePod)) == 1

    def test_lets_an_engine_that_was_lost_go_on_with_the_stages_that_there_are(self) -> None:
        """They are of an older spec, and stay so for as long as the pause lasts: waiting for others would not end."""
        world = with_pod(TestAnEngineThatFollowsAnother.world(0), stage(0, 1), spec_hash="older")
        assert 0 not in plans(world)
        assert 0 in plans(self.paused(world))

    def test_lets_the_object_be_ready(self) -> None:
        assert condition(self.paused(healthy_world()), "Ready")[0] == "True"
