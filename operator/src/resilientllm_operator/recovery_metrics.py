"""Recoveries and failures, counted as they come into the status: so each is counted once, whichever replica acts, and
what an engine went through is not lost with the engine.
"""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from resilientllm_api.crd import FailureCause, RecoveryStatus, ResilientLLMStatus
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.recovery_counts import RECOVERY_BUCKETS_SECONDS, RECOVERY_LABELS, RECOVERY_PHASES

_OBJECT = ("namespace", "name")


class RecoveryMetrics:
    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"resilientllm_operator_{name}", documentation, (*_OBJECT, *labels), registry=registry)

        def histogram(name: str, documentation: str, *labels: str) -> Histogram:
            name = f"resilientllm_operator_{name}"
            return Histogram(name, documentation, labels, registry=registry, buckets=RECOVERY_BUCKETS_SECONDS)

        self._recoveries = counter("recoveries", "Re-stitches, by what was done and why.", "kind", "reason")
        self._seconds = histogram(
            "recovery_seconds",
            "From the detection, or the decision, to the first token after it.",
            *_OBJECT,
            "kind",
        )
        self._phase_seconds = histogram(
            "recovery_phase_seconds", "Duration of each phase of a re-stitch.", "kind", "phase"
        )
        self._restoration_seconds = histogram(
            "restoration_seconds", "From the detection of a loss until the own stages were back in their places."
        )
        self._requests = counter("requests_affected", "Requests that were running at a re-stitch.", "kind")
        self._tokens = counter(
            "tokens", "Tokens of requests that were running at a re-stitch, by what became of their KV cache.", "fate"
        )
        self._failures = counter("failures", "Failures of stages and their nodes.", "cause")
        for kind, phase in RECOVERY_PHASES:
            self._phase_seconds.labels(kind, phase)
        self._by_object = (self._recoveries, self._seconds, self._requests, self._tokens, self._failures)

    def begin(self, namespace: str, name: str) -> None:
        """This replica looks after the object from now on."""
        for kind, reason in RECOVERY_LABELS:
            self._recoveries.labels(namespace, name, kind, reason)
            self._requests.labels(namespace, name, kind)
        self._seconds.labels(namespace, name, RecoveryKind.BORROW.value)
        for fate in ("kept", "recomputed"):
            self._tokens.labels(namespace, name, fate)
        for cause in FailureCause:
            self._failures.labels(namespace, name, cause.value)

    def note(self, namespace: str, name: str, before: ResilientLLMStatus, after: ResilientLLMStatus) -> None:
        """``after`` was written in place of ``before``."""
        of = (namespace, name)
        known = {(each.instance, each.id): each for each in before.recoveries}
        for each in after.recoveries:
            self._note(of, known.get((each.instance, each.id)), each)
        for failure in after.failures:
            if failure not in before.failures:
                self._failures.labels(*of, failure.cause.value).inc()

    def forget(self, namespace: str, name: str) -> None:
        """There is no such object any more."""
        for metric in self._by_object:
            metric.remove_by_labels({"namespace": namespace, "name": name})

    def _note(self, of: tuple[str, str], before: RecoveryStatus | None, after: RecoveryStatus) -> None:
        kind = after.kind.value
        if after.resumed_at is not None and (before is None or before.resumed_at is None):
            self._recoveries.labels(*of, kind, after.reason or "").inc()
            for phase, milliseconds in after.phases.items():
                if phase == "total":
                    self._seconds.labels(*of, kind).observe(milliseconds / 1000.0)
                else:
                    self._phase_seconds.labels(kind, phase).observe(milliseconds / 1000.0)
        if after.restored_at is not None and (before is None or before.restored_at is None):
            seconds = (after.restored_at - after.detected_at).total_seconds()
            self._restoration_seconds.observe(max(0.0, seconds))
        # Requests that are scheduled again late are counted later.
        told = before or after.model_copy(update={"requests_affected": 0, "tokens_kept": 0, "tokens_recomputed": 0})
        self._requests.labels(*of, kind).inc(max(0, after.requests_affected - told.requests_affected))
        self._tokens.labels(*of, "kept").inc(max(0, after.tokens_kept - told.tokens_kept))
        self._tokens.labels(*of, "recomputed").inc(max(0, after.tokens_recomputed - told.tokens_recomputed))
