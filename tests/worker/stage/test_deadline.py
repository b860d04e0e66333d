"""Steps that are long for an honest reason are never overdue; one that is stuck is, soon."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import CachedRequests, NewRequest
from resilientllm_worker.stage.deadline import (
    CONTEXT_TOKENS,
    FEW,
    FLOOR_SECONDS,
    RISES,
    SLACK,
    UNFAMILIAR_SECONDS,
    UNKNOWN_SECONDS,
    Deadlines,
    size_class,
)

from tests.worker.stage.builders import a_step

DECODE, PREFILL = 3, 11


def knowing(seconds: float, size: int = DECODE, floor: float = FLOOR_SECONDS) -> Deadlines:
    deadlines = Deadlines(floor)
    for _ in range(FEW):
        deadlines.observe(size, seconds)
    return deadlines


class TestAllowed:
    def test_the_first_steps_of_all_may_compile(self) -> None:
        deadlines = Deadlines()
        for _ in range(FEW):
            assert deadlines.allowed(DECODE) == UNKNOWN_SECONDS
            deadlines.observe(DECODE, 0.01)
        assert deadlines.allowed(DECODE) == FLOOR_SECONDS

    def test_what_the_first_took_to_compile_is_not_what_the_others_may_take(self) -> None:
        deadlines = Deadlines()
        for seconds in (45.0, 0.5, 0.4):
            deadlines.observe(DECODE, seconds)
        assert deadlines.allowed(DECODE) == pytest.approx(SLACK * 0.5)

    def test_short_steps_have_the_floor(self) -> None:
        assert knowing(0.02).allowed(DECODE) == FLOOR_SECONDS
        assert knowing(0.02, floor=7.0).allowed(DECODE) == 7.0

    def test_long_steps_have_a_multiple_of_their_own_time(self) -> None:
        assert knowing(3.0).allowed(DECODE) == pytest.approx(SLACK * 3.0)

    def test_a_larger_step_may_take_at_least_what_a_smaller_one_may(self) -> None:
        deadlines = knowing(3.0, size=DECODE)
        for _ in range(FEW):
            deadlines.observe(DECODE + 1, 0.1)
        assert deadlines.allowed(DECODE + 1) >= deadlines.allowed(DECODE)

    def test_a_size_that_was_never_seen_grows_faster_than_its_tokens(self) -> None:
        deadlines = knowing(5.0, size=8)
        assert deadlines.allowed(9) > 2 * SLACK * 5.0
        assert deadlines.allowed(12) > 2**4 * SLACK * 5.0

    @pytest.mark.parametrize(("known", "size"), [(PREFILL, DECODE), (DECODE, DECODE + 1)])
    def test_the_first_steps_of_another_size_may_tune_something(self, known: int, size: int) -> None:
        deadlines = knowing(0.01, size=known)
        for _ in range(FEW):
            assert deadlines.allowed(size) == UNFAMILIAR_SECONDS
            deadlines.observe(size, 0.01)
        assert deadlines.allowed(size) == FLOOR_SECONDS

    def test_a_machine_that_becomes_slower_is_followed(self) -> None:
        """Four times slower at once, and again: nothing of it is overdue."""
        deadlines, seconds = knowing(0.4), 0.4
        for _ in range(4):
            seconds *= 4
            for _ in range(8):
                assert seconds < deadlines.allowed(DECODE)
                deadlines.observe(DECODE, seconds)

    def test_a_process_that_was_stopped_within_a_step_does_not_wait_for_ever_afterwards(self) -> None:
        deadlines = knowing(0.1)
        deadlines.observe(DECODE, 3600.0)
        assert deadlines.allowed(DECODE) <= RISES * FLOOR_SECONDS
        for _ in range(100):
            deadlines.observe(DECODE, 0.1)
        assert deadlines.allowed(DECODE) == FLOOR_SECONDS

    @settings(deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 14), st.floats(0.0, 1e4)), max_size=60),
        st.integers(0, 14),
        st.floats(0.1, 100.0),
    )
    def test_is_never_less_than_the_floor_and_never_without_end(
        self, seen: list[tuple[int, float]], size: int, floor: float
    ) -> None:
        deadlines = Deadlines(floor)
        for each, seconds in seen:
            deadlines.observe(each, seconds)
        assert floor <= deadlines.allowed(size) < float("inf")

    @settings(deadline=None)
    @given(st.floats(0.001, 100.0), st.lists(st.floats(1.0, SLACK - 0.1), max_size=80))
    def test_steps_within_the_slack_of_the_usual_are_never_overdue(self, usual: float, ratios: list[float]) -> None:
        deadlines = knowing(usual)
        for ratio in ratios:
            assert ratio * usual < deadlines.allowed(DECODE)
            deadlines.observe(DECODE, ratio * usual)


class TestSize:
    def test_is_a_power_of_two_of_the_tokens(self) -> None:
        sizes = [size_class(a_step(0, 1, num_scheduled_tokens=[("r", tokens)])) for tokens in (1, 2, 3, 4, 5, 512, 513)]
        assert sizes == [0, 1, 2, 2, 3, 9, 10]

    def test_counts_all_requests(self) -> None:
        assert size_class(a_step(0, 1, num_scheduled_tokens=[("r", 4), ("q", 4)])) == 3

    def test_weighs_tokens_by_what_they_attend_to(self) -> None:
        new = NewRequest("n", [1], None, b"", ([1],), 3 * CONTEXT_TOKENS)
        known = CachedRequests(["k"], [[]], [None], [7 * CONTEXT_TOKENS], [1])
        assert size_class(a_step(0, 1, new=[new], num_scheduled_tokens=[("n", 4)])) == 4
        assert size_class(a_step(0, 1, cached=known, num_scheduled_tokens=[("k", 1)])) == 3
