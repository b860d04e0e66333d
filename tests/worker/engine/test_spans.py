"""A recovery becomes one span, with its phases within, in the order and of the length that the engine measured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import grpc  # type: ignore[import-untyped]
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from resilientllm_api.engine_state import EnginePhase, EngineState, LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.spans import NAME, RecoverySpans

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


class Collector(TraceServiceServicer):
    """A collector of OpenTelemetry's own protocol, at a port of the loopback."""

    def __init__(self) -> None:
        self.received: list[tuple[str, str]] = []
        """Name of each span, and of its scope."""
        self._server = grpc.server(ThreadPoolExecutor(1))
        add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()

    def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.received += [(span.name, scope.scope.name) for span in scope.spans]
        return ExportTraceServiceResponse()


def test_they_arrive_where_vllm_sends_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: with ``--otlp-traces-endpoint``, spans of whoever asks for a tracer go where vLLM's go."""
    from vllm.tracing import otel

    made: list[TracerProvider] = []
    monkeypatch.setattr(otel, "set_tracer_provider", made.append)
    monkeypatch.setattr(otel.atexit, "register", lambda _: None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    with Collector() as collector:
        otel.init_otel_tracer("vllm.llm_engine", f"grpc://127.0.0.1:{collector.port}")
        (provider,) = made
        RecoverySpans(lambda: provider.get_tracer(NAME)).note(a_state(a_recovery(fence=5.0, stitch=15.0, total=20.0)))
        provider.shutdown()  # Sends what waits for it.

    assert sorted(collector.received) == [("fence", NAME), ("recovery", NAME), ("stitch", NAME)]
