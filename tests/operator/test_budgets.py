"""How much may be evicted at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from resilientllm_operator.actions import ApplyBudget
from resilientllm_operator.names import slot_labels
from resilientllm_operator.world import World

from tests.operator.builders import (
    condition,
    decided,
    engine,
    healthy_world,
    new_world,
    obj,
    of_type,
    settled,
    stage,
    with_spec,
)


def applied(world: World) -> dict[str, dict[str, Any]]:
    """The budgets that are written, by name."""
    return {action.manifest["metadata"]["name"]: action.manifest for action in of_type(decided(world), ApplyBudget)}


def covers(budget: dict[str, Any], labels: dict[str, str]) -> bool:
    return bool(budget["spec"]["selector"]["matchLabels"].items() <= labels.items())


def test_there_is_one_for_each_stage_and_one_for_the_engines() -> None:
    assert list(applied(new_world())) == ["tiny-engines", "tiny-s0", "tiny-s1"]


def test_each_covers_the_pods_that_can_stand_in_for_each_other() -> None:
    budgets = applied(new_world())
    for instance in (0, 1):
        covered = {
            slot: [name for name, budget in budgets.items() if covers(budget, slot_labels("tiny", slot))]
            for slot in (stage(instance, 0), stage(instance, 1), engine(instance))
        }
        assert list(covered.values()) == [["tiny-s0"], ["tiny-s1"], ["tiny-engines"]]


def test_they_belong_to_the_object() -> None:
    for budget in applied(new_world()).values():
        assert budget["metadata"]["ownerReferences"][0]["uid"] == obj().uid


@pytest.mark.parametrize(("instances", "must_stay"), [(1, 0), (2, 1), (5, 4)])
def test_one_at_a_time_may_go_also_the_only_one(instances: int, must_stay: int) -> None:
    budgets = applied(new_world(instances=instances))
    assert {budget["spec"]["minAvailable"] for budget in budgets.values()} == {must_stay}


def test_they_follow_the_number_of_instances_and_nothing_else() -> None:
    world = healthy_world()
    assert applied(world) == {}
    assert applied(with_spec(world, args=["--max-model-len=64"])) == {}
    assert len(applied(with_spec(world, instances=3))) == 3


def test_a_changed_one_is_set_right() -> None:
    world = healthy_world()
    assert list(applied(replace(world, budgets={**world.budgets, "tiny-s1": {"minAvailable": 0}}))) == ["tiny-s1"]


def test_somebody_elses_is_left_alone_and_named() -> None:
    world = settled(replace(new_world(), budgets={"tiny-s1": None}))
    assert "tiny-s1" not in applied(world)
    status, reason, message = condition(world, "Ready")
    assert (status, reason) == ("False", "NameTaken")
    assert "PodDisruptionBudget tiny-s1 exists" in message
