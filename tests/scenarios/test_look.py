"""What is read from one answer of the API server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from e2e.scenarios.look import TAKES_REQUESTS, Look, Node, parse_look

LABEL = "resilientllm.dev/name"
START = datetime(2026, 1, 1, tzinfo=UTC)


def condition(kind: str, status: str) -> dict[str, Any]:
    common = {"observedGeneration": 1, "lastTransitionTime": START.isoformat(), "reason": "Because", "message": "so"}
    return {"type": kind, "status": status, **common}


def recovery(kind: str, instance: int, after_seconds: float) -> dict[str, Any]:
    detected = (START + timedelta(seconds=after_seconds)).isoformat()
    return {"id": str(after_seconds), "instance": instance, "kind": kind, "stages": [0], "detectedAt": detected}


def items() -> list[dict[str, Any]]:
    """Everything in order: two instances of one stage, on two nodes for stages and one for engines."""
    good = {"Ready": "True", "ReplicationHealthy": "True"}
    conditions = good | dict.fromkeys(("Degraded", "Progressing", "Recovering"), "False")
    return [
        {
            "kind": "ResilientLLM",
            "metadata": {"name": "tiny", "generation": 1},
            "spec": {"image": "i", "model": {"path": "/m"}, "instances": 2, "stages": 1},
            "status": {"conditions": [condition(*each) for each in conditions.items()], "recoveries": []},
        },
        *(pod(instance, None, "node-0") for instance in (0, 1)),
        *(pod(instance, 0, f"node-{instance + 1}") for instance in (0, 1)),
        *(node(f"node-{number}") for number in range(3)),
        {
            "kind": "EndpointSlice",
            "metadata": {"name": "tiny-engines", "labels": {LABEL: "tiny"}},
            "endpoints": [
                {"addresses": [address], "conditions": {"ready": True, "serving": True, "terminating": False}}
                for address in ("10.0.0.1", "10.0.0.2")
            ],
        },
    ]


def pod(instance: int, stage: int | None, on: str) -> dict[str, Any]:
    labels = {LABEL: "tiny", "resilientllm.dev/instance": str(instance)}
    if stage is not None:
        labels["resilientllm.dev/stage"] = str(stage)
    return {
        "kind": "Pod",
        "metadata": {"name": f"{instance}-{stage}", "uid": f"uid-{instance}-{stage}", "labels": labels},
        "spec": {"nodeName": on},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def node(name: str, ready: str = "True") -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": ready}]
    return {"kind": "Node", "metadata": {"name": name}, "spec": {}, "status": {"conditions": conditions}}


def look(changed: list[dict[str, Any]]) -> Look:
    return parse_look(changed, "tiny", 1.0)


def of(kind: str, changed: list[dict[str, Any]], place: int = 0) -> dict[str, Any]:
    return [each for each in changed if each["kind"] == kind][place]


def test_all_in_order_is_settled() -> None:
    seen = look(items())

    assert seen.whole and seen.settled
    assert [(each.instance, each.node) for each in seen.alone] == [(0, "node-1"), (1, "node-2")]
    assert set(seen.nodes.values()) == {Node("True", True)}
    assert set(seen.endpoints.values()) == {TAKES_REQUESTS}


@pytest.mark.parametrize("kind", ["Ready", "ReplicationHealthy", "Degraded", "Recovering"])
def test_a_condition_that_is_not_as_it_should_be_is_not_whole(kind: str) -> None:
    changed = items()
    for each in of("ResilientLLM", changed)["status"]["conditions"]:
        if each["type"] == kind:
            each["status"] = "False" if each["status"] == "True" else "True"

    assert not look(changed).whole


def test_an_engine_out_of_the_service_is_not_whole() -> None:
    changed = items()
    of("EndpointSlice", changed)["endpoints"][0]["conditions"]["ready"] = False

    assert not look(changed).whole


def test_a_pod_that_is_leaving_is_not_of_its_slot_any_more() -> None:
    changed = items()
    of("Pod", changed, 2)["metadata"]["deletionTimestamp"] = START.isoformat()

    assert not look(changed).whole
    changed.append(pod(0, 0, "node-2"))
    changed[-1]["metadata"] |= {"name": "new", "uid": "uid-new"}
    seen = look(changed)
    assert seen.whole and not seen.settled
    assert seen.pod(0, 0).uid == "uid-new"
    # The one that leaves still is on its node, and no longer a stage to choose.
    assert seen.alone == ()


def test_two_pods_that_both_stay_in_one_slot_are_not_whole() -> None:
    changed = [*items(), pod(0, 0, "node-2")]
    changed[-1]["metadata"] |= {"name": "new", "uid": "uid-new"}

    assert not look(changed).whole


@pytest.mark.parametrize("broken", [node("node-2", "Unknown"), node("node-2") | {"spec": {"unschedulable": True}}])
def test_a_node_that_cannot_be_used_is_not_settled(broken: dict[str, Any]) -> None:
    changed = [each for each in items() if each["metadata"]["name"] != "node-2"]

    assert look([*changed, node("node-2")]).settled
    assert not look([*changed, broken]).settled


def test_the_life_of_a_pod_is_told_as_far_as_it_has_come() -> None:
    new = pod(0, 0, "node-2")
    new["metadata"] |= {"uid": "uid-new", "creationTimestamp": "2026-01-01T00:00:01Z"}
    new["status"] = {
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T00:00:02Z"},
            {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:03Z"},
        ],
        "containerStatuses": [{"state": {"running": {"startedAt": "2026-01-01T00:00:04Z"}}}],
    }

    life = look([*items(), new]).lives["uid-new"]

    assert {what: (at - START).total_seconds() for what, at in life.items()} == {
        "made": 1,
        "scheduled": 2,
        "started": 4,
    }


@pytest.mark.parametrize(
    ("recoveries", "home"),
    [
        ([], False),
        ([("Borrow", 0, 1)], False),
        ([("Borrow", 0, 1), ("SwapBack", 0, 2)], True),
        ([("Borrow", 0, 1), ("Move", 1, 2), ("SwapBack", 0, 3)], False),
        # Of an earlier fault.
        ([("Borrow", 0, -9), ("SwapBack", 0, -8)], False),
    ],
)
def test_home_is_where_the_last_change_of_each_instance_was_a_swap_back(
    recoveries: list[tuple[str, int, float]], home: bool
) -> None:
    changed = items()
    of("ResilientLLM", changed)["status"]["recoveries"] = [recovery(*each) for each in recoveries]

    assert look(changed).home_since(START) is home
