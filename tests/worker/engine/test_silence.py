"""Silence counts only as far as the engine was awake to hear something."""

from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.engine.silence import Silences

TICK = 0.1


def test_it_grows_with_every_tick_in_which_nothing_came() -> None:
    silences: Silences[str] = Silences(10.0)
    for count in range(1, 6):
        silences = silences.after(10.0 + count * TICK, {"a": 10.0}, TICK)
        assert abs(silences.of["a"] - count * TICK) < 1e-9


def test_it_ends_with_a_word() -> None:
    silences: Silences[str] = Silences(10.0, {"a": 0.7, "b": 0.7}).after(10.1, {"a": 10.08, "b": 9.3}, TICK)
    assert abs(silences.of["a"] - 0.02) < 1e-9
    assert abs(silences.of["b"] - 0.8) < 1e-9


def test_an_engine_that_slept_for_an_hour_has_missed_two_ticks() -> None:
    silences: Silences[str] = Silences(10.0, {"a": 0.1}).after(3610.0, {"a": 9.9}, TICK)
    assert silences.of["a"] <= 0.1 + 2 * TICK + 1e-9


def test_who_is_not_connected_any_more_is_forgotten() -> None:
    silences: Silences[str] = Silences(10.0, {"a": 0.7}).after(10.1, {}, TICK)
    assert silences.after(10.2, {"a": 10.15}, TICK).of["a"] < TICK


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=40), st.lists(st.booleans(), min_size=40, max_size=40))
def test_it_is_never_more_than_the_truth_nor_than_the_ticks_allow(gaps: list[float], speaks: list[bool]) -> None:
    now = heard = 0.0
    silences: Silences[str] = Silences(now)
    quiet_ticks = 0
    for gap, word in zip(gaps, speaks, strict=False):
        now += gap
        if word:
            heard = now
        quiet_ticks = 0 if word else quiet_ticks + 1
        silences = silences.after(now, {"a": heard}, TICK)
        assert silences.of["a"] <= now - heard + 1e-6
        assert silences.of["a"] <= quiet_ticks * 2 * TICK + 1e-6
