"""Valid objects that cannot work: a condition with a reason and what to do, and no restart loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
from resilientllm_api.engine_state import EnginePhase
from resilientllm_operator.actions import Announce, CreatePod, DeletePod
from resilientllm_operator.world import EngineView, Exit, Owner, Refusal, Waiting, World

from tests.operator.builders import (
    NOW,
    condition,
    decided,
    engine,
    engine_state,
    healthy_world,
    new_world,
    of_type,
    pod,
    settled,
    stage,
    status_of,
    with_engine,
    with_pod,
    with_pods,
    with_spec,
    without_pod,
)

NOT_ENOUGH_NODES = "0/3 nodes are available: 3 node(s) didn't match pod anti-affinity rules."
BAD_PATH = Exit(2, "INFO something\nresilientllm-stage: expected a model in /models/nope, found no such folder\n")


def starting() -> World:
    """Pods exist and are not ready; no engine answers."""
    world = with_pods(new_world())
    return replace(world, pods=tuple(replace(each, ready=False) for each in world.pods))


class TestBadConfiguration:
    @staticmethod
    def world() -> World:
        return with_pod(starting(), stage(0, 0), last_exit=BAD_PATH, restarts=1)

    def test_is_a_condition_with_the_last_words_and_the_way_out(self) -> None:
        status, reason, message = condition(self.world(), "Ready")
        assert (status, reason) == ("False", "ConfigurationRejected")
        assert "expected a model in /models/nope, found no such folder" in message
        assert "kubectl -n default edit rllm tiny" in message
        assert "resilientllm.dev/retry" in message
        assert condition(self.world(), "Progressing")[:2] == ("False", "ConfigurationRejected")

    def test_ends_the_restart_loop(self) -> None:
        (action,) = of_type(decided(self.world()), DeletePod)
        assert action.name == pod(self.world().object, stage(0, 0)).name

    def test_the_pod_is_not_made_again_and_the_evidence_stays(self) -> None:
        held = without_pod(settled(self.world()), stage(0, 0))
        assert of_type(decided(held), CreatePod) == []
        assert condition(held, "Ready")[1] == "ConfigurationRejected"
        hold = status_of(held).hold
        assert hold is not None
        assert hold.message == "resilientllm-stage: expected a model in /models/nope, found no such folder"

    def test_a_new_spec_is_tried(self) -> None:
        held = without_pod(settled(self.world()), stage(0, 0))
        assert len(of_type(decided(with_spec(held, model={"path": "/models/other"})), CreatePod)) == 1

    def test_the_retry_annotation_tries_the_same_spec_again(self) -> None:
        held = without_pod(settled(self.world()), stage(0, 0))
        again = replace(held, object=replace(held.object, retry="now"))
        assert len(of_type(decided(again), CreatePod)) == 1
        assert status_of(again).hold is None

    def test_other_pods_that_work_are_left_alone(self) -> None:
        world = with_pod(healthy_world(), stage(0, 0), ready=False, last_exit=BAD_PATH)
        assert len(of_type(decided(world), DeletePod)) == 1
        assert condition(world, "Available")[0] == "True"

    def test_a_process_that_recovered_is_not_held_against_it(self) -> None:
        world = with_pod(healthy_world(), stage(0, 0), last_exit=BAD_PATH)
        assert decided(settled(world)) == []
        assert status_of(world).hold is None

    def test_stops_a_roll_out_where_it_is(self) -> None:
        world = with_spec(healthy_world(), args=["--nonsense"])
        for slot in (stage(0, 0), stage(0, 1), engine(0)):
            world = with_pod(world, slot, spec_hash=pod(world.object, slot).spec_hash, ready=False, last_exit=BAD_PATH)
        assert {action.name.split("-")[1] for action in of_type(decided(world), DeletePod)} == {"0"}

    def test_is_announced_once(self) -> None:
        def warnings(world: World) -> list[str]:
            return [event.reason for event in of_type(decided(world), Announce)]

        assert warnings(self.world()) == ["ConfigurationRejected"]
        assert warnings(without_pod(settled(self.world()), stage(0, 0))) == []


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"unschedulable": NOT_ENOUGH_NODES}, "Unschedulable", "add nodes, or ask for fewer instances"),
        ({"unschedulable": "0/3 nodes are available: 3 Insufficient cpu."}, "Unschedulable", "spec.stage.resources"),
        (
            {"unschedulable": 'persistentvolumeclaim "models" not found.'},
            "Unschedulable",
            "Make the claim that spec.model.volume names",
        ),
        ({"waiting": Waiting("ErrImagePull", "not found")}, "ImagePullFailed", "Correct spec.image"),
        ({"waiting": Waiting("ImagePullBackOff", "Back-off pulling image")}, "ImagePullFailed", "on node node-0"),
        (
            {"waiting": Waiting("CreateContainerConfigError", 'secret "hf" not found')},
            "ContainerCannotStart",
            'secret "hf" not found',
        ),
        (
            {"waiting": Waiting("CrashLoopBackOff", ""), "restarts": 4, "last_exit": Exit(139, "Segmentation fault")},
            "ContainerCrashing",
            "exit code 139: Segmentation fault",
        ),
    ],
)
class TestPodsThatCannotRun:
    @staticmethod
    def world(changes: dict[str, object]) -> World:
        return with_pod(starting(), stage(0, 0), **changes)

    def test_are_named_with_a_reason_and_a_next_step(self, changes: dict[str, object], reason: str, words: str) -> None:
        status, found, message = condition(self.world(changes), "Ready")
        assert (status, found) == ("False", reason)
        assert pod(new_world().object, stage(0, 0)).name in message
        assert words in message

    def test_wait_for_a_person_and_cause_no_churn(self, changes: dict[str, object], reason: str, words: str) -> None:
        world = self.world(changes)
        assert condition(world, "Progressing")[:2] == ("False", reason)
        assert of_type(decided(world), CreatePod, DeletePod) == []
        assert decided(settled(world)) == []


def test_a_killed_stage_is_no_trouble() -> None:
    world = with_pod(healthy_world(), stage(0, 0), ready=False, restarts=1, last_exit=Exit(137, ""))
    assert condition(world, "Progressing")[:2] == ("True", "RestoringCapacity")


def test_a_refused_pod_is_told_in_the_words_of_the_api_server() -> None:
    world = replace(without_pod(starting(), stage(0, 0)), refusals={"tiny-0-s0-x": Refusal("exceeded quota", NOW)})
    status, reason, message = condition(world, "Ready")
    assert (status, reason) == ("False", "PodRefused")
    assert "exceeded quota" in message


def test_a_foreign_secret_is_never_used() -> None:
    world = replace(new_world(), token=Owner.FOREIGN)
    assert condition(world, "Ready")[1] == "NameTaken"
    assert of_type(decided(world), CreatePod) == []


def test_an_engine_that_cannot_attach_says_why() -> None:
    failed = engine_state(0, phase=EnginePhase.FAILED, serving=False, message="stage 0.1 has other weights")
    status, reason, message = condition(with_engine(with_pods(new_world()), 0, failed), "Ready")
    assert (status, reason) == ("False", "EngineFailed")
    assert "stage 0.1 has other weights" in message


def test_an_engine_that_gives_no_token_is_not_ready() -> None:
    world = with_engine(with_pods(new_world()), 0, engine_state(0), verified=False)
    engine_pod = world.engine_pod(0)
    assert engine_pod is not None
    view: EngineView = replace(world.engines[engine_pod.uid], verify_error="500 Internal Server Error")
    status, reason, message = condition(replace(world, engines={engine_pod.uid: view}), "Ready")
    assert (status, reason) == ("False", "VerificationFailed")
    assert "500 Internal Server Error" in message


def test_several_troubles_show_the_first_and_their_number() -> None:
    world = starting()
    for slot in (stage(0, 0), stage(0, 1), stage(1, 0)):
        world = with_pod(world, slot, unschedulable=NOT_ENOUGH_NODES)
    assert "(and 2 other troubles)" in condition(world, "Ready")[2]
