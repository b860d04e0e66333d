"""What a planned move is judged to have cost: the worst that a stream saw of it, and nothing of other times."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from resilientllm_api.engine_state import Recovery, RecoveryKind
from resilientllm_cli.bench import move_report
from resilientllm_cli.bench.move_run import (
    AFTER_SECONDS,
    MoveRun,
    MoveSample,
    intervals_within,
    intervals_without,
    window,
)
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.streams import Stream

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
MOVE = MoveSample(RecoveryKind.MOVE, 1, 0.04, {"hold": 20.0, "total": 30.0}, 0, 900, 8)
BACK = replace(MOVE, kind=RecoveryKind.SWAP_BACK, worst_interval_seconds=0.06)
RUN = MoveRun((MOVE, BACK), (0.01, 0.02, 0.03), None, Tokens(100), ())
TERMINATED = MoveRun((replace(MOVE, worst_interval_seconds=0.05),), (), 0.4, Tokens(100), ())


def stream(*arrivals: float) -> Stream:
    return Stream(0, tokens=[1] * len(arrivals), arrivals_seconds=list(arrivals), finish_reason="length")


def test_every_interval_counts_either_to_the_move_or_to_the_rest() -> None:
    streams = [stream(0, 1, 2, 7, 8, 9), stream(0, 4, 10)]
    seen = (3.0, 6.0)
    assert intervals_within(streams, [seen]) == [5, 4, 6]
    assert intervals_without(streams, [seen]) == [1, 1, 1, 1]
    assert intervals_without(streams, [seen, (8.5, 8.6)]) == [1, 1, 1]


def test_a_move_lasts_from_when_it_began_until_all_streams_had_a_token() -> None:
    at = EPOCH + timedelta(seconds=100)
    move = Recovery(
        id="m", kind=RecoveryKind.MOVE, stages=(1,), detected_at=at, resumed_at=at + timedelta(seconds=0.05)
    )
    start, end = window(move, EPOCH.timestamp())
    assert start == pytest.approx(100)
    assert end == pytest.approx(100.05 + AFTER_SECONDS)
    with pytest.raises(ValueError, match="not over"):
        window(move.model_copy(update={"resumed_at": None}), 0.0)


def test_the_document_has_a_sample_for_every_move_and_keeps_signals_apart() -> None:
    found = json.loads(json.dumps(move_report.document([RUN, RUN, TERMINATED])))
    assert found["move"]["worst_interval_seconds"]["samples"] == [0.04, 0.04]
    assert found["swap_back"]["worst_interval_seconds"]["p50"] == 0.06
    assert found["sigterm"]["worst_interval_seconds"]["samples"] == [0.05]
    assert found["sigterm_to_end_seconds"]["samples"] == [0.4]
    assert found["move"]["tokens_recomputed"] == [0, 0]
    assert found["move"]["phases_ms"]["hold"]["p50"] == 20.0
    assert found["undisturbed_interval_seconds"] == {"n": 6, "p50": 0.02, "p99": 0.03, "max": 0.03}
    assert found["tokens"]["delivered"] == 300
    move_report.table(found)


def test_nothing_measured_is_null() -> None:
    found = move_report.document([])
    assert found["move"]["worst_interval_seconds"]["p50"] is None
    assert found["undisturbed_interval_seconds"]["max"] is None
    move_report.table(found)
