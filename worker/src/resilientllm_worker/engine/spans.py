"""Seam: recoveries as OpenTelemetry spans, where vLLM traces (``--otlp-traces-endpoint``): each with its phases within.

Made once a recovery is over, of what was measured, so nothing waits for them. Made for vLLM 0.32; relies on its making
the process' tracer provider. Without one, spans are made of nothing and go nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resilientllm_api.engine_state import EngineState, Recovery

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

NAME = "resilientllm"
IN_ORDER = ("hold", "flush", "wait", "fence", "stitch", "resume")
"""Phases that follow each other; ``rollBack`` lies within the last."""


@dataclass(frozen=True)
class Span:
    """Times in nanoseconds since the epoch, as OpenTelemetry has them."""

    name: str
    begin_ns: int
    end_ns: int


def spans(recovery: Recovery) -> Iterator[Span]:
    """The recovery itself, and then its phases."""
    detected = round(recovery.detected_at.timestamp() * 1e9)
    phases = {name: round(milliseconds * 1e6) for name, milliseconds in recovery.phases_ms.items()}
    yield Span("recovery", detected, detected + phases.get("total", 0))
    at = detected
    for name in IN_ORDER:
        if (took := phases.get(name)) is not None:
            if name == "resume" and "rollBack" in phases:
                yield Span("rollBack", at, at + min(took, phases["rollBack"]))
            yield Span(name, at, at + took)
            at += took


class RecoverySpans:
    """Tells of each recovery in one engine's state once."""

    def __init__(self, tracer: Callable[[], Tracer] | None = None) -> None:
        self._tracer = tracer or _of_the_process
        self._told: frozenset[str] = frozenset()

    def note(self, state: EngineState) -> None:
        for each in state.recoveries:
            if each.id not in self._told:
                _emit(self._tracer(), state.instance, each)
        self._told = frozenset(each.id for each in state.recoveries)


def _of_the_process() -> Tracer:
    # Only when there is something to tell: by then vLLM has made the provider, if it is to trace.
    from opentelemetry import trace

    return trace.get_tracer(NAME)


def _emit(tracer: Tracer, instance: int, recovery: Recovery) -> None:
    from opentelemetry import trace

    whole, *phases = spans(recovery)
    attributes = {
        "instance": instance,
        "kind": recovery.kind.value,
        "reason": recovery.reason.value if recovery.reason else "",
        "stages": [f"{instance}.{place}" for place in recovery.stages],
        "served_by": [str(stage) for stage in recovery.served_by],
        "requests": recovery.requests,
    }
    prefixed = {f"{NAME}.{name}": value for name, value in attributes.items()}
    parent = tracer.start_span(whole.name, start_time=whole.begin_ns, attributes=prefixed)
    within = trace.set_span_in_context(parent)
    for each in phases:
        tracer.start_span(each.name, context=within, start_time=each.begin_ns).end(each.end_ns)
    parent.end(whole.end_ns)
