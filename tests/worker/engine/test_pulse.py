"""A stage's own time, as its heartbeats witness it."""

from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.engine.pulse import LATE_BEATS, STUCK_BEATS, Pulse, next_pulse
from resilientllm_worker.protocol.messages import Heartbeat

BEAT = 0.1


def a_beat(seconds: float = 0.0, allowed: float = 2.0, steps_done: int = 0) -> Heartbeat:
    return Heartbeat(steps_done, seconds, True, None, None, allowed if seconds else 0.0)


def after(*beats: Heartbeat, gap: float = BEAT) -> Pulse:
    pulse: Pulse | None = None
    for beat in beats:
        pulse = next_pulse(pulse, beat, gap, BEAT)
    assert pulse is not None
    return pulse


def test_time_goes_on_with_every_heartbeat() -> None:
    assert abs(after(*[a_beat()] * 10).witnessed - 1.0) < 1e-9


def test_a_heartbeat_that_came_an_hour_late_counts_for_two() -> None:
    assert after(a_beat(), gap=3600.0).witnessed == LATE_BEATS * BEAT


def test_heartbeats_that_were_held_up_and_come_at_once_take_no_time() -> None:
    assert after(*[a_beat()] * 50, gap=0.0).witnessed == 0.0


class TestStuck:
    def test_is_a_step_that_several_heartbeats_say_is_overdue(self) -> None:
        overdue = [a_beat(2.1 + count * BEAT) for count in range(STUCK_BEATS)]
        assert not after(*overdue[:-1]).is_stuck
        assert after(*overdue).is_stuck

    def test_is_not_a_stage_that_slept_within_a_step_and_does_it_now(self) -> None:
        """Its clock went on without it."""
        assert not after(a_beat(0.1), a_beat(900.0), a_beat(900.1), a_beat(steps_done=1)).is_stuck

    def test_is_not_a_row_of_different_steps(self) -> None:
        assert not after(*[a_beat(3.0, steps_done=count) for count in range(10)]).is_stuck

    def test_is_not_a_step_within_its_deadline(self) -> None:
        assert not after(*[a_beat(40.0, allowed=60.0)] * 50).is_stuck

    def test_ends_when_the_step_does(self) -> None:
        stuck = [a_beat(3.0)] * STUCK_BEATS
        assert not after(*stuck, a_beat()).is_stuck
        assert not after(*stuck, a_beat(0.1, steps_done=1)).is_stuck


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=30))
def test_witnessed_time_is_never_more_than_the_time_that_passed(gaps: list[float]) -> None:
    pulse: Pulse | None = None
    for gap in gaps:
        pulse = next_pulse(pulse, a_beat(), gap, BEAT)
    assert pulse is not None and pulse.witnessed <= sum(gaps) + 1e-6
