"""What a client lost, by tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_cli.comparison import Tokens, compare, percentile, stall_seconds, total

UNDISTURBED = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("delivered", "found"),
    [
        pytest.param([1, 2, 3, 4, 5, 6, 7, 8], Tokens(8), id="the same"),
        pytest.param([1, 2, 3, 4, 5], Tokens(5, lost=3), id="cut off"),
        pytest.param([], Tokens(0, lost=8), id="nothing came"),
        pytest.param([1, 2, 5, 6, 7, 8], Tokens(6, lost=2), id="two left out"),
        pytest.param([1, 2, 3, 3, 4, 5, 6, 7, 8], Tokens(9, duplicated=1), id="one twice"),
        pytest.param([1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8], Tokens(11, duplicated=3), id="three again"),
        pytest.param([1, 2, 3, 9, 5, 6, 7, 8], Tokens(8, changed=1), id="one other"),
        pytest.param([1, 2, 3, 99, 4, 5, 6, 7, 8], Tokens(9, changed=1), id="one too many, of no origin"),
        pytest.param([1, 2, 3, 94, 95, 96, 97, 98], Tokens(8, changed=5), id="another course"),
        pytest.param([1, 2, 3, 94, 95], Tokens(5, lost=3, changed=2), id="another course, cut off"),
    ],
)
def test_tokens_are_counted_by_what_happened_to_them(delivered: list[int], found: Tokens) -> None:
    assert compare(UNDISTURBED, delivered) == found


@given(st.lists(st.integers(0, 5)), st.lists(st.integers(0, 5)))
def test_only_equal_streams_are_unharmed(expected: list[int], delivered: list[int]) -> None:
    assert compare(expected, delivered).unharmed == (expected == delivered)


def test_streams_add_up() -> None:
    assert total([Tokens(3, lost=1), Tokens(4, changed=2)]) == Tokens(7, lost=1, changed=2)


@pytest.mark.parametrize(
    ("arrivals", "since", "stall"),
    [
        pytest.param([0, 1, 2, 3, 4], None, 0, id="no stall"),
        pytest.param([0, 1, 2, 5, 6], None, 2, id="the gap, less a normal one"),
        pytest.param([0, 4, 5, 6, 8, 9], 5.5, 1, id="gaps before the disturbance do not count"),
        pytest.param([0, 1, 2, 5, 6], 2.5, 2, id="a gap that the disturbance fell into counts"),
    ],
)
def test_a_stall_is_the_largest_gap_less_the_median(arrivals: list[float], since: float | None, stall: float) -> None:
    assert stall_seconds(arrivals, since) == stall


def test_a_stream_that_was_over_says_nothing_of_a_stall() -> None:
    with pytest.raises(ValueError, match="the stream was over"):
        stall_seconds([0, 1, 2], since_seconds=3)


@pytest.mark.parametrize(
    ("samples", "percent", "value"),
    [
        ([3, 1, 2], 50, 2),
        ([3, 1, 2, 4], 50, 2),
        ([5], 99, 5),
        (list(range(1, 21)), 99, 20),
        (list(range(200)), 99, 197),
    ],
)
def test_a_percentile_is_a_measured_sample(samples: list[float], percent: float, value: float) -> None:
    assert percentile(samples, percent) == value
