"""A planned move goes through its phases in order, and none of them lasts for ever."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.move import FLUSH_SECONDS, HOLD_SECONDS, Move, Phase, advance

BEGAN = 100.0
WANTED = (StageId(instance=0, stage=0), StageId(instance=1, stage=1))
HOLDING = Move(WANTED, BEGAN)
FLUSHING = replace(HOLDING, phase=Phase.FLUSH, held=BEGAN + 0.1)
READY = replace(FLUSHING, phase=Phase.STITCH, flushed=BEGAN + 0.2)
TOO_LATE = replace(HOLDING, phase=Phase.STITCH, held=BEGAN + HOLD_SECONDS)


@pytest.mark.parametrize(
    ("move", "is_held", "is_flushed", "after_seconds", "expected"),
    [
        (HOLDING, False, False, 0.1, Phase.HOLD),
        (HOLDING, False, True, 0.1, Phase.HOLD),  # nobody was asked yet
        (HOLDING, True, False, 0.1, Phase.FLUSH),
        (HOLDING, True, True, 0.1, Phase.FLUSH),
        (HOLDING, False, False, HOLD_SECONDS, Phase.STITCH),
        (FLUSHING, True, False, 0.2, Phase.FLUSH),
        (FLUSHING, True, True, 0.2, Phase.STITCH),
        (FLUSHING, True, False, 0.1 + FLUSH_SECONDS, Phase.STITCH),
        (READY, False, False, 0.3, Phase.STITCH),
        (TOO_LATE, False, False, HOLD_SECONDS + 1, Phase.STITCH),
    ],
)
def test_what_comes_next(move: Move, is_held: bool, is_flushed: bool, after_seconds: float, expected: Phase) -> None:
    assert advance(move, is_held, is_flushed, BEGAN + after_seconds).phase is expected


def test_the_end_of_each_part_is_noted() -> None:
    assert HOLDING.marks == ()
    assert READY.marks == (("hold", BEGAN + 0.1), ("flush", BEGAN + 0.2))
    assert TOO_LATE.marks == (("hold", BEGAN + HOLD_SECONDS),)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0.0, 0.5)), max_size=60))
def test_it_is_over_in_time_whatever_happens_and_never_goes_back(looks: list[tuple[bool, bool, float]]) -> None:
    move, now = HOLDING, BEGAN
    for is_held, is_flushed, seconds in [*looks, *[(False, False, 0.1)] * 60]:
        now += seconds
        before, move = move, advance(move, is_held, is_flushed, now)
        assert move.phase.value >= before.phase.value
        assert [name for name, _ in move.marks] == ["hold", "flush"][: len(move.marks)]
        assert all(BEGAN <= end <= now for _, end in move.marks)
    assert move.phase is Phase.STITCH
