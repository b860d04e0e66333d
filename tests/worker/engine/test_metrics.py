"""Each recovery is counted once, with its kind and reason; sick and slow are told as they are."""

from __future__ import annotations

from datetime import UTC, datetime

from prometheus_client import REGISTRY
from resilientllm_api.engine_state import (
    EnginePhase,
    EngineState,
    LossReason,
    Recovery,
    RecoveryKind,
    Slowness,
    StageServing,
)
from resilientllm_worker.engine.metrics import Metrics


def a_recovery(name: str, kind: RecoveryKind, reason: LossReason | None, total_ms: float = 80.0) -> Recovery:
    phases = {"total": total_ms}
    return Recovery(id=name, kind=kind, stages=(0,), reason=reason, detected_at=datetime.now(UTC), phases_ms=phases)


def a_state(*recoveries: Recovery, sick: str = "", slow: Slowness | None = None) -> EngineState:
    place = StageServing(stage=0, served_by=None, own_connected=True, own_slow=slow)
    return EngineState(instance=7, phase=EnginePhase.SERVING, recoveries=recoveries, sick=sick, stages=(place,))


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def hangs() -> float:
    return value("resilientllm_recoveries_total", kind="Borrow", reason="StepOverdue")


def test_a_recovery_is_counted_once_however_often_it_is_told() -> None:
    metrics, before, seconds = Metrics(), hangs(), value("resilientllm_recovery_seconds_sum", kind="Borrow")
    hang = a_recovery("a", RecoveryKind.BORROW, LossReason.HANG, total_ms=500.0)
    for _ in range(3):
        metrics.note(a_state(hang))
    metrics.note(a_state(hang, a_recovery("b", RecoveryKind.BORROW, LossReason.HANG, total_ms=250.0)))
    assert hangs() == before + 2
    assert value("resilientllm_recovery_seconds_sum", kind="Borrow") == seconds + 0.75


def test_what_lost_nothing_has_no_reason() -> None:
    before = value("resilientllm_recoveries_total", kind="SwapBack", reason="")
    Metrics().note(a_state(a_recovery("c", RecoveryKind.SWAP_BACK, None)))
    assert value("resilientllm_recoveries_total", kind="SwapBack", reason="") == before + 1


def test_sick_and_slow_come_and_go() -> None:
    metrics = Metrics()
    metrics.note(a_state(sick="no step has been done for 31 s", slow=Slowness(history=2.0, twins=1.8)))
    assert (value("resilientllm_sick"), value("resilientllm_stage_slow", stage="7.0")) == (1.0, 1.8)
    metrics.note(a_state())
    assert (value("resilientllm_sick"), value("resilientllm_stage_slow", stage="7.0")) == (0.0, 0.0)
