"""What is read from the cluster's JSON."""

from __future__ import annotations

from typing import Any

from resilientllm_api.crd import ConditionType

from e2e.demo.observation import Observation, parse, waits_for


def resource(ready: str = "True", degraded: str = "False", observed: int = 1) -> dict[str, Any]:
    def condition(kind: str, status: str) -> dict[str, Any]:
        return {
            "type": kind,
            "status": status,
            "observedGeneration": observed,
            "lastTransitionTime": "2026-01-01T00:00:00Z",
            "reason": "Because",
            "message": "of this",
        }

    return {
        "kind": "ResilientLLM",
        "metadata": {"name": "tiny", "generation": 1},
        "spec": {"image": "i", "model": {"path": "/m"}, "instances": 2, "stages": 2},
        "status": {"conditions": [condition("Ready", ready), condition("Degraded", degraded)]},
    }


def pod(name: str, instance: int, stage: int | None, **status: Any) -> dict[str, Any]:
    labels = {"resilientllm.dev/name": "tiny", "resilientllm.dev/instance": str(instance)}
    if stage is not None:
        labels["resilientllm.dev/stage"] = str(stage)
    return {
        "kind": "Pod",
        "metadata": {"name": name, "uid": f"uid-of-{name}", "labels": labels},
        "spec": {"nodeName": "node-1"},
        "status": status,
    }


def see(*items: dict[str, Any]) -> Observation:
    return parse(items, "tiny")


def test_whole_is_ready_and_not_degraded() -> None:
    assert see(resource()).whole
    assert not see(resource(degraded="True")).whole
    assert not see(resource(ready="False")).whole


def test_condition_of_an_older_spec_says_nothing() -> None:
    assert not see(resource(observed=0)).ready


def test_nothing_there_is_not_whole() -> None:
    nothing = see()
    assert not nothing.ready and not nothing.whole
    assert waits_for(nothing) == "the object is not there yet"


def test_waiting_is_told_in_the_words_of_the_condition() -> None:
    assert waits_for(see(resource(ready="False"))) == "Because: of this"


def test_pods_are_those_of_the_object_in_the_order_of_their_places() -> None:
    foreign = pod("other", 0, 0)
    foreign["metadata"]["labels"]["resilientllm.dev/name"] = "other"
    found = see(pod("b", 1, 0), pod("c", 0, 1), pod("a", 0, None), foreign).pods

    assert [each.place for each in found] == ["engine 0", "stage 0.1", "stage 1.0"]
    assert [each.container for each in found] == ["engine", "stage", "stage"]


def test_pod_tells_its_readiness_restarts_and_what_it_waits_for() -> None:
    running = pod(
        "a",
        0,
        0,
        podIP="10.0.0.1",
        conditions=[{"type": "Ready", "status": "True"}],
        containerStatuses=[{"restartCount": 2, "state": {"running": {}}}],
    )
    pulling = pod("b", 0, 1, containerStatuses=[{"restartCount": 0, "state": {"waiting": {"reason": "ErrImagePull"}}}])
    lost = pod("c", 1, 0, conditions=[{"type": "PodScheduled", "status": "False", "message": "no node"}])

    first, second, third = see(running, pulling, lost).pods
    assert (first.ready, first.restarts, first.ip, first.waiting) == (True, 2, "10.0.0.1", None)
    assert (second.ready, second.waiting) == (False, "ErrImagePull")
    assert third.waiting == "no node"


def test_events_are_those_about_the_object_oldest_first() -> None:
    def event(uid: str, at: str, name: str) -> dict[str, Any]:
        return {
            "kind": "Event",
            "metadata": {"uid": uid, "creationTimestamp": at},
            "regarding": {"kind": "ResilientLLM", "name": name},
            "reason": uid,
            "note": "",
        }

    found = see(event("late", "2026-01-02", "tiny"), event("early", "2026-01-01", "tiny"), event("x", "2026", "other"))
    assert [each.reason for each in found.events] == ["early", "late"]


def test_condition_that_is_not_there_is_neither_true_nor_false() -> None:
    seen = see(resource())
    assert not seen.is_true(ConditionType.AVAILABLE) and not seen.is_false(ConditionType.AVAILABLE)
