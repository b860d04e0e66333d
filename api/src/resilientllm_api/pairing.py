"""Who stands in for whom, and the plans that say so. Pure functions, used by the operator and by local mode."""

from __future__ import annotations

from collections.abc import Mapping

from resilientllm_api.plan import Limits, Plan, ReplicationMode, StageId, StageRef


def donors_of(stage: StageId, instances: int) -> tuple[StageId, ...]:
    """The same stage of the other instances, the next one in the ring first: it is the pair."""
    return tuple(
        StageId(instance=(stage.instance + step) % instances, stage=stage.stage) for step in range(1, instances)
    )


def make_plans(
    name: str,
    version: int,
    instances: int,
    stages: int,
    addresses: Mapping[StageId, str],
    limits: Limits,
    replication: ReplicationMode = ReplicationMode.RING,
) -> dict[int, Plan]:
    """One plan for every instance all of whose own stages have an address; donors without one are left out."""
    plans: dict[int, Plan] = {}
    for instance in range(instances):
        own = [StageId(instance=instance, stage=stage) for stage in range(stages)]
        if any(stage not in addresses for stage in own):
            continue
        plans[instance] = Plan(
            version=version,
            name=name,
            instance=instance,
            stages=tuple(StageRef(id=stage, address=addresses[stage]) for stage in own),
            donors=tuple(
                tuple(
                    StageRef(id=donor, address=addresses[donor])
                    for donor in donors_of(stage, instances)
                    if donor in addresses
                )
                for stage in own
            ),
            limits=limits,
            replication=replication,
        )
    return plans
