"""A stage's metrics, for ``/metrics`` on its health port. Made from the server's figures when somebody asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from resilientllm_worker.protocol.messages import ReplicationReport
from resilientllm_worker.tenancy.pool import PoolUse

NOBODY = ReplicationReport("", False, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class TenantFigures:
    """Of one instance that the stage serves, or has served."""

    is_home: bool
    stitched: bool
    link_received_bytes: int = 0
    link_sent_bytes: int = 0
    pending_blocks: int = 0
    """Sealed blocks that nobody has begun to send."""
    replication: ReplicationReport = NOBODY


@dataclass(frozen=True)
class StageFigures:
    """What the server has counted since its process began, and what holds now."""

    steps: int
    merged_steps: int
    corrupt_frames: int
    step_buckets: Sequence[tuple[str, float]]
    step_seconds: float
    running_seconds: float
    """Of the step at hand; 0 if there is none."""
    allowed_seconds: float
    home_blocks: int
    block_tokens: int
    pool: PoolUse
    tenants: tuple[TenantFigures, ...]


def no_figures() -> StageFigures:
    """Of a stage that has done nothing yet."""
    return StageFigures(0, 0, 0, (("+Inf", 0.0),), 0.0, 0.0, 0.0, 0, 0, PoolUse(0, 0, 0, 0), ())


class StageMetrics(Collector):
    """Two tenants are told apart, home and guest; over time several instances may have been the guest."""

    def __init__(self, stage: str, figures: Callable[[], StageFigures]) -> None:
        """``stage`` as ``instance.stage``."""
        self._stage = stage
        self._figures = figures

    def describe(self) -> Iterator[Metric]:
        return self._families(no_figures())

    def collect(self) -> Iterator[Metric]:
        return self._families(self._figures())

    def _families(self, now: StageFigures) -> Iterator[Metric]:
        def counter(name: str, documentation: str, value: float) -> Metric:
            family = CounterMetricFamily(name, documentation, labels=["stage"])
            family.add_metric([self._stage], value)
            return family

        def gauge(name: str, documentation: str, value: float) -> Metric:
            family = GaugeMetricFamily(name, documentation, labels=["stage"])
            family.add_metric([self._stage], value)
            return family

        steps = HistogramMetricFamily(
            "resilientllm_stage_step_seconds", "How long steps were in the stage's runner.", labels=["stage"]
        )
        steps.add_metric([self._stage], [*now.step_buckets], now.step_seconds)
        yield steps
        yield counter(
            "resilientllm_stage_merged_steps", "Steps that were home's and the guest's at once.", now.merged_steps
        )
        yield gauge(
            "resilientllm_stage_step_running_seconds",
            "How long the step at hand has been in the runner; 0 if there is none.",
            now.running_seconds,
        )
        yield gauge(
            "resilientllm_stage_step_allowed_seconds",
            "How long the step at hand may be in the runner.",
            now.allowed_seconds,
        )
        yield counter(
            "resilientllm_stage_corrupt_frames", "Frames that did not arrive as they were sent.", now.corrupt_frames
        )
        yield gauge("resilientllm_stage_home_blocks", "KV blocks for the stage's own instance.", now.home_blocks)
        pool = GaugeMetricFamily(
            "resilientllm_stage_pool_blocks",
            "KV blocks that are kept for other instances, by what they are used for; the sum is the pool.",
            labels=["stage", "use"],
        )
        for use, blocks in vars(now.pool).items():
            pool.add_metric([self._stage, use], blocks)
        yield pool
        yield from self._of_tenants(now)

    def _of_tenants(self, now: StageFigures) -> Iterator[Metric]:
        labels = ["stage", "tenant"]
        serves = GaugeMetricFamily(
            "resilientllm_stage_serves", "1 while it is stitched into a pipeline.", labels=labels
        )
        links = CounterMetricFamily(
            "resilientllm_stage_link_bytes", "Hidden states on links.", labels=[*labels, "direction"]
        )
        tokens = GaugeMetricFamily(
            "resilientllm_stage_lag_tokens",
            "Tokens in sealed blocks that the keeper has not acknowledged.",
            labels=labels,
        )
        seconds = GaugeMetricFamily(
            "resilientllm_stage_lag_seconds", "How long the oldest token of the lag has been waiting.", labels=labels
        )
        backlog = GaugeMetricFamily(
            "resilientllm_stage_backlog_blocks", "Sealed blocks that nobody has begun to send.", labels=labels
        )
        sent = CounterMetricFamily(
            "resilientllm_stage_replica_bytes", "Content of KV blocks that was sent to keepers.", labels=labels
        )
        for name, tenants in (
            ("home", [each for each in now.tenants if each.is_home]),
            ("guest", [each for each in now.tenants if not each.is_home]),
        ):
            of = [self._stage, name]
            serves.add_metric(of, any(each.stitched for each in tenants))
            links.add_metric([*of, "received"], sum(each.link_received_bytes for each in tenants))
            links.add_metric([*of, "sent"], sum(each.link_sent_bytes for each in tenants))
            tokens.add_metric(of, sum(each.replication.lag_blocks for each in tenants) * now.block_tokens)
            seconds.add_metric(of, max((each.replication.lag_seconds for each in tenants), default=0.0))
            backlog.add_metric(of, sum(each.pending_blocks for each in tenants))
            sent.add_metric(of, sum(each.replication.sent_bytes for each in tenants))
        yield from (serves, links, tokens, seconds, backlog, sent)


class WeightsMetrics(Collector):
    """Where the weights came from, which does not change any more."""

    def __init__(self, stage: str, source: str, seconds: float, nbytes: int) -> None:
        """``source``: ``twin`` or ``storage``."""
        self._of = [stage, source]
        self._seconds = seconds
        self._nbytes = nbytes

    def collect(self) -> Iterator[Metric]:
        for name, documentation, value in (
            ("resilientllm_stage_weights_seconds", "How long it took to get rank 0's weights.", self._seconds),
            ("resilientllm_stage_weights_bytes", "How much rank 0's weights are.", self._nbytes),
        ):
            family = GaugeMetricFamily(name, documentation, labels=["stage", "source"])
            family.add_metric(self._of, value)
            yield family


def make_registry() -> CollectorRegistry:
    """What is told of the process from its beginning: CPU time, memory, files, start. vLLM's own is not looked at."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
