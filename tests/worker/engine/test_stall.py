"""An instance is sick when it has work, or could take none, and nothing moves: not when a thread does not answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.engine.stall import LATE_LOOKS, Stall, sickness

LOOK = 0.5


def looked(looks: int, stall: Stall | None = None, *, busy: bool = True, serving: bool = True, steps: int = 0) -> Stall:
    stall = stall or Stall(100.0)
    for _ in range(looks):
        stall = stall.after(stall.at + LOOK, steps, busy, serving, LOOK)
    return stall


def test_requests_of_which_nothing_comes_are_a_stall() -> None:
    assert looked(60).seconds == 30.0


def test_an_idle_instance_that_could_serve_is_well() -> None:
    assert looked(600, busy=False).seconds == 0.0


def test_an_idle_instance_that_could_not_is_not() -> None:
    assert looked(60, busy=False, serving=False).seconds == 30.0


def test_every_step_is_a_movement() -> None:
    assert looked(1, looked(60), steps=1).seconds == 0.0


def test_requests_that_fail_are_none() -> None:
    """They come and go, and nobody gets a token."""
    stall = looked(20, busy=True, serving=False)
    stall = looked(20, stall, busy=False, serving=False)
    assert looked(20, stall, busy=True, serving=False).seconds == 30.0


def test_it_is_over_when_the_pipeline_is_whole_and_nobody_waits() -> None:
    assert looked(1, looked(60), busy=False).seconds == 0.0


def test_a_process_that_was_stopped_for_an_hour_missed_two_looks() -> None:
    assert Stall(0.0).after(3600.0, 0, True, True, LOOK).seconds == LATE_LOOKS * LOOK


@pytest.mark.parametrize(
    ("seconds", "step_allowed", "sick"),
    [(29.0, 0.0, False), (31.0, 2.0, True), (31.0, 60.0, False), (61.0, 60.0, True)],
)
def test_sick_is_what_stalls_for_longer_than_the_limit_and_than_a_step_may_take(
    seconds: float, step_allowed: float, sick: bool
) -> None:
    assert bool(sickness(Stall(0.0, 0, seconds), 30.0, step_allowed, True, "")) is sick


def test_it_says_what_it_waits_for() -> None:
    assert sickness(Stall(0.0, 0, 42.7), 30.0, 0.0, False, "waits for stage 0.1") == (
        "it could not have served a request for 42 s: waits for stage 0.1"
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 100.0), st.booleans(), st.booleans(), st.booleans()), max_size=50))
def test_a_stall_is_never_longer_than_since_the_last_movement(
    looks: list[tuple[float, bool, bool, bool]],
) -> None:
    stall, moved_at, steps = Stall(0.0), 0.0, 0
    for gap, moves, busy, serving in looks:
        now = stall.at + gap
        steps += moves
        moved_at = now if moves else moved_at
        stall = stall.after(now, steps, busy, serving, LOOK)
        assert 0.0 <= stall.seconds <= now - moved_at + 1e-6
