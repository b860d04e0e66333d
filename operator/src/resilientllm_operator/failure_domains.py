"""Where stages run, and whom they are paired with because of that. Pure.

The pairs of before are in the status, and it is written before a plan is published: the next operator goes on with the
same pairs, whatever was the best pairing at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from resilientllm_api.crd import InstanceStatus
from resilientllm_api.pairing import NOWHERE, Donors, Location, donors_of
from resilientllm_api.plan import StageId

from resilientllm_operator.names import Role, Slot
from resilientllm_operator.world import World


def ranked_donors(world: World) -> Donors:
    """For every stage those that may stand in for it, its pair first."""
    spec = world.object.spec
    stages = [StageId(instance=i, stage=k) for i in range(world.instances) for k in range(spec.stages)]
    locations = {stage: location_of(world, stage) for stage in stages}
    return donors_of(world.instances, spec.stages, locations, pairs_in(world.object.status.instances))


def location_of(world: World, stage: StageId) -> Location:
    pod = world.current(Slot(stage.instance, Role.STAGE, stage.stage))
    if pod is None or pod.node is None:
        return NOWHERE
    node = world.nodes.get(pod.node)
    return Location.on_node(pod.node, node.labels if node else None, world.object.spec.replication.topology_key)


def shared_domains(world: World, instances: Iterable[InstanceStatus]) -> Iterator[tuple[str, StageId, StageId]]:
    """A failure domain, a stage, and its pair in the same domain. Two that are each other's pair come once."""
    told: set[frozenset[StageId]] = set()
    for stage, pair in pairs_in(instances).items():
        domain = location_of(world, stage).domain
        if domain is not None and domain == location_of(world, pair).domain and {stage, pair} not in told:
            told.add(frozenset({stage, pair}))
            yield domain, stage, pair


def pairs_in(instances: Iterable[InstanceStatus]) -> dict[StageId, StageId]:
    return {
        StageId(instance=instance.instance, stage=stage.stage): StageId.parse(stage.pair)
        for instance in instances
        for stage in instance.stages
        if stage.pair is not None
    }
