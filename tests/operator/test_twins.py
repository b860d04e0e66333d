"""Who can give a stage its weights, when its pod is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from resilientllm_api.crd import NodeAction
from resilientllm_operator.actions import CreatePod
from resilientllm_operator.names import Slot, slot_labels
from resilientllm_operator.signals import Signal
from resilientllm_operator.twins import MAX_TWINS, twins
from resilientllm_operator.world import World

from tests.operator.builders import decided, engine, healthy_world, of_type, stage, with_pod, with_spec, without_pod

LOST = stage(1, 0)


def address(world: World, slot: Slot) -> str:
    pod = world.current(slot)
    assert pod is not None
    return f"{pod.ip}:7000"


def made_with(world: World, slot: Slot) -> list[str]:
    """The flag of the pod that is made for the slot."""
    (created,) = [
        each for each in of_type(decided(world), CreatePod) if each.manifest["metadata"]["labels"] == labels(slot)
    ]
    command = created.manifest["spec"]["containers"][0]["command"]
    return [flag for flag in command if flag.startswith("--weights-from")]


def labels(slot: Slot) -> dict[str, str]:

    return slot_labels("tiny", slot)


def test_a_lost_stage_is_made_again_with_the_address_of_its_living_copy() -> None:
    world = without_pod(healthy_world(), LOST)
    assert made_with(world, LOST) == [f"--weights-from={address(world, stage(0, 0))}"]


def test_a_new_object_has_nobody_to_ask() -> None:
    world = healthy_world()
    assert made_with(replace(world, pods=()), LOST) == []


@pytest.mark.parametrize(
    "change",
    [{"ready": False}, {"ip": None}, {"leaving": True}, {"spec_hash": "older"}],
    ids=["not ready", "no address", "leaving", "of an older spec"],
)
def test_a_copy_that_may_have_nothing_to_give_is_not_asked(change: dict[str, Any]) -> None:
    assert twins(without_pod(with_pod(healthy_world(), stage(0, 0), **change), LOST), LOST, {}) == ()


def test_weights_from_storage_are_asked_of_nobody() -> None:
    assert twins(healthy_world(recovery={"weights": "Storage"}), LOST, {}) == ()


def test_an_engine_has_no_weights() -> None:
    assert twins(healthy_world(), engine(1), {}) == ()


def test_a_roll_out_does_not_hand_the_old_weights_on() -> None:
    world = with_spec(healthy_world(), image="other")
    assert twins(world, LOST, {}) == ()


def test_the_next_instance_is_asked_first_and_not_all_are() -> None:
    world = healthy_world(instances=5)
    asked = twins(world, stage(3, 1), {})
    assert asked == tuple(address(world, stage(instance, 1)) for instance in (4, 0, 1))
    assert len(asked) == MAX_TWINS


def signal(world: World, slot: Slot, action: NodeAction) -> dict[str, Signal]:
    pod = world.current(slot)
    assert pod is not None
    return {pod.uid: Signal(action, "for a test")}


def test_the_pod_that_is_replaced_is_asked_last() -> None:
    """It still works, and where there is one instance only, nobody else has the weights."""
    world = healthy_world()
    asked = twins(world, LOST, signal(world, LOST, NodeAction.MOVE))
    assert asked == (address(world, stage(0, 0)), address(world, LOST))


def test_one_that_has_to_go_is_asked_after_those_that_stay() -> None:
    world = healthy_world(instances=3)
    asked = twins(without_pod(world, LOST), LOST, signal(world, stage(2, 0), NodeAction.MOVE))
    assert asked == (address(world, stage(0, 0)), address(world, stage(2, 0)))


def test_one_that_is_not_to_be_trusted_is_not_asked() -> None:
    world = healthy_world()
    assert twins(without_pod(world, LOST), LOST, signal(world, stage(0, 0), NodeAction.BORROW)) == ()
