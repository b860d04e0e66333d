"""The verdict of the demo: everything that would make it prove nothing must fail it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from resilientllm_api.crd import RecoveryStatus

from e2e.demo.report import document, problems
from tests.demo.builders import KILLED, KILLED_MONOTONIC, RECOVERY, outcome, stream


def test_equal_streams_are_no_problem() -> None:
    assert list(problems(outcome())) == []


def test_document_has_the_promised_fields() -> None:
    written = document(outcome())

    assert written["streams"] == 2
    assert written["tokens"] == {"delivered": 40, "lost": 0, "duplicated": 0, "changed": 0}
    assert written["stall_seconds_max"] == pytest.approx(0.0, abs=1e-9)
    assert written["ready_seconds"] == 41.5
    assert list(written["recovery"]["phases_ms"].items()) == [
        ("fence", 1.0),
        ("stitch", 2.0),
        ("rollBack", 3.0),
        ("resume", 4.0),
        ("total", 10.0),
    ]
    assert written["recovery"]["detection_ms"] == pytest.approx(2.0)
    assert written["recovery"]["restored_after_seconds"] == pytest.approx(9.0)
    assert written["cluster"] == {"provider": "namespaces", "nodes": 3}
    assert written["ok"] is True


def test_gap_after_the_kill_is_the_stall() -> None:
    late = stream(0, list(range(20)))
    late.arrivals_seconds = [at + (0.5 if at > KILLED_MONOTONIC else 0.0) for at in late.arrivals_seconds]

    assert document(outcome(late, stream(1, list(range(50, 70)))))["stall_seconds_max"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (list(range(19)), "from token 19 on: 1 lost, 0 duplicated, 0 changed"),
        ([*range(10), *range(9, 20)], "0 lost, 1 duplicated, 0 changed"),
        ([*range(10), 99, *range(11, 20)], "from token 10 on: 0 lost, 0 duplicated, 1 changed"),
    ],
)
def test_stream_that_differs_is_a_problem(tokens: list[int], words: str) -> None:
    found = list(problems(outcome(stream(0, tokens), stream(1, list(range(50, 70))))))

    assert len(found) == 1 and words in found[0] and "stream 0" in found[0]


def test_difference_is_told_by_token_and_time() -> None:
    written = document(outcome(stream(0, [*range(10), 99, *range(11, 20)]), stream(1, list(range(50, 70)))))

    changed, equal = (each["difference"] for each in written["per_stream"])
    assert changed == {"token": 10, "seconds_after_kill": pytest.approx(0.05)}
    assert equal is None


def test_stream_that_ended_early_differs_where_it_ended() -> None:
    written = document(outcome(stream(0, list(range(19))), stream(1, list(range(50, 70)))))

    assert written["per_stream"][0]["difference"] == {"token": 19, "seconds_after_kill": None}


def test_stream_that_broke_is_a_problem_even_if_all_tokens_came() -> None:
    broken = stream(0, list(range(20)), error="APIError: gone")

    assert any("APIError: gone" in each for each in problems(outcome(broken, stream(1, list(range(50, 70))))))


def test_reference_that_is_too_short_is_a_problem() -> None:
    short = [stream(0, [1, 2]), stream(1, [3, 4])]
    found = list(problems(replace(outcome(), reference=short, delivered=short)))

    assert any("undisturbed stream 0: 2 of 20 tokens came" in each for each in found)


def test_streams_that_were_over_before_the_kill_prove_nothing() -> None:
    early = [stream(0, list(range(20)), started=0.0), stream(1, list(range(50, 70)), started=0.0)]

    assert any("over before the kill" in each for each in problems(outcome(*early)))


@pytest.mark.parametrize(
    ("recovery", "words"),
    [
        (None, "tells of no recovery"),
        (RECOVERY.model_copy(update={"detected_at": KILLED - timedelta(seconds=1)}), "tells of no recovery"),
        (RECOVERY.model_copy(update={"instance": 0}), "stage 1.0 was killed, but"),
        (RECOVERY.model_copy(update={"stages": (1,)}), "stage 1.0 was killed, but"),
        (RECOVERY.model_copy(update={"requests_affected": 0}), "met no running request"),
        (RECOVERY.model_copy(update={"restored_at": None}), "not swapped back"),
    ],
)
def test_recovery_of_anything_else_is_a_problem(recovery: RecoveryStatus | None, words: str) -> None:
    (found,) = problems(outcome(recovery=recovery))

    assert words in found
