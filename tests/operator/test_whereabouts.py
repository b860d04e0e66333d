"""A node wakes the objects that have pods there, and no others."""

from __future__ import annotations

from typing import Any

from resilientllm_operator.whereabouts import Whereabouts


def pod(name: str, owner: str | None = "tiny", node: str | None = None) -> dict[str, Any]:
    labels = {"resilientllm.dev/name": owner} if owner else {}
    return {"metadata": {"namespace": "n", "name": name, "labels": labels}, "spec": {"nodeName": node} if node else {}}


def test_an_object_is_where_its_pods_are() -> None:
    where = Whereabouts()
    for name, owner, node in (("a", "tiny", "node-1"), ("b", "tiny", "node-2"), ("c", "large", "node-1")):
        where.put(pod(name, owner, node))
    assert where.objects_on("node-1") == {("n", "tiny"), ("n", "large")}
    assert where.objects_on("node-2") == {("n", "tiny")}
    assert where.objects_on("node-3") == set()


def test_as_long_as_one_of_its_pods_is_there() -> None:
    where = Whereabouts()
    where.put(pod("a", node="node-1"))
    where.put(pod("b", node="node-1"))
    where.remove(pod("a", node="node-1"))
    assert where.objects_on("node-1") == {("n", "tiny")}
    where.remove(pod("b", node="node-1"))
    assert where.objects_on("node-1") == set()


def test_a_pod_is_nowhere_before_it_is_scheduled() -> None:
    where = Whereabouts()
    where.put(pod("a"))
    where.remove(pod("a"))
    where.put(pod("a", node="node-1"))
    assert where.objects_on("node-1") == {("n", "tiny")}


def test_the_next_pod_of_a_name_may_be_elsewhere() -> None:
    where = Whereabouts()
    where.put(pod("a", node="node-1"))
    where.put(pod("a", node="node-2"))
    assert where.objects_on("node-1") == set()
    assert where.objects_on("node-2") == {("n", "tiny")}


def test_pods_of_nobody_are_not_remembered() -> None:
    where = Whereabouts()
    where.put(pod("a", owner=None, node="node-1"))
    assert where.objects_on("node-1") == set()
