"""What an instance went through, for Prometheus: beside vLLM's own metrics, on ``/metrics`` of its API server.

vLLM serves prometheus_client's default registry, as long as there is one API server; there always is. Counted in that
process, from what EngineCore and the stages tell anyway: so nothing is done for it within a step, and what was counted
outlives an EngineCore or a stage that dies. Gauges are made when somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState, Rung
from resilientllm_api.plan import StageId
from resilientllm_api.recovery_counts import RECOVERY_BUCKETS_SECONDS, RECOVERY_LABELS, RECOVERY_PHASES

_REPLICAS = ("sent", "cancelled", "refused", "corrupt")


class Metrics:
    """Counts what is new in one engine's state."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(name, documentation, labels, registry=registry)

        def histogram(name: str, documentation: str, *labels: str) -> Histogram:
            return Histogram(name, documentation, labels, registry=registry, buckets=RECOVERY_BUCKETS_SECONDS)

        self._recoveries = counter(
            "resilientllm_recoveries", "Re-stitches, by what was done and why.", "kind", "reason"
        )
        self._recovery_seconds = histogram(
            "resilientllm_recovery_seconds", "From the detection, or the decision, to the first token after it.", "kind"
        )
        self._recovery_phase_seconds = histogram(
            "resilientllm_recovery_phase_seconds", "Duration of each phase of a re-stitch.", "kind", "phase"
        )
        self._requests_resumed = counter(
            "resilientllm_requests_resumed", "Requests that were running at a re-stitch and went on after it.", "kind"
        )
        self._requests_by_rung = counter(
            "resilientllm_requests_by_rung", "Requests that a re-stitch met, by how they ended up.", "rung"
        )
        self._tokens_recomputed = counter(
            "resilientllm_tokens_recomputed", "Tokens whose KV cache was computed again after a re-stitch."
        )
        self._tokens_kept = counter(
            "resilientllm_tokens_kept",
            "Tokens of requests that were stepped back whose KV cache was there: with the survivors, and as copies.",
        )
        self._phase_seconds = counter(
            "resilientllm_engine_phase_seconds",
            "Time that the engine has spent in each phase; what is shorter than half a second may be missed.",
            "phase",
        )
        self._steps = counter("resilientllm_engine_steps", "Steps whose results came from the last stage.")
        self._replica_blocks = counter(
            "resilientllm_replica_blocks",
            "KV blocks that the serving stage has sent to its keeper, and those that it did not or that were not kept.",
            "stage",
            "fate",
        )
        self._replica_bytes = counter(
            "resilientllm_replica_bytes", "Content of KV blocks that the serving stage has sent to its keeper.", "stage"
        )
        for kind, reason in RECOVERY_LABELS:
            self._recoveries.labels(kind, reason)
            self._recovery_seconds.labels(kind)
            self._requests_resumed.labels(kind)
        for kind, phase in RECOVERY_PHASES:
            self._recovery_phase_seconds.labels(kind, phase)
        for rung in Rung:
            self._requests_by_rung.labels(rung.value)
        for each in EnginePhase:
            self._phase_seconds.labels(each.value)
        self._now = _Now()
        registry.register(self._now)
        self._told: frozenset[str] = frozenset()
        self._growth = _Growth()
        self._noted_at: float | None = None

    def note(self, state: EngineState, now: float) -> None:
        """``state``: as those outside meet it; ``now``: monotonic seconds. Call it more often than ten recoveries
        happen."""
        for each in state.recoveries:
            if each.id not in self._told:
                kind = each.kind.value
                self._recoveries.labels(kind, each.reason.value if each.reason else "").inc()
                self._requests_resumed.labels(kind).inc(each.requests)
                for phase, milliseconds in each.phases_ms.items():
                    if phase == "total":
                        self._recovery_seconds.labels(kind).observe(milliseconds / 1000.0)
                    else:
                        self._recovery_phase_seconds.labels(kind, phase).observe(milliseconds / 1000.0)
        self._told = frozenset(each.id for each in state.recoveries)
        if self._noted_at is not None:
            self._phase_seconds.labels(state.phase.value).inc(max(0.0, now - self._noted_at))
        self._noted_at = now
        self._steps.inc(self._growth.of("steps", state.steps_total))
        for rung in Rung:
            self._requests_by_rung.labels(rung.value).inc(
                self._growth.of(rung, state.requests_by_rung_total.get(rung, 0))
            )
        self._tokens_recomputed.inc(self._growth.of("recomputed", state.tokens_recomputed_total))
        self._tokens_kept.inc(self._growth.of("kept", state.tokens_kept_total))
        serving = {each.stage: each.served_by for each in state.stages}
        for place in state.replication:
            self._note_replicas(state.instance, place, serving.get(place.stage))
        self._now.state = state

    def _note_replicas(self, instance: int, place: ReplicationState, served_by: StageId | None) -> None:
        """The stage at work counts since it started: another one at the same place counts apart."""
        stage = f"{instance}.{place.stage}"
        counts = (place.sent_blocks, place.cancelled_blocks, place.refused_blocks, place.corrupt_blocks)
        for fate, count in zip(_REPLICAS, counts, strict=True):
            self._replica_blocks.labels(stage, fate).inc(self._growth.of((stage, served_by, fate), count))
        self._replica_bytes.labels(stage).inc(self._growth.of((stage, served_by, "bytes"), place.sent_bytes))


