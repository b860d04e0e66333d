"""What scraping costs: series, bytes and CPU time of each process, and all series of 100 instances of four stages.

    python -m bench.scrape_cost

An engine's are ours alone: vLLM's own come on top. The CPU time is that of making the text, which is all that a scrape
takes of a process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from resilientllm_api.crd import (
    Condition,
    ConditionStatus,
    ConditionType,
    InstancePhase,
    InstanceStatus,
    ResilientLLMStatus,
    StageStatus,
)
from resilientllm_api.engine_state import (
    EnginePhase,
    EngineState,
    LossReason,
    Recovery,
    RecoveryKind,
    ReplicationState,
    StageServing,
)
from resilientllm_api.plan import StageId
from resilientllm_operator.object_metrics import ObjectMetrics
from resilientllm_operator.recovery_metrics import RecoveryMetrics
from resilientllm_worker.engine.metrics import Metrics
from resilientllm_worker.stage.metrics import StageFigures, StageMetrics, TenantFigures, WeightsMetrics
from resilientllm_worker.stage.step_times import StepTimes
from resilientllm_worker.tenancy.pool import PoolUse

INSTANCES = 100
OF_EACH_OBJECT = 10
STAGES = 4
SCRAPES = 50
PHASES = ("hold", "flush", "wait", "fence", "stitch", "rollBack", "resume", "total")


@dataclass(frozen=True)
class Cost:
    series: int
    bytes: int
    cpu_ms: float


def cost(registry: CollectorRegistry) -> Cost:
    text = generate_latest(registry)
    before = time.thread_time()
    for _ in range(SCRAPES):
        generate_latest(registry)
    seconds = (time.thread_time() - before) / SCRAPES
    lines = text.decode().splitlines()
    return Cost(sum(not line.startswith("#") for line in lines), len(text), round(1000 * seconds, 3))


def an_engine() -> CollectorRegistry:
    """One that has been through everything."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    kinds = [(RecoveryKind.BORROW, reason) for reason in LossReason]
    recoveries = tuple(
        Recovery(
            id=f"{kind}{reason}",
            kind=kind,
            stages=(0,),
            reason=reason,
            detected_at=datetime.now(UTC),
            phases_ms=dict.fromkeys(PHASES, 20.0),
        )
        for kind, reason in [*kinds, (RecoveryKind.SWAP_BACK, None), (RecoveryKind.MOVE, None)]
    )
    for phase in EnginePhase:
        metrics.note(
            EngineState(
                instance=0,
                phase=phase,
                recoveries=recoveries,
                stages=tuple(
                    StageServing(stage=place, served_by=StageId(instance=0, stage=place), own_connected=True)
                    for place in range(STAGES)
                ),
                replication=tuple(ReplicationState(stage=place, sent_blocks=9) for place in range(STAGES)),
            ),
            time.monotonic(),
        )
    return registry


def a_stage() -> CollectorRegistry:
    registry = CollectorRegistry()
    buckets, seconds = StepTimes().read()
    figures = StageFigures(
        steps=9,
        merged_steps=9,
        corrupt_frames=0,
        step_buckets=buckets,
        step_seconds=seconds,
        running_seconds=0.0,
        allowed_seconds=0.0,
        home_blocks=50_000,
        block_tokens=16,
        pool=PoolUse(1, 2, 3, 4),
        tenants=(TenantFigures(True, True), TenantFigures(False, True)),
    )
    registry.register(StageMetrics("0.0", lambda: figures))
    registry.register(WeightsMetrics("0.0", "twin", 1.0, 1))
    return registry


def an_operator() -> CollectorRegistry:
    """What it tells of objects, which is what grows with them."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # as it does itself
    registry = CollectorRegistry()
    objects, recoveries = ObjectMetrics(), RecoveryMetrics(registry)
    registry.register(objects)
    now = datetime.now(UTC)
    conditions = tuple(
        Condition(
            type=each.value,
            status=ConditionStatus.TRUE,
            observed_generation=1,
            last_transition_time=now,
            reason="AsSpecified",
            message="",
        )
        for each in ConditionType
    )
    instances = tuple(
        InstanceStatus(
            instance=number,
            phase=InstancePhase.SERVING,
            serving=True,
            stages=tuple(StageStatus(stage=place, served_by=f"{number}.{place}") for place in range(STAGES)),
        )
        for number in range(OF_EACH_OBJECT)
    )
    for number in range(INSTANCES // OF_EACH_OBJECT):
        name = f"object-{number}"
        recoveries.begin("default", name)
        objects.put("default", name, OF_EACH_OBJECT, ResilientLLMStatus(conditions=conditions, instances=instances))
    return registry


def main() -> None:
    parts: dict[str, Callable[[], CollectorRegistry]] = {"engine": an_engine, "stage": a_stage, "operator": an_operator}
    costs = {name: cost(make()) for name, make in parts.items()}
    total = INSTANCES * (costs["engine"].series + STAGES * costs["stage"].series) + costs["operator"].series
    print(json.dumps({**{name: asdict(each) for name, each in costs.items()}, "series_of_all": total}, indent=2))


if __name__ == "__main__":
    main()
