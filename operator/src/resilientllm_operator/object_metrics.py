"""What is true of each object, for Prometheus: read from its status when somebody asks.

Only the replica that acts knows: what it does not look after any more is not told any more either. There may be a
thousand objects, so each has few series.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from resilientllm_api.crd import ConditionStatus, ResilientLLMStatus

_OBJECT = ["namespace", "name"]


class ObjectMetrics(Collector):
    def __init__(self) -> None:
        self._known: dict[tuple[str, str], tuple[int, ResilientLLMStatus]] = {}

    def put(self, namespace: str, name: str, instances: int, status: ResilientLLMStatus) -> None:
        """``instances`` are those asked for."""
        self._known[namespace, name] = (instances, status)

    def forget(self, namespace: str, name: str) -> None:
        self._known.pop((namespace, name), None)

    def describe(self) -> Iterator[Metric]:
        return self._families({})

    def collect(self) -> Iterator[Metric]:
        return self._families(dict(self._known))

    def _families(self, known: dict[tuple[str, str], tuple[int, ResilientLLMStatus]]) -> Iterator[Metric]:
        def gauge(name: str, documentation: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"resilientllm_{name}", documentation, labels=[*_OBJECT, *labels])

        wanted = gauge("instances", "Instances asked for.")
        serving = gauge("instances_serving", "Instances that requests are sent to.")
        phases = gauge("instances_phase", "Instances in each phase that any is in.", "phase")
        borrowed = gauge("stages_borrowed", "Places of pipelines that a donor serves in place of the own stage.")
        unkept = gauge("stages_not_kept", "Places of pipelines whose KV blocks nobody keeps copies of.")
        conditions = gauge(
            "condition",
            "1 for the status that each condition has, 0 for `True` and `False` where it has another.",
            "type",
            "status",
        )
        reasons = gauge("condition_reason", "1 for the reason that each condition has.", "type", "reason")
        tripped = gauge("breaker_tripped", "1 while the breaker for correlated faults is tripped.")
        avoided = gauge("nodes_avoided", "Nodes that are avoided because stages failed there again and again.")
        held_back = gauge("actions_held_back", "Actions that would be done if spec.recovery.mode were Act.")
        for of, (instances, status) in known.items():
            wanted.add_metric(of, instances)
            serving.add_metric(of, sum(each.serving for each in status.instances))
            for phase, count in Counter(each.phase for each in status.instances).items():
                phases.add_metric([*of, phase.value], count)
            places = [(f"{each.instance}.{place.stage}", place) for each in status.instances for place in each.stages]
            borrowed.add_metric(of, sum(place.served_by not in (None, own) for own, place in places))
            unkept.add_metric(of, sum(place.kept_by is None for _, place in places))
            for condition in status.conditions:
                reasons.add_metric([*of, condition.type, condition.reason], 1)
                for value in {ConditionStatus.TRUE, ConditionStatus.FALSE, condition.status}:
                    conditions.add_metric([*of, condition.type, value.value], condition.status is value)
            tripped.add_metric(of, status.breaker is not None and status.breaker.tripped)
            avoided.add_metric(of, len(status.nodes))
            held_back.add_metric(of, len(status.would_do))
        yield from (wanted, serving, phases, borrowed, unkept, conditions, reasons, tripped, avoided, held_back)