class _Growth:
    """By how much counts have grown that begin anew when the process dies that has them."""

    def __init__(self) -> None:
        self._seen: dict[object, int] = {}

    def of(self, key: object, count: int) -> int:
        before, self._seen[key] = self._seen.get(key, 0), count
        return count - before if count >= before else count


class _Now(Collector):
    """What holds at the moment, of the state that was noted last."""

    def __init__(self) -> None:
        self.state: EngineState | None = None

    def describe(self) -> Iterator[Metric]:
        yield from self._families(EngineState(instance=0, phase=EnginePhase.STARTING))

    def collect(self) -> Iterator[Metric]:
        if (state := self.state) is not None:
            yield from self._families(state)

    def _families(self, state: EngineState) -> Iterator[Metric]:
        def gauge(name: str, documentation: str, value: float) -> Metric:
            return GaugeMetricFamily(name, documentation, value=value)

        phase = GaugeMetricFamily(
            "resilientllm_engine_phase", "1 for the phase that the engine is in.", labels=["phase"]
        )
        for each in EnginePhase:
            phase.add_metric([each.value], state.phase is each)
        yield phase
        yield gauge("resilientllm_engine_serving", "1 while new requests would be served.", state.serving)
        yield gauge("resilientllm_engine_leaving", "1 once the engine was told to end.", state.leaving)
        yield gauge("resilientllm_engine_epoch", "Version of the instance's topology; it grows.", state.epoch)
        yield gauge(
            "resilientllm_engine_plan_version", "Version of the plan that the engine holds.", state.plan_version
        )
        yield gauge(
            "resilientllm_sick", "1 while there is work, or none could be taken, and nothing moves.", bool(state.sick)
        )
        yield from self._stages(state)
        yield from self._replication(state)

    def _stages(self, state: EngineState) -> Iterator[Metric]:
        def gauge(name: str, documentation: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, documentation, labels=["stage"])

        connected = gauge("resilientllm_engine_stage_connected", "1 while the instance's own stage answers.")
        borrowed = gauge("resilientllm_engine_stage_borrowed", "1 while a donor serves in place of the own stage.")
        donors = gauge("resilientllm_engine_stage_donors", "Stages that could stand in for this one: those connected.")
        slow = gauge(
            "resilientllm_stage_slow", "Times as long as its twins' the steps of a stage take that is slow; else 0."
        )
        for each in state.stages:
            stage = [f"{state.instance}.{each.stage}"]
            connected.add_metric(stage, each.own_connected)
            borrowed.add_metric(stage, each.served_by is not None and each.served_by.instance != state.instance)
            donors.add_metric(stage, each.donors_connected)
            slow.add_metric(stage, each.own_slow.twins if each.own_slow else 0.0)
        yield from (connected, borrowed, donors, slow)

    def _replication(self, state: EngineState) -> Iterator[Metric]:
        def gauge(name: str, documentation: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, documentation, labels=["stage"])

        healthy = gauge("resilientllm_engine_replication_healthy", "1 while copies are kept and keep up.")
        tokens = gauge(
            "resilientllm_engine_lag_tokens", "Tokens in sealed blocks that the keeper has not acknowledged."
        )
        seconds = gauge("resilientllm_engine_lag_seconds", "How long the oldest token of the lag has been waiting.")
        for place in state.replication:
            stage = [f"{state.instance}.{place.stage}"]
            healthy.add_metric(stage, place.healthy)
            tokens.add_metric(stage, place.lag_tokens)
            seconds.add_metric(stage, place.lag_seconds)
        yield from (healthy, tokens, seconds)
