"""What the cluster says at one moment, in one answer of the API server: object, pods, nodes, endpoints. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from resilientllm_api.crd import ConditionType, RecoveryStatus
from resilientllm_api.engine_state import RecoveryKind

from e2e.demo.observation import NAME_LABEL, Observation, Pod, parse

KINDS = "nodes,resilientllms,pods,events.events.k8s.io,endpointslices"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Endpoint:
    """One engine behind the Service."""

    ready: bool
    serving: bool
    terminating: bool


TAKES_REQUESTS = Endpoint(ready=True, serving=True, terminating=False)


@dataclass(frozen=True)
class Node:
    ready: str
    """``True``, ``False``, or ``Unknown``: nobody hears of it."""
    schedulable: bool


@dataclass(frozen=True)
class Look:
    at_seconds: float
    """Of ``time.monotonic``, before the API server was asked."""
    seen: Observation
    leaving: frozenset[str] = frozenset()
    """Uids of pods that are Terminating, perhaps for ever on a node that is gone."""
    lives: Mapping[str, Mapping[str, datetime]] = field(default_factory=dict)
    """When a pod was made, scheduled, started and ready, by its uid; Kubernetes counts whole seconds."""
    nodes: Mapping[str, Node] = field(default_factory=dict)
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    """By address."""

    @property
    def pods(self) -> tuple[Pod, ...]:
        """Those that are to stay."""
        return tuple(pod for pod in self.seen.pods if pod.uid not in self.leaving)

    def pod(self, instance: int, stage: int | None) -> Pod:
        """The one pod of a slot that is to stay."""
        (pod,) = self.pods_of(instance, stage)
        return pod

    def pods_of(self, instance: int, stage: int | None) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if (pod.instance, pod.stage) == (instance, stage))

    @property
    def stages(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.stage is not None)

    @property
    def alone(self) -> tuple[Pod, ...]:
        """Stages with no other pod of the object on their node: whoever ends the node ends exactly one stage."""
        crowd = Counter(pod.node for pod in self.seen.pods)
        return tuple(pod for pod in self.stages if crowd[pod.node] == 1)

    @property
    def whole(self) -> bool:
        """Every instance serves on its own stages, every place has a keeper, every slot has exactly one pod."""
        spec = self.seen.obj.spec if self.seen.obj else None
        slots = Counter((pod.instance, pod.stage) for pod in self.pods)
        return (
            spec is not None
            and self.seen.whole
            and self.seen.is_true(ConditionType.REPLICATION_HEALTHY)
            and self.seen.is_false(ConditionType.RECOVERING)
            and len(slots) == spec.instances * (spec.stages + 1)
            and set(slots.values()) == {1}
            and all(pod.ready for pod in self.pods)
            and list(self.endpoints.values()) == [TAKES_REQUESTS] * spec.instances
        )

    @property
    def settled(self) -> bool:
        """Whole, with all nodes there, nothing on its way out, and nothing left to do."""
        return (
            self.whole
            and self.seen.is_false(ConditionType.PROGRESSING)
            and not self.leaving
            and all(node == Node("True", True) for node in self.nodes.values())
        )

    def home_since(self, moment: datetime) -> bool:
        """Places have changed hands since, and every instance is back on its own stages."""
        last = {each.instance: each.kind for each in self.recoveries_since(moment)}
        return bool(last) and set(last.values()) == {RecoveryKind.SWAP_BACK}

    def recoveries_since(self, moment: datetime) -> tuple[RecoveryStatus, ...]:
        """Oldest first."""
        return tuple(each for each in self.seen.status.recoveries if each.detected_at >= moment)


def parse_look(items: Iterable[Json], name: str, at_seconds: float) -> Look:
    """From all objects of :data:`KINDS` in a namespace; ``name`` is the ResilientLLM's."""
    items = list(items)
    return Look(
        at_seconds=at_seconds,
        seen=parse(items, name),
        leaving=frozenset(
            item["metadata"]["uid"]
            for item in items
            if item["kind"] == "Pod" and _is_ours(item, name) and "deletionTimestamp" in item["metadata"]
        ),
        lives={
            item["metadata"]["uid"]: _life(item) for item in items if item["kind"] == "Pod" and _is_ours(item, name)
        },
        nodes={item["metadata"]["name"]: _node(item) for item in items if item["kind"] == "Node"},
        endpoints={
            endpoint["addresses"][0]: _endpoint(endpoint["conditions"])
            for item in items
            if item["kind"] == "EndpointSlice" and _is_ours(item, name)
            for endpoint in item.get("endpoints") or ()
        },
    )


def _is_ours(item: Json, name: str) -> bool:
    return bool(item["metadata"].get("labels", {}).get(NAME_LABEL) == name)


def _life(item: Json) -> Mapping[str, datetime]:
    status = item["status"]
    since = {each["type"]: each.get("lastTransitionTime") for each in status.get("conditions", ()) if _is_true(each)}
    container: Json = next(iter(status.get("containerStatuses", ())), {})
    times = {
        "made": item["metadata"].get("creationTimestamp"),
        "scheduled": since.get("PodScheduled"),
        "started": container.get("state", {}).get("running", {}).get("startedAt"),
        "ready": since.get("Ready"),
    }
    return {what: datetime.fromisoformat(at) for what, at in times.items() if at is not None}


def _is_true(condition: Json) -> bool:
    return bool(condition["status"] == "True")


def _node(item: Json) -> Node:
    conditions = {each["type"]: each["status"] for each in item["status"].get("conditions", [])}
    return Node(conditions.get("Ready", "Unknown"), not item["spec"].get("unschedulable", False))


def _endpoint(conditions: Json) -> Endpoint:
    return Endpoint(*(bool(conditions.get(each)) for each in ("ready", "serving", "terminating")))
