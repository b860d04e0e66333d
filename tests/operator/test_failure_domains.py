"""Who is paired with whom in a cluster whose nodes are in zones, and that it is remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from resilientllm_api.crd import HOSTNAME
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Announce, PublishPlan, WriteStatus
from resilientllm_operator.failure_domains import location_of
from resilientllm_operator.world import NodeView, World

from tests.operator.builders import (
    condition,
    decided,
    engine_state,
    healthy_world,
    keeping,
    new_world,
    of_type,
    settled,
    stage,
    status_of,
    with_engine,
    with_pod,
    with_pods,
    without_pod,
)

ZONE = "topology.kubernetes.io/zone"
BY_ZONE: dict[str, Any] = {"replication": {"topologyKey": ZONE}}


def node(name: str, **labels: str) -> NodeView:
    return NodeView(
        name, labels={HOSTNAME: name, **{ZONE if key == "zone" else key: each for key, each in labels.items()}}
    )


def in_zones(world: World, zones: str) -> World:
    """Every pod of stage k of instance i is on a node of its own, ``node-i-k``, in the zone of its instance."""
    pods = tuple(replace(pod, node=f"node-{pod.slot.instance}-{pod.slot.stage}") for pod in world.pods)
    nodes = {str(pod.node): node(str(pod.node), zone=zones[pod.slot.instance]) for pod in pods}
    return replace(world, pods=pods, nodes=nodes)


def zoned(zones: str) -> World:
    return settled(in_zones(healthy_world(instances=len(zones), **BY_ZONE), zones))


def pairs(world: World, place: int = 0) -> list[str | None]:
    return [instance.stages[place].pair for instance in status_of(world).instances]


def test_by_default_each_is_paired_with_the_next() -> None:
    assert pairs(healthy_world(instances=3)) == ["1.0", "2.0", "0.0"]


def test_one_instance_has_no_pairs() -> None:
    assert pairs(healthy_world(instances=1)) == [None]


def test_pairs_are_in_different_zones() -> None:
    assert pairs(zoned("aabb")) == ["2.0", "3.0", "0.0", "1.0"]


def test_pairs_are_known_before_any_pod_is() -> None:
    assert pairs(new_world(instances=3)) == ["1.0", "2.0", "0.0"]


def test_plans_name_the_pair_as_the_first_donor() -> None:
    world = zoned("aabb")
    for view in world.engines.values():
        assert view.state is not None
    stale = replace(
        world,
        engines={
            uid: replace(view, state=view.state.model_copy(update={"plan_version": 0}) if view.state else None)
            for uid, view in world.engines.items()
        },
    )
    plans = {each.plan.instance: each.plan for each in of_type(decided(stale), PublishPlan)}
    assert {i: [ref.id.instance for ref in plan.donors[0]] for i, plan in plans.items()} == {
        0: [2, 3, 1],
        1: [3, 2, 0],
        2: [0, 1, 3],
        3: [1, 0, 2],
    }


def test_pairs_are_written_down_before_engines_are_told() -> None:
    """Labels of nodes have changed, and with them the best pairing."""
    world = in_zones(zoned("abab"), "aabb")
    kinds = [type(action) for action in decided(world)]
    assert kinds.index(WriteStatus) < kinds.index(PublishPlan)


def test_the_next_operator_goes_on_with_the_same_pairs() -> None:
    world = settled(in_zones(zoned("aabb"), "abcd"))
    assert pairs(world) == pairs(zoned("aabb")) != pairs(zoned("abcd"))
    knows_no_engine_yet = replace(world, engines={})
    assert pairs(settled(knows_no_engine_yet)) == pairs(world)


def test_a_pod_that_is_made_again_moves_no_pair_until_it_is_somewhere() -> None:
    world = zoned("aabb")
    assert pairs(without_pod(world, stage(2, 0))) == pairs(world)
    assert pairs(with_pod(world, stage(2, 0), node=None, ready=False)) == pairs(world)


def test_a_pod_that_comes_back_in_another_zone_is_paired_anew() -> None:
    world = zoned("aabb")
    elsewhere = with_pod(world, stage(2, 0), node="node-0-0")
    assert pairs(elsewhere) != pairs(world)
    assert pairs(elsewhere, place=1) == pairs(world, place=1)


def test_a_deleted_node_moves_no_pair() -> None:
    world = zoned("aabb")
    assert pairs(replace(world, nodes={name: each for name, each in world.nodes.items() if name != "node-2-0"})) == (
        pairs(world)
    )


class TestTheCondition:
    def test_is_true_and_says_which_pairs_share_a_zone(self) -> None:
        status, reason, message = condition(zoned("aab"), "ReplicationHealthy")
        assert (status, reason) == ("True", "SharedFailureDomain")
        assert "0.0 and 1.0 (a), 0.1 and 1.1 (a)." in message
        assert ZONE in message

    def test_names_two_that_keep_for_each_other_once_and_does_not_list_them_all(self) -> None:
        two = settled(in_zones(healthy_world(instances=2, stages=5, **BY_ZONE), "aa"))
        _, _, message = condition(two, "ReplicationHealthy")
        assert "0.0 and 1.0 (a), 0.1 and 1.1 (a), 0.2 and 1.2 (a) and 2 more." in message

    def test_has_nothing_to_say_where_every_pair_is_apart(self) -> None:
        assert condition(zoned("abba"), "ReplicationHealthy")[1] == "Replicating"

    def test_has_nothing_to_say_of_hosts(self) -> None:
        assert condition(in_zones(healthy_world(), "aa"), "ReplicationHealthy")[1] == "Replicating"

    def test_says_that_nodes_cannot_be_seen(self) -> None:
        status, reason, message = condition(healthy_world(**BY_ZONE), "ReplicationHealthy")
        assert (status, reason) == ("True", "Replicating")
        assert "bind the ClusterRole resilientllm-operator-nodes" in message

    def test_puts_copies_that_are_missing_first(self) -> None:
        without_copies = engine_state(0).model_copy(
            update={"replication": (keeping(0, 0, kept_by=None), keeping(0, 1))}
        )
        assert condition(with_engine(zoned("aa"), 0, without_copies), "ReplicationHealthy")[1] == "NotReplicating"

    def test_an_event_tells_of_it_once_and_again_when_it_is_over(self) -> None:
        apart, together = zoned("ab"), settled(in_zones(zoned("ab"), "aa"))
        (risk,) = of_type(decided(in_zones(apart, "aa")), Announce)
        assert (risk.reason, risk.warning) == ("SharedFailureDomain", True)
        assert of_type(decided(together), Announce) == []
        (relief,) = of_type(decided(in_zones(together, "ab")), Announce)
        assert (relief.reason, relief.warning) == ("ReplicationHealthy", False)


@pytest.mark.parametrize(
    ("key", "nodes", "domain"),
    [
        (HOSTNAME, {}, "node-0"),
        (HOSTNAME, {"node-0": node("node-0", zone="a")}, "node-0"),
        (ZONE, {"node-0": node("node-0", zone="a")}, "a"),
        (ZONE, {"node-0": node("node-0")}, "node-0"),
        (ZONE, {}, None),
    ],
    ids=["host, nodes unseen", "host", "zone", "zone, no label", "zone, nodes unseen"],
)
def test_the_failure_domain_of_a_stage(key: str, nodes: dict[str, NodeView], domain: str | None) -> None:
    world = replace(with_pods(new_world(replication={"topologyKey": key})), nodes=nodes)
    location = location_of(world, StageId(instance=0, stage=0))
    assert (location.domain, location.host) == (domain, "node-0")
