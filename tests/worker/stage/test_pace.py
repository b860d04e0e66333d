"""What a stage tells of how long its steps take: a device that becomes slow shows, and single long steps do not."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Pace
from resilientllm_worker.stage.pace import FEW, HISTORY_SECONDS, LAST_STEPS, Steps

DECODE, PREFILL = 3, 11


def told(steps: Steps) -> Pace:
    pace = steps.pace()
    assert pace is not None
    return pace


def at(seconds: float, count: int = FEW + LAST_STEPS, steps: Steps | None = None, size: int = DECODE) -> Steps:
    steps = steps or Steps()
    for _ in range(count):
        steps.observe(size, seconds)
    return steps


def test_nothing_is_told_before_enough_is_known() -> None:
    assert at(0.02, FEW + LAST_STEPS - 1).pace() is None
    assert told(at(0.02)) == Pace(LAST_STEPS, pytest.approx(1.0), [(DECODE, pytest.approx(0.02))])  # type: ignore[arg-type,list-item]


def test_a_stage_that_becomes_slow_says_by_how_much() -> None:
    steps = at(0.06, LAST_STEPS, at(0.02))
    assert told(steps).ratio == pytest.approx(3.0, rel=0.02)


def test_sizes_are_compared_with_their_own_history() -> None:
    steps = at(2.0, FEW, at(0.02, FEW), size=PREFILL)
    for _ in range(LAST_STEPS):
        steps.observe(DECODE, 0.02)
        steps.observe(PREFILL, 2.0)
    assert told(steps).ratio == pytest.approx(1.0)


def test_what_compiled_is_no_history() -> None:
    steps = Steps()
    steps.observe(DECODE, 40.0)
    assert told(at(0.02, steps=steps)).ratio == pytest.approx(1.0)


def test_what_has_been_so_for_long_is_how_it_is() -> None:
    steps = at(0.3, round(5 * HISTORY_SECONDS / 0.3), at(0.1))
    assert told(steps).ratio < 1.1


@settings(deadline=None, max_examples=30)
@given(st.floats(0.001, 2.0), st.integers(0, 2**32))
def test_long_steps_now_and_then_do_not_show(usual: float, seed: int) -> None:
    """One in ten takes up to fifty times as long, and all of them vary by a fifth."""
    chance, steps = random.Random(seed), Steps()
    for _ in range(400):
        steps.observe(
            DECODE, usual * chance.uniform(0.8, 1.2) * (chance.uniform(1, 50) if chance.random() < 0.1 else 1)
        )
        pace = steps.pace()
        assert pace is None or pace.ratio < 1.4
