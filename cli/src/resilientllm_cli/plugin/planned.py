"""What the operator plans for an object: computed as it does, from what it has written down. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from resilientllm_api.crd import ResilientLLM
from resilientllm_api.pairing import Donors, Location, donors_of
from resilientllm_api.plan import StageId

from resilientllm_cli.plugin.cluster import Node


def planned(obj: ResilientLLM, nodes: Mapping[str, Node]) -> tuple[Donors, dict[StageId, Location]]:
    """The donors of every stage, and where every stage is."""
    places = {
        StageId(instance=instance.instance, stage=stage.stage): stage
        for instance in (obj.status.instances if obj.status else ())
        for stage in instance.stages
    }
    locations = {
        stage: Location.on_node(
            place.node,
            nodes[place.node].labels if place.node in nodes else None,
            obj.spec.replication.topology_key,
        )
        for stage, place in places.items()
        if place.node is not None
    }
    pairs = {stage: StageId.parse(place.pair) for stage, place in places.items() if place.pair is not None}
    # Those that the spec does not ask for any more take part until they are gone.
    instances = max(obj.spec.instances, *(stage.instance + 1 for stage in places), 1)
    donors = donors_of(instances, obj.spec.stages, locations, pairs)
    return {stage: donors[stage] for stage in sorted(donors, key=lambda each: (each.instance, each.stage))}, locations
