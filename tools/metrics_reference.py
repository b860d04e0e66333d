"""Writes docs/metrics.md from the metrics that operator, engine and stage register (`make generate`).

Here and not in a package, because no package may import both the operator and the worker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from resilientllm_api.crd import ConditionStatus, ConditionType, FailureCause, InstancePhase
from resilientllm_api.engine_state import EnginePhase, LossReason, RecoveryKind, Rung
from resilientllm_api.recovery_counts import RECOVERY_BUCKETS_SECONDS
from resilientllm_operator import telemetry
from resilientllm_operator.controller import WATCHED
from resilientllm_worker.engine.metrics import Metrics
from resilientllm_worker.stage.metrics import StageMetrics, WeightsMetrics, no_figures

PREFIX = "resilientllm_"
DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"

_HEAD = f"""\
# Metrics

Generated from the code by `make generate`; a test fails when this page is stale. [Boards](monitoring.md#boards) and
[alerts](monitoring.md#alerts) use nothing that is not here. Names are API: they are not renamed.

Units are seconds, bytes, tokens and blocks. Histograms of recoveries have the buckets
{", ".join(f"{bound:g}" for bound in RECOVERY_BUCKETS_SECONDS[:-1])} and {RECOVERY_BUCKETS_SECONDS[-1]:g} s.
No label has the name of a pod, a request or a node. A histogram `x` is the series `x_bucket`, `x_sum` and `x_count`.

An engine counts what its instance went through, so a stage that dies takes no count along. The operator counts the same
when it comes into the status, so neither does an engine. Add up one or the other, not both. All counts begin anew with
their process, which Prometheus' `rate` and `increase` know.
"""


@dataclass(frozen=True, order=True)
class Documented:
    """One metric, by the name that it is asked for."""

    name: str
    kind: str
    labels: tuple[str, ...]
    documentation: str


@dataclass(frozen=True)
class Section:
    title: str
    where: str
    metrics: tuple[Documented, ...]


def sections() -> tuple[Section, ...]:
    engine, stage = CollectorRegistry(), CollectorRegistry()
    Metrics(engine)
    stage.register(StageMetrics("0.0", no_figures))
    stage.register(WeightsMetrics("0.0", "storage", 0.0, 0))
    assert telemetry.OBJECTS in _collectors(REGISTRY), "the operator's are in the default registry"
    return (
        Section(
            "The operator",
            "`/metrics` on port 8080 of its pods. The replica that acts tells of objects, the others do not.",
            documented(REGISTRY),
        ),
        Section(
            "An engine",
            "`/metrics` on port 8000, beside [vLLM's own](https://docs.vllm.ai/en/latest/usage/metrics/).",
            documented(engine),
        ),
        Section(
            "A stage",
            "`/metrics` on port 7001, from the first moment. Beside these `process_*` of rank 0.",
            documented(stage),
        ),
    )


def documented(registry: CollectorRegistry) -> tuple[Documented, ...]:
    """Those of ours, by name."""
    return tuple(sorted(each for each in _all(registry) if each.name.startswith(PREFIX)))


def series() -> dict[str, frozenset[str]]:
    """Every series that there can be, with its labels."""
    found: dict[str, frozenset[str]] = {}
    for section in sections():
        for metric in section.metrics:
            labels = frozenset(metric.labels)
            if metric.kind == "histogram":
                found |= {f"{metric.name}_bucket": labels | {"le"}}
                found |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
            else:
                found[metric.name] = labels
    return found


def _collectors(registry: CollectorRegistry) -> Iterable[object]:
    return list(registry._collector_to_names)  # prometheus_client tells a family's labels nowhere else


def _all(registry: CollectorRegistry) -> Iterator[Documented]:
    for collector in _collectors(registry):
        describe = getattr(collector, "describe", None) or collector.collect  # type: ignore[attr-defined]
        for family in describe():
            of = collector if isinstance(collector, MetricWrapperBase) else family
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield Documented(name, family.type, tuple(getattr(of, "_labelnames", ())), family.documentation)


def _values(values: type[StrEnum]) -> str:
    return ", ".join(f"`{each}`" for each in values)


LABELS = {
    "action": "what the operator does: `CreatePod`, `WriteStatus` and so on; ten of them",
    "cause": f"of a failure: {_values(FailureCause)}",
    "direction": "`received`, `sent`",
    "fate": "of tokens `kept`, `recomputed`; of KV blocks `sent`, `cancelled` (written again before they were read), "
    "`refused` (the keeper had no room or no parent for them), `corrupt`",
    "kind": f"of a re-stitch: {_values(RecoveryKind)}; of `resilientllm_operator_view_age_seconds` what is watched: "
    + ", ".join(f"`{each}`" for each in WATCHED),
    "name": "of the ResilientLLM object; the PodMonitors give it to engines and stages, too",
    "namespace": "of the ResilientLLM object",
    "phase": f"of an engine: {_values(EnginePhase)}; of an instance: {_values(InstancePhase)}; of a re-stitch: `hold`, "
    "`flush`, `wait`, `fence`, `stitch`, `rollBack`, `resume` ([what they mean](architecture.md#the-re-stitch))",
    "reason": f"of a re-stitch: {_values(LossReason)}, or empty where nothing was lost; of a condition and of "
    "`resilientllm_operator_transitions_total`: [reasons](kubernetes.md#reasons-and-what-to-do)",
    "result": "of a round: `ok`, `held` (it may not act), `error` (the API server did not do it), `defect`; of an "
    "action: `ok`, `held`, `error`",
    "rung": f"of a request that a re-stitch met: {_values(Rung)} ([what they mean](monitoring.md#boards))",
    "source": "`twin`, `storage`",
    "stage": "`instance.stage`",
    "status": f"of a condition: {_values(ConditionStatus)}",
    "tenant": "`home`, `guest`; over time several instances may have been the guest",
    "type": f"of a condition: {_values(ConditionType)}",
    "use": "of the pool's blocks: `free`, `replicas`, `arriving` (being written), `guest`",
}
"""By name, what a label says and which values it can have."""


def render() -> str:
    parts = [_HEAD]
    for section in sections():
        rows = [
            f"| `{each.name}` | {each.kind} | {', '.join(map('`{}`'.format, each.labels))} | {each.documentation} |"
            for each in section.metrics
        ]
        table = "\n".join(["| metric | type | labels | what |", "|---|---|---|---|", *rows])
        parts.append(f"## {section.title}\n\n{section.where}\n\n{table}\n")
    used = {label for section in sections() for metric in section.metrics for label in metric.labels}
    rows = [f"| `{label}` | {LABELS[label]} |" for label in sorted(used)]
    parts.append("## Labels\n\n" + "\n".join(["| label | values |", "|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def main() -> int:
    DOCUMENT.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
