"""What the operator does about a world, from creation to deletion."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from resilientllm_api.crd import PlanStatus
from resilientllm_api.engine_state import EnginePhase
from resilientllm_operator.actions import (
    ApplyEndpoints,
    ApplyService,
    CreatePod,
    CreateToken,
    DeletePod,
    PublishPlan,
    VerifyEngine,
    WriteStatus,
)
from resilientllm_operator.world import Exit, Owner, Refusal, World

from tests.operator.builders import (
    NOW,
    borrowed,
    condition,
    decided,
    engine,
    engine_state,
    healthy_world,
    new_world,
    obj,
    of_type,
    pod,
    settled,
    silent,
    stage,
    status_of,
    with_engine,
    with_pod,
    with_pods,
    with_spec,
    without_pod,
)


def created(world: World) -> list[str]:
    return [action.name for action in of_type(decided(world), CreatePod)]


def deleted(world: World) -> list[str]:
    return [action.name for action in of_type(decided(world), DeletePod)]


class TestCreation:
    def test_makes_a_pod_for_every_stage_and_engine(self) -> None:
        names = [name.rsplit("-", 1)[0] for name in created(new_world())]
        assert names == ["tiny-0-s0", "tiny-0-s1", "tiny-1-s0", "tiny-1-s1", "tiny-0-engine", "tiny-1-engine"]

    def test_makes_token_service_and_endpoints(self) -> None:
        actions = decided(new_world())
        assert len(of_type(actions, CreateToken)) == 1
        assert len(of_type(actions, ApplyService)) == 1
        assert len(of_type(actions, ApplyEndpoints)) == 1

    def test_a_second_look_at_a_stale_world_makes_the_same_pods(self) -> None:
        assert created(new_world()) == created(new_world())

    def test_decides_no_secret(self) -> None:
        (token,) = of_type(decided(new_world()), CreateToken)
        assert "data" not in token.manifest and "stringData" not in token.manifest

    def test_is_not_ready_and_says_what_it_waits_for(self) -> None:
        status, reason, message = condition(new_world(), "Ready")
        assert (status, reason) == ("False", "PodsStarting")
        assert "stage 0.0" in message

    def test_is_not_degraded_while_it_is_being_made(self) -> None:
        assert condition(new_world(), "Degraded")[0] == "False"


class TestSteadyState:
    def test_nothing_is_left_to_do(self) -> None:
        assert decided(healthy_world()) == []

    def test_is_ready(self) -> None:
        world = healthy_world()
        assert condition(world, "Ready")[:2] == ("True", "AllInstancesServing")
        assert condition(world, "Available")[:2] == ("True", "AllInstancesServing")
        assert condition(world, "Degraded")[:2] == ("False", "AsSpecified")
        assert condition(world, "Progressing")[:2] == ("False", "AsSpecified")
        assert world.object.status.ready == "2/2"
        assert world.object.status.endpoint == "http://tiny.default.svc/v1"

    def test_time_alone_changes_nothing(self) -> None:
        assert decided(healthy_world(), NOW + timedelta(days=1)) == []

    def test_one_instance_is_ready_and_warns_that_nobody_can_stand_in(self) -> None:
        status, _, message = condition(healthy_world(instances=1), "Ready")
        assert status == "True"
        assert "set spec.instances to 2 or more" in message

    @pytest.mark.parametrize(("instances", "stages"), [(1, 1), (2, 3), (3, 2), (4, 8)])
    def test_any_shape_settles(self, instances: int, stages: int) -> None:
        assert decided(healthy_world(instances=instances, stages=stages)) == []


class TestMissingPods:
    def test_a_pod_that_is_gone_is_made_again(self) -> None:
        assert created(without_pod(healthy_world(), stage(0, 1))) == [pod(obj(), stage(0, 1)).name]

    def test_a_pod_that_hangs_in_terminating_is_replaced_under_another_name(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), leaving=True, ready=False)
        (name,) = created(world)
        assert name.startswith("tiny-0-s1-")
        assert name != pod(obj(), stage(0, 1)).name

    def test_an_evicted_pod_is_deleted_and_replaced_at_once(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), leaving=True, ended=True, ready=False)
        assert deleted(world) == [pod(obj(), stage(0, 1)).name]
        assert len(created(world)) == 1

    def test_a_killed_container_is_left_to_the_kubelet(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), ready=False, restarts=1, last_exit=Exit(137, ""))
        assert created(world) == deleted(world) == []

    def test_of_two_pods_for_one_place_the_older_stays(self) -> None:
        world = healthy_world()
        second = pod(world.object, stage(0, 1), name="second", uid="uid-second", created=NOW)
        assert deleted(replace(world, pods=(*world.pods, second))) == ["second"]

    def test_a_refused_pod_is_asked_for_again_only_later(self) -> None:
        world = without_pod(healthy_world(), stage(0, 1))
        name = pod(world.object, stage(0, 1)).name
        refused = replace(world, refusals={name: Refusal("exceeded quota", NOW)})
        assert of_type(decided(refused, NOW + timedelta(seconds=5)), CreatePod) == []
        assert len(of_type(decided(refused, NOW + timedelta(seconds=20)), CreatePod)) == 1

    def test_deletes_name_the_very_pod(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), leaving=True, ended=True)
        (action,) = of_type(decided(world), DeletePod)
        assert action.uid == pod(obj(), stage(0, 1)).uid


class TestPlan:
    def test_is_published_when_an_instance_has_all_its_addresses(self) -> None:
        world = with_pods(new_world())
        for instance in (0, 1):
            world = with_engine(world, instance, engine_state(instance, phase=EnginePhase.STARTING, plan_version=0))
        plans = {each.plan.instance: each.plan for each in of_type(decided(world), PublishPlan)}
        assert [ref.address for ref in plans[0].stages] == ["10.0.0.1:7000", "10.0.0.2:7000"]
        assert [str(ref.id) for ref in plans[0].donors[1]] == ["1.1"]
        assert plans[0].name == "default/tiny"
        assert plans[0].limits.wait_for_donor_seconds == 30
        assert plans[0].replication == "Ring"

    def test_is_written_down_before_it_is_published(self) -> None:
        world = with_engine(with_pods(new_world()), 0, engine_state(0, plan_version=0))
        kinds = [type(action) for action in decided(world)]
        assert kinds.index(WriteStatus) < kinds.index(PublishPlan)

    def test_is_told_again_to_an_engine_that_forgot_it(self) -> None:
        world = with_engine(healthy_world(), 1, engine_state(1, plan_version=0))
        (publication,) = of_type(decided(world), PublishPlan)
        assert (publication.plan.instance, publication.plan.version) == (1, 1)

    def test_changes_its_version_when_a_stage_has_another_address(self) -> None:
        world = with_pod(healthy_world(), stage(0, 1), ip="10.0.9.9")
        publications = of_type(decided(world), PublishPlan)
        assert [(p.plan.instance, p.plan.version) for p in publications] == [(0, 2), (1, 2)]
        assert status_of(world).plan != world.object.status.plan

    def test_a_change_of_replication_is_published_and_restarts_nothing(self) -> None:
        world = with_spec(healthy_world(), replication={"mode": "None"})
        publications = of_type(decided(world), PublishPlan)
        assert [(p.plan.version, p.plan.replication) for p in publications] == [(2, "None"), (2, "None")]
        assert created(world) == deleted(world) == []
        assert condition(world, "Progressing")[:2] == ("False", "AsSpecified")

    def test_keeps_the_address_of_a_lost_stage_until_the_next_one_has_an_address(self) -> None:
        lost = with_pod(healthy_world(), stage(0, 1), leaving=True)
        successor = pod(lost.object, stage(0, 1), name="next", uid="uid-next", ip=None, ready=False)
        for world in (lost, replace(lost, pods=(*lost.pods, successor))):
            addresses = {p.plan.donors[1][0].address for p in of_type(decided(world), PublishPlan) if p.plan.instance}
            assert addresses == {"10.0.0.2:7000"}
        successor = replace(successor, ip="10.0.9.9")
        told = of_type(decided(replace(lost, pods=(*lost.pods, successor))), PublishPlan)
        assert [p.plan.donors[1][0].address for p in told if p.plan.instance] == ["10.0.9.9:7000"]

    def test_outbids_what_engines_hold_when_the_status_was_lost(self) -> None:
        world = healthy_world()
        forgotten = replace(world, object=replace(world.object, status=obj().status))
        for instance in (0, 1):
            forgotten = with_engine(forgotten, instance, engine_state(instance, plan_version=7))
        assert {p.plan.version for p in of_type(decided(forgotten), PublishPlan)} == {8}

    def test_of_the_same_content_keeps_its_version(self) -> None:
        plan = healthy_world().object.status.plan
        assert plan == PlanStatus(version=1, hash=plan.hash if plan else "")


class TestVerification:
    def test_an_engine_that_says_it_serves_must_give_a_token_first(self) -> None:
        world = with_engine(with_pods(new_world()), 0, engine_state(0), verified=False)
        (verify,) = of_type(decided(world), VerifyEngine)
        assert (verify.ip, verify.served_name) == ("10.0.0.10", "tiny")
        assert status_of(world).instances[0].phase == "Verifying"
        assert status_of(world).ready == "0/2"

    def test_a_restarted_engine_proves_itself_again(self) -> None:
        world = with_pod(healthy_world(), engine(0), restarts=1)
        assert len(of_type(decided(world), VerifyEngine)) == 1

    def test_an_engine_that_does_not_serve_is_not_asked(self) -> None:
        world = with_engine(healthy_world(), 0, engine_state(0, phase=EnginePhase.ATTACHING, serving=False))
        assert of_type(decided(world), VerifyEngine) == []

    def test_the_name_of_the_model_may_be_given(self) -> None:
        model = {"path": "/models/tiny", "servedName": "gpt"}
        world = with_engine(with_pods(new_world(model=model)), 0, engine_state(0), verified=False)
        assert of_type(decided(world), VerifyEngine)[0].served_name == "gpt"


class TestEndpoints:
    @staticmethod
    def told(world: World) -> dict[str, tuple[bool, bool, bool]]:
        """By address: ready, serving, terminating."""
        (action,) = of_type(decided(world), ApplyEndpoints)
        return {
            each["addresses"][0]: tuple(each["conditions"][key] for key in ("ready", "serving", "terminating"))
            for each in action.manifest["endpoints"]
        }

    def test_an_unverified_engine_gets_no_requests(self) -> None:
        world = with_engine(with_pods(new_world()), 0, engine_state(0), verified=False)
        assert self.told(world)["10.0.0.10"] == (False, False, False)

    def test_a_silent_engine_gets_no_requests_and_the_other_goes_on(self) -> None:
        told = self.told(silent(healthy_world(), 0))
        assert told == {"10.0.0.10": (False, False, False), "10.0.0.20": (True, True, False)}

    def test_routes_come_first_of_all(self) -> None:
        assert isinstance(decided(silent(healthy_world(), 0))[0], ApplyEndpoints)

    def test_an_engine_that_proved_itself_comes_in_once_that_is_written_down(self) -> None:
        """An operator that ended in between would not know of the proof, and would have it leave again."""
        world = settled(with_engine(healthy_world(), 0, engine_state(0), verified=False))
        kinds = [type(action) for action in decided(with_engine(world, 0, engine_state(0)))]
        assert kinds.index(WriteStatus) < kinds.index(ApplyEndpoints)

    def test_a_terminating_engine_that_still_serves_is_told_so(self) -> None:
        world = with_pod(healthy_world(), engine(0), leaving=True)
        assert self.told(world)["10.0.0.10"] == (False, True, True)

    def test_a_borrowing_instance_keeps_its_requests(self) -> None:
        assert of_type(decided(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))), ApplyEndpoints) == []

    def test_an_operator_that_has_heard_of_no_engine_yet_takes_none_out(self) -> None:
        assert decided(replace(healthy_world(), engines={})) == []

    def test_a_service_that_somebody_else_made_is_left_alone(self) -> None:
        world = replace(new_world(), service_owner=Owner.FOREIGN)
        assert of_type(decided(world), ApplyService) == []
        assert condition(world, "Ready")[1] == "NameTaken"

    def test_a_changed_service_is_set_right(self) -> None:
        world = replace(healthy_world(), service={"ports": []})
        assert len(of_type(decided(world), ApplyService)) == 1


class TestChanges:
    """What follows when an instance has something to lose is in test_draining.py."""

    def test_an_instance_that_does_not_serve_is_replaced_at_once_with_all_of_its_pods(self) -> None:
        world = silent(with_spec(healthy_world(), args=["--max-model-len=1024"]), 0)
        assert {name.rsplit("-", 1)[0] for name in deleted(world)} == {"tiny-0-s0", "tiny-0-s1", "tiny-0-engine"}
        assert condition(world, "Progressing")[:2] == ("True", "RollingOut")

    def test_a_change_that_pods_do_not_see_replaces_none(self) -> None:
        assert deleted(with_spec(healthy_world(), service={"port": 8080})) == []

    def test_more_instances_add_pods(self) -> None:
        assert {name.split("-")[1] for name in created(with_spec(healthy_world(), instances=3))} == {"2"}


class TestDeletion:
    def test_leaves_everything_to_the_garbage_collector(self) -> None:
        world = without_pod(healthy_world(), stage(0, 0))
        assert decided(replace(world, object=replace(world.object, deleting=True))) == []

    def test_everything_that_is_made_names_its_owner(self) -> None:
        actions = decided(with_pods(new_world())) + decided(new_world())
        made = of_type(actions, CreatePod) + of_type(actions, CreateToken)
        for action in [*made, *of_type(actions, ApplyService), *of_type(actions, ApplyEndpoints)]:
            (owner,) = action.manifest["metadata"]["ownerReferences"]
            assert owner["uid"] == obj().uid and owner["controller"] is True


def test_what_was_done_is_not_decided_again() -> None:
    world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))
    assert decided(settled(world)) == []
