"""What a run's line says of its streams: whatever a client did not get as it should have is in it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, cast

from resilientllm_api.engine_state import LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import StageId
from resilientllm_cli.chaos.faults import KINDS
from resilientllm_cli.chaos.line import Line
from resilientllm_cli.chaos.load import Phase, Sent, Undisturbed
from resilientllm_cli.chaos.run import FAIR, Moment, judge
from resilientllm_cli.chaos.scene import Scene
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.chaos.world import World
from resilientllm_cli.streams import Stream

FAULT_AT = 100.0
EXPECTED = [1, 2, 3, 4, 5, 6]


class FakeWorld:
    shape = Shape(2, 2)


def sent(tokens: list[int], error: str | None = None, pause: float = 0.0, begins: float = FAULT_AT - 0.25) -> Sent:
    """A token every 100 ms; ``pause`` comes after the third."""
    arrivals = [begins + 0.1 * place + (pause if place > 2 else 0.0) for place in range(len(tokens))]
    reason = None if error else "length"
    stream = Stream(0, tokens=tokens, arrivals_seconds=arrivals, finish_reason=reason, error=error)
    return Sent(0, stream, begins - 0.1)


def judged(
    streams: list[Sent], kind: str = "kill-first", lands: bool = True, suspected_after: float = 0.5, **scene: Any
) -> Line:
    made = Scene(cast("World", FakeWorld()), Random(1), StageId(instance=0, stage=0), **scene)
    made.at_seconds, made.at_wall = FAULT_AT, datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    made.landed = {"pid": 1} if lands else {}
    suspected = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=suspected_after)
    recovery = Recovery(id="1", kind=RecoveryKind.BORROW, stages=(0,), reason=LossReason.RESET, detected_at=suspected)
    undisturbed = Undisturbed({0: [EXPECTED]}, {0: [0.1]})
    return judge(
        made, KINDS[kind], 1, Moment(Phase.DECODE, 3, 0.0), streams, undisturbed, {0: [recovery]}, FAULT_AT + 60
    )


def test_a_stream_as_undisturbed_is_no_problem_and_its_stall_is_what_was_added() -> None:
    line = judged([sent(EXPECTED, pause=1.0)])
    assert line.problems == () and line.streams_met == 1
    assert abs((line.stall_seconds or 0.0) - 1.0) < 1e-6
    assert line.detection_seconds == 0.5


def test_a_suspicion_before_the_fault_is_a_false_alarm_and_no_detection() -> None:
    line = judged([sent(EXPECTED)], suspected_after=-1.2)
    assert line.detection_seconds is None
    assert line.problems == ("suspected before the fault: ConnectionReset",)


def test_who_asked_for_a_few_tokens_lost_none_of_the_others() -> None:
    few = sent(EXPECTED[:2])
    few.asked = 2
    assert judged([few, sent(EXPECTED)]).lost == 0


def test_what_is_lost_doubled_or_changed_is_told() -> None:
    line = judged([sent([1, 2, 3]), sent([1, 2, 3, 3, 4, 5, 6]), sent([1, 2, 3, 9, 5, 6])])
    assert (line.lost, line.duplicated, line.changed) == (3, 1, 1)
    assert set(line.problems) == {"lost: 3", "duplicated: 1", "changed: 1"}


def test_a_fault_without_evidence_is_a_problem() -> None:
    assert judged([sent(EXPECTED)], lands=False).problems == ("the fault did not land",)


def test_a_request_may_fail_explicitly_only_where_nobody_could_stand_in() -> None:
    failed = sent([1, 2, 3], error="APIError: ... Send the request again.")
    assert judged([failed], donor_exists=False).problems == ()
    assert judged([failed], donor_exists=False).failed_explicitly == 1
    assert judged([failed]).problems == ("1 requests failed though there was a donor",)


def test_a_request_that_fails_otherwise_has_lost_its_tokens() -> None:
    line = judged([sent([1, 2, 3], error="ConnectionError: reset")], donor_exists=False)
    assert (line.failed_otherwise, line.lost) == (1, 3)


def test_who_has_gone_away_gets_nothing_wrong() -> None:
    gone = sent([1, 2, 3])
    gone.left = True
    line = judged([gone, sent(EXPECTED)])
    assert line.problems == () and line.streams_met == 1


def test_a_stream_that_was_over_was_not_met() -> None:
    over = sent(EXPECTED, begins=FAULT_AT - 10)
    assert judged([over]).problems == ("no stream was met",)


def test_a_first_token_that_came_late_is_a_stall() -> None:
    waited = sent(EXPECTED, begins=FAULT_AT + 2.0)
    waited.sent_seconds = FAULT_AT - 0.1
    line = judged([waited])
    assert line.prompts_without_token == 1
    assert abs((line.stall_seconds or 0.0) - 2.0) < 1e-6


def test_a_request_that_waits_longer_than_a_batch_of_later_ones_was_not_treated_fairly() -> None:
    waited = sent(EXPECTED, begins=FAULT_AT + 2.0)
    waited.sent_seconds = FAULT_AT - 0.1
    later = [sent(EXPECTED, begins=FAULT_AT + 1.0) for _ in range(FAIR + 1)]
    assert judged([waited, *later[:FAIR]]).problems == ()
    line = judged([waited, *later])
    assert line.overtaken == FAIR + 1
    assert line.problems == (f"a request was overtaken by {FAIR + 1} that came later",)


def test_a_recovery_where_nothing_is_lost_is_a_false_alarm() -> None:
    assert judged([sent(EXPECTED)], kind="link-slow").problems == ("suspected without reason: ConnectionReset",)
