"""What clients are said to have noticed."""

from __future__ import annotations

from resilientllm_cli.comparison import Tokens
from resilientllm_cli.streams import SEND_AGAIN, Stream

from e2e.scenarios.load import Sent
from e2e.scenarios.verdict import judge, stall_between

REFERENCE = {0: [1, 2, 3, 4], 1: [5, 6, 7, 8]}
FAULT = 100.0


def sent(
    prompt: int,
    tokens: list[int],
    arrivals: list[float],
    *,
    asked: float = 98.0,
    ended: float | None = 110.0,
    error: str | None = None,
) -> Sent:
    stream = Stream(prompt, tokens=tokens, arrivals_seconds=arrivals, finish_reason="length", error=error)
    return Sent("service", 0, asked, stream, ended)


def test_equal_streams_are_unharmed_and_the_longest_wait_is_told() -> None:
    verdict = judge(
        [sent(0, [1, 2, 3, 4], [99, 101, 102, 103]), sent(1, [5, 6, 7, 8], [99, 99.5, 106, 107])], REFERENCE, FAULT
    )

    assert verdict.unharmed
    assert (verdict.streams, verdict.met, verdict.tokens) == (2, 2, Tokens(delivered=8))
    assert verdict.worst_stall_seconds == 6.5


def test_a_stream_that_was_over_before_the_fault_says_nothing_of_it() -> None:
    good = sent(0, [1, 2, 3, 4], [50.0, 51.0, 52.0, 53.0], asked=40.0, ended=60.0)
    bad = sent(1, [9], [50.0], asked=40.0, ended=60.0)
    verdict = judge([good, bad], REFERENCE, FAULT)

    assert (verdict.streams, verdict.met, verdict.tokens, verdict.problems) == (0, 0, Tokens(), ())
    assert verdict.early == ("service, round 0, prompt 1: 3 lost, 0 duplicated, 1 changed",)


def test_waiting_for_the_first_token_is_a_stall_too() -> None:
    verdict = judge([sent(0, [1, 2, 3, 4], [109, 109.1, 109.2, 109.3], asked=101.0)], REFERENCE, FAULT)

    assert (verdict.met, verdict.worst_stall_seconds) == (0, 8.0)


def test_another_token_is_a_problem() -> None:
    verdict = judge([sent(0, [1, 2, 9, 4], [99, 101, 102, 103])], REFERENCE, FAULT)

    assert verdict.tokens.changed == 1
    assert verdict.problems == ("service, round 0, prompt 0: 0 lost, 0 duplicated, 1 changed",)


def test_a_stream_that_broke_has_lost_what_did_not_come() -> None:
    # Its last token came before the fault, its end after it.
    verdict = judge([sent(0, [1, 2], [98.5, 99.0], error="APIError: gone")], REFERENCE, FAULT)

    assert verdict.tokens.lost == 2
    assert verdict.problems == ("service, round 0, prompt 0: broke after 2 tokens: APIError: gone",)


def test_errors_are_counted_by_whether_they_say_to_send_the_request_again() -> None:
    streams = [
        sent(0, [1], [99], error=f"APIError: nobody stands in. {SEND_AGAIN}."),
        sent(1, [5], [99], error="APIConnectionError: gone"),
        sent(0, [1, 2, 3, 4], [99, 101, 102, 103]),
    ]
    verdict = judge(streams, REFERENCE, FAULT)

    assert (verdict.failed_explicitly, verdict.failed_otherwise) == (1, 1)
    assert len(verdict.problems) == 2


def test_stalls_are_of_the_streams_that_the_fault_met() -> None:
    waits = sent(0, [1, 2, 3, 4], [103, 104, 104.5, 105], asked=99.0)
    streams = sent(1, [5, 6, 7, 8], [99, 99.5, 102, 102.5])
    later = sent(1, [5, 6, 7, 8], [130, 131, 132, 133], asked=101.0, ended=140.0)
    verdict = judge([waits, streams, later], REFERENCE, FAULT)

    assert (verdict.met, verdict.without_token) == (2, 1)
    assert verdict.stalls_seconds == (4.0, 2.5)
    assert verdict.worst_stall_seconds == 29.0


def test_a_stream_that_does_not_end_is_a_problem() -> None:
    assert judge([sent(0, [1, 2, 3, 4], [99, 100, 101, 102], ended=None)], REFERENCE, FAULT).problems


def test_a_wait_counts_for_whatever_it_overlaps() -> None:
    streams = [sent(0, [1, 2, 3, 4], [99, 100, 104, 104.5], asked=98.5)]

    assert stall_between(streams, 101, 102) == 4
    assert stall_between(streams, 98, 99.5) == 1
    assert stall_between(streams, 104.1, 104.2) == 0.5
    assert stall_between(streams, 105, 106) == 0
