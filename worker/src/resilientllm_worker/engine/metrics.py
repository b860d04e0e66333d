"""What an instance went through, for Prometheus: beside vLLM's own metrics, on ``/metrics`` of its API server.

vLLM serves prometheus_client's default registry, as long as there is one API server; there always is.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram
from resilientllm_api.engine_state import EngineState

RECOVERIES = Counter("resilientllm_recoveries", "Re-stitches, by what was done and why.", ["kind", "reason"])
RECOVERY_SECONDS = Histogram(
    "resilientllm_recovery_seconds",
    "From the detection, or the decision, to the first token after it.",
    ["kind"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
SICK = Gauge("resilientllm_sick", "1 while there is work, or none could be taken, and nothing moves.")
SLOW = Gauge(
    "resilientllm_stage_slow", "Times as long as its twins' the steps of a stage take that is slow.", ["stage"]
)


class Metrics:
    """Counts what is new in one engine's state."""

    def __init__(self) -> None:
        self._told: frozenset[str] = frozenset()

    def note(self, state: EngineState) -> None:
        """``state``: as those outside meet it. Call it more often than ten recoveries happen."""
        for each in state.recoveries:
            if each.id not in self._told:
                RECOVERIES.labels(each.kind.value, each.reason.value if each.reason else "").inc()
                RECOVERY_SECONDS.labels(each.kind.value).observe(each.phases_ms.get("total", 0.0) / 1000.0)
        self._told = frozenset(each.id for each in state.recoveries)
        SICK.set(bool(state.sick))
        for stage in state.stages:
            SLOW.labels(f"{state.instance}.{stage.stage}").set(stage.own_slow.twins if stage.own_slow else 0.0)
