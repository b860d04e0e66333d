"""One demo that went well, for tests to change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from resilientllm_api.crd import RecoveryStatus
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_cli.streams import Sampling, Stream

from e2e.demo.report import Kill, Outcome

KILLED = datetime(2026, 1, 1, 12, tzinfo=UTC)
KILLED_MONOTONIC = 104.95
KILL = Kill(1, 0, "tiny-1-s0-abc", {0: 1, 1: 1}, KILLED, KILLED_MONOTONIC)
RECOVERY = RecoveryStatus(
    id="7",
    instance=1,
    kind=RecoveryKind.BORROW,
    stages=(0,),
    reason="ConnectionReset",
    donor="0.0",
    detected_at=KILLED + timedelta(milliseconds=2),
    resumed_at=KILLED + timedelta(milliseconds=50),
    restored_at=KILLED + timedelta(seconds=9),
    phases={"fence": 1.0, "resume": 4.0, "rollBack": 3.0, "stitch": 2.0, "total": 10.0},
    requests_affected=1,
    tokens_recomputed=70,
)


def stream(index: int, tokens: list[int], *, started: float = 104.0, error: str | None = None) -> Stream:
    """A token every tenth of a second."""
    arrivals = [started + number / 10 for number in range(len(tokens))]
    return Stream(index, list(tokens), arrivals, finish_reason=None if error else "length", error=error)


def outcome(*delivered: Stream, recovery: RecoveryStatus | None = RECOVERY) -> Outcome:
    expected = [stream(0, list(range(20))), stream(1, list(range(50, 70)))]
    return Outcome(
        sampling=Sampling(max_tokens=20),
        reference=expected,
        delivered=delivered or expected,
        kill=KILL,
        recovery=recovery,
        provider="namespaces",
        nodes=3,
        ready_seconds=41.5,
    )
