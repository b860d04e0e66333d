"""An object that is settled is left in peace; one that is not is looked at every two seconds."""

from __future__ import annotations

import pytest
from resilientllm_operator.pace import SETTLED_SECONDS, UNSETTLED_SECONDS, is_settled, pause_seconds, spread

from tests.operator.builders import borrowed, healthy_world, new_world, obj, status_of, with_engine


@pytest.mark.parametrize("settled", [True, False])
def test_after_a_round_that_did_something_comes_another_soon(settled: bool) -> None:
    assert pause_seconds(0, settled) == 0.5


def test_quiet_rounds_become_rare() -> None:
    assert [pause_seconds(quiet, False) for quiet in (1, 2, 1000)] == [1.0, 2.0, UNSETTLED_SECONDS]
    assert [pause_seconds(quiet, True) for quiet in (3, 1000)] == [4.0, SETTLED_SECONDS]


def test_objects_that_became_ready_together_do_not_stay_together() -> None:
    assert [spread(30.0, chance) for chance in (0.0, 0.5, 1.0)] == [15.0, 22.5, 30.0]


def test_a_healthy_object_is_settled() -> None:
    status = healthy_world().object.status
    assert is_settled(status, obj().generation)
    assert not is_settled(status, obj().generation + 1), "its spec was changed since"


def test_a_new_object_and_one_with_a_donor_are_not() -> None:
    assert not is_settled(new_world().object.status, 1)
    assert not is_settled(status_of(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))), 1)
