"""Each recovery is counted once; what was counted outlives those who told it; the rest is told as it is."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from resilientllm_api.engine_state import (
    EnginePhase,
    EngineState,
    LossReason,
    Recovery,
    RecoveryKind,
    ReplicationState,
    Rung,
    Slowness,
    StageServing,
)
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.metrics import Metrics


class Scraped:
    """An engine's metrics, and what somebody who asks gets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._metrics = Metrics(self.registry)
        self._now = 100.0

    def note(self, state: EngineState, later: float = 0.5) -> None:
        self._now += later
        self._metrics.note(state, self._now)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def a_recovery(name: str, kind: RecoveryKind, reason: LossReason | None, **phases: float) -> Recovery:
    return Recovery(
        id=name, kind=kind, stages=(0,), reason=reason, detected_at=datetime.now(UTC), phases_ms=phases, requests=3
    )


def a_state(*recoveries: Recovery, served_by: int = 7, slow: Slowness | None = None, **changes: Any) -> EngineState:
    place = StageServing(
        stage=0, served_by=StageId(instance=served_by, stage=0), own_connected=True, own_slow=slow, donors_connected=2
    )
    return EngineState(instance=7, recoveries=recoveries, stages=(place,), **({"phase": EnginePhase.SERVING} | changes))


def replicated(sent: int, served_by: int = 7, **changes: Any) -> EngineState:
    place = ReplicationState(stage=0, healthy=True, lag_tokens=32, lag_seconds=0.5, sent_blocks=sent, **changes)
    return a_state(served_by=served_by, replication=(place,))


def test_a_recovery_is_counted_once_however_often_it_is_told() -> None:
    scraped = Scraped()
    hang = a_recovery("a", RecoveryKind.BORROW, LossReason.HANG, wait=100.0, total=500.0)
    for _ in range(3):
        scraped.note(a_state(hang))
    scraped.note(a_state(hang, a_recovery("b", RecoveryKind.BORROW, LossReason.HANG, total=250.0)))

    assert scraped("resilientllm_recoveries_total", kind="Borrow", reason="StepOverdue") == 2
    assert scraped("resilientllm_recovery_seconds_sum", kind="Borrow") == 0.75
    assert scraped("resilientllm_recovery_phase_seconds_sum", kind="Borrow", phase="wait") == 0.1
    assert scraped("resilientllm_requests_resumed_total", kind="Borrow") == 6


def test_what_has_not_happened_yet_is_counted_as_nothing() -> None:
    """An increase from no series to 1 is none to Prometheus."""
    scraped = Scraped()

    assert scraped("resilientllm_recoveries_total", kind="Borrow", reason="HeartbeatMissed") == 0
    assert scraped("resilientllm_recovery_seconds_count", kind="Move") == 0
    assert scraped("resilientllm_recovery_phase_seconds_count", kind="Borrow", phase="fence") == 0
    assert scraped("resilientllm_engine_phase_seconds_total", phase="Waiting") == 0
    assert scraped("resilientllm_requests_by_rung_total", rung="Failed") == 0


def test_what_lost_nothing_has_no_reason() -> None:
    scraped = Scraped()
    scraped.note(a_state(a_recovery("c", RecoveryKind.SWAP_BACK, None, total=80.0)))

    assert scraped("resilientllm_recoveries_total", kind="SwapBack", reason="") == 1


def test_recoveries_are_told_apart_from_ten_milliseconds_to_ten_minutes() -> None:
    scraped = Scraped()
    scraped.note(a_state(a_recovery("a", RecoveryKind.BORROW, LossReason.RESET, total=9.0)))

    assert scraped("resilientllm_recovery_seconds_bucket", kind="Borrow", le="0.01") == 1
    assert scraped("resilientllm_recovery_seconds_bucket", kind="Borrow", le="600.0") == 1


def test_sick_and_slow_come_and_go() -> None:
    scraped = Scraped()
    scraped.note(a_state(sick="no step has been done for 31 s", slow=Slowness(history=2.0, twins=1.8)))
    assert (scraped("resilientllm_sick"), scraped("resilientllm_stage_slow", stage="7.0")) == (1.0, 1.8)
    scraped.note(a_state())
    assert (scraped("resilientllm_sick"), scraped("resilientllm_stage_slow", stage="7.0")) == (0.0, 0.0)


def test_a_donor_at_work_shows_as_long_as_it_is() -> None:
    scraped = Scraped()
    scraped.note(a_state(served_by=1))
    assert scraped("resilientllm_engine_stage_borrowed", stage="7.0") == 1
    assert scraped("resilientllm_engine_stage_donors", stage="7.0") == 2
    scraped.note(a_state())
    assert scraped("resilientllm_engine_stage_borrowed", stage="7.0") == 0


def test_time_goes_to_the_phase_that_it_was_spent_in() -> None:
    scraped = Scraped()
    scraped.note(a_state())
    for _ in range(4):
        scraped.note(a_state(phase=EnginePhase.WAITING), later=0.5)

    assert scraped("resilientllm_engine_phase_seconds_total", phase="Waiting") == 2.0
    assert scraped("resilientllm_engine_phase", phase="Waiting") == 1
    assert scraped("resilientllm_engine_phase", phase="Serving") == 0


def test_requests_are_counted_by_rung_whichever_engine_core_tells_of_them() -> None:
    scraped = Scraped()
    scraped.note(a_state(requests_by_rung_total={Rung.KEPT: 5, Rung.FAILED: 1}))
    scraped.note(a_state(requests_by_rung_total={Rung.KEPT: 2}))

    assert scraped("resilientllm_requests_by_rung_total", rung="Kept") == 7
    assert scraped("resilientllm_requests_by_rung_total", rung="Failed") == 1


def test_what_is_not_known_any_more_is_not_told_either() -> None:
    scraped = Scraped()
    scraped.note(replicated(sent=5))
    assert scraped("resilientllm_engine_lag_seconds", stage="7.0") == 0.5
    scraped.note(a_state())
    assert scraped("resilientllm_engine_lag_seconds", stage="7.0") is None
    assert scraped("resilientllm_replica_blocks_total", stage="7.0", fate="sent") == 5


def test_counts_of_a_stage_outlive_it() -> None:
    scraped = Scraped()
    scraped.note(replicated(sent=100))
    scraped.note(replicated(sent=10, served_by=1))  # the donor has its own count
    scraped.note(replicated(sent=40))  # and the own stage is another process

    assert scraped("resilientllm_replica_blocks_total", stage="7.0", fate="sent") == 150


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), min_size=1))
def test_counts_of_an_engine_core_outlive_it(lives: list[list[int]]) -> None:
    """Each life of EngineCore counts from 0, and grows by these; somebody looks at its beginning, and after each."""
    scraped = Scraped()
    for life in lives:
        scraped.note(a_state(tokens_kept_total=0))
        for upto in range(len(life)):
            scraped.note(a_state(tokens_kept_total=sum(life[: upto + 1])))

    assert scraped("resilientllm_tokens_kept_total") == sum(sum(life) for life in lives)
