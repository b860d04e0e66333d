"""A recovery becomes one span, with its phases within, in the order and of the length that the engine measured."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from resilientllm_api.engine_state import EnginePhase, EngineState, LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.spans import RecoverySpans

AT = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def a_recovery(name: str = "a", **phases: float) -> Recovery:
    return Recovery(
        id=name,
        kind=RecoveryKind.BORROW,
        stages=(1,),
        reason=LossReason.RESET,
        served_by=(StageId(instance=7, stage=0), StageId(instance=3, stage=1)),
        detected_at=AT,
        phases_ms=phases,
        requests=3,
    )


def a_state(*recoveries: Recovery) -> EngineState:
    return EngineState(instance=7, phase=EnginePhase.SERVING, recoveries=recoveries)


class Traced:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = RecoverySpans(lambda: provider.get_tracer("test"))

    @property
    def finished(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def times_ms(self) -> dict[str, tuple[float, float]]:
        """When each began and ended, since the detection."""
        origin = round(AT.timestamp()) * 10**9
        return {
            span.name: (((span.start_time or 0) - origin) / 1e6, ((span.end_time or 0) - origin) / 1e6)
            for span in self.finished
        }


def test_phases_follow_each_other_and_the_roll_back_lies_within_the_last() -> None:
    traced = Traced()
    traced.spans.note(a_state(a_recovery(wait=100.0, fence=5.0, stitch=15.0, rollBack=2.0, resume=60.0, total=180.0)))

    assert traced.times_ms() == {
        "recovery": (0.0, 180.0),
        "wait": (0.0, 100.0),
        "fence": (100.0, 105.0),
        "stitch": (105.0, 120.0),
        "rollBack": (120.0, 122.0),
        "resume": (120.0, 180.0),
    }


def test_phases_are_children_of_the_recovery_which_says_what_it_was() -> None:
    traced = Traced()
    traced.spans.note(a_state(a_recovery(fence=5.0, stitch=15.0, resume=60.0, total=80.0)))
    (whole,) = [span for span in traced.finished if span.name == "recovery"]
    children = [span for span in traced.finished if span is not whole]

    assert len(children) == 3
    assert all(span.parent is not None and span.parent.span_id == whole.context.span_id for span in children)
    assert dict(whole.attributes or {}) == {
        "resilientllm.instance": 7,
        "resilientllm.kind": "Borrow",
        "resilientllm.reason": "ConnectionReset",
        "resilientllm.stages": ("7.1",),
        "resilientllm.served_by": ("7.0", "3.1"),
        "resilientllm.requests": 3,
    }


def test_each_recovery_is_told_once_however_often_its_engine_tells_of_it() -> None:
    traced, first = Traced(), a_recovery("a", total=80.0)
    for state in (a_state(first), a_state(first), a_state(first, a_recovery("b", total=90.0))):
        traced.spans.note(state)

    assert [span.name for span in traced.finished] == ["recovery", "recovery"]


def test_where_nobody_traces_nothing_happens() -> None:
    RecoverySpans().note(a_state(a_recovery(fence=5.0, total=80.0)))


def test_vllm_makes_the_provider_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: with ``--otlp-traces-endpoint``, spans of whoever asks for a tracer go where vLLM's go."""
    from vllm.tracing import otel

    made: list[TracerProvider] = []
    monkeypatch.setattr(otel, "set_tracer_provider", made.append)
    monkeypatch.setattr(otel.atexit, "register", lambda _: None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    otel.init_otel_tracer("vllm.llm_engine", "http://127.0.0.1:1")
    for provider in made:
        provider.shutdown()

    assert len(made) == 1
