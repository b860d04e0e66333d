"""What the cluster says of our object: the object itself, its pods and its events, as plain data.

Parsing is pure; only :func:`observe` talks to the cluster, and asks once for everything, so that what is compared was
true at the same moment.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from resilientllm_api.crd import KIND, Condition, ConditionStatus, ConditionType, ResilientLLM, ResilientLLMStatus

from e2e.cluster.provider import Cluster

NAME_LABEL = "resilientllm.dev/name"
ROLE_LABEL = "resilientllm.dev/role"
INSTANCE_LABEL = "resilientllm.dev/instance"
STAGE_LABEL = "resilientllm.dev/stage"

Json = Mapping[str, Any]


@dataclass(frozen=True, order=True)
class Pod:
    """One pod of an instance: its engine, or one of its stages."""

    instance: int
    stage: int | None
    """None for the engine."""
    name: str
    uid: str
    node: str | None
    ip: str | None
    ready: bool
    restarts: int
    waiting: str | None
    """Why its container does not run yet."""

    @property
    def place(self) -> str:
        return f"engine {self.instance}" if self.stage is None else f"stage {self.instance}.{self.stage}"

    @property
    def container(self) -> str:
        return "engine" if self.stage is None else "stage"


@dataclass(frozen=True)
class Event:
    uid: str
    at: str
    reason: str
    note: str


@dataclass(frozen=True)
class Observation:
    obj: ResilientLLM | None
    """None: there is no such object."""
    pods: tuple[Pod, ...] = ()
    events: tuple[Event, ...] = ()
    """Those of the object, oldest first."""

    @property
    def status(self) -> ResilientLLMStatus:
        return (self.obj.status if self.obj else None) or ResilientLLMStatus()

    def condition(self, kind: ConditionType) -> Condition | None:
        return next((each for each in self.status.conditions if each.type == kind), None)

    def is_true(self, kind: ConditionType) -> bool:
        """Of the spec as it is now: a condition of an older generation says nothing."""
        condition = self.condition(kind)
        generation = self.obj.metadata.get("generation") if self.obj else None
        return (
            condition is not None
            and condition.status is ConditionStatus.TRUE
            and condition.observed_generation == generation
        )

    def is_false(self, kind: ConditionType) -> bool:
        condition = self.condition(kind)
        return condition is not None and condition.status is ConditionStatus.FALSE

    @property
    def ready(self) -> bool:
        return self.is_true(ConditionType.READY)

    @property
    def whole(self) -> bool:
        """Serves on its own stages, all of them."""
        return self.ready and self.is_false(ConditionType.DEGRADED)

    def pod(self, instance: int, stage: int | None) -> Pod | None:
        return next((pod for pod in self.pods if (pod.instance, pod.stage) == (instance, stage)), None)


def observe(cluster: Cluster, namespace: str, name: str) -> Observation:
    """Everything about one object. It need not exist yet."""
    said = cluster.kubectl(
        "get", "resilientllms,pods,events.events.k8s.io", f"--namespace={namespace}", "--output=json"
    )
    return parse(json.loads(said)["items"], name)


def parse(items: Iterable[Json], name: str) -> Observation:
    """From the objects of a namespace, those that belong to the ResilientLLM ``name``."""
    obj: ResilientLLM | None = None
    pods: list[Pod] = []
    events: list[Event] = []
    for item in items:
        match item["kind"]:
            case "ResilientLLM" if item["metadata"]["name"] == name:
                obj = ResilientLLM.model_validate(item)
            case "Pod" if item["metadata"].get("labels", {}).get(NAME_LABEL) == name:
                pods.append(_pod(item))
            case "Event" if _is_about(item, name):
                events.append(_event(item))
    return Observation(obj, tuple(sorted(pods, key=_order)), tuple(sorted(events, key=lambda each: each.at)))


def waits_for(seen: Observation) -> str:
    """For people: what is missing until the object is whole."""
    if seen.obj is None:
        return "the object is not there yet"
    ready = seen.condition(ConditionType.READY)
    if ready is None:
        return "the operator has not looked at the object yet"
    degraded = seen.condition(ConditionType.DEGRADED)
    telling = degraded if seen.ready and degraded is not None and not seen.whole else ready
    return f"{telling.reason}: {telling.message}"


def _order(pod: Pod) -> tuple[int, int, str]:
    return pod.instance, -1 if pod.stage is None else pod.stage, pod.name


def _pod(item: Json) -> Pod:
    labels, status = item["metadata"]["labels"], item.get("status", {})
    container: Json = next(iter(status.get("containerStatuses", [])), {})
    conditions = {each["type"]: each for each in status.get("conditions", [])}
    scheduled: Json = conditions.get("PodScheduled", {})
    unscheduled = scheduled.get("message") if scheduled.get("status") == "False" else None
    waiting = container.get("state", {}).get("waiting", {}).get("reason")
    return Pod(
        instance=int(labels[INSTANCE_LABEL]),
        stage=int(labels[STAGE_LABEL]) if STAGE_LABEL in labels else None,
        name=item["metadata"]["name"],
        uid=item["metadata"]["uid"],
        node=item["spec"].get("nodeName"),
        ip=status.get("podIP"),
        ready=conditions.get("Ready", {}).get("status") == "True",
        restarts=container.get("restartCount", 0),
        waiting=waiting or unscheduled,
    )


def _is_about(item: Json, name: str) -> bool:
    regarding = item.get("regarding", {})
    return bool(regarding.get("kind") == KIND and regarding.get("name") == name)


def _event(item: Json) -> Event:
    at = item.get("eventTime") or item["metadata"]["creationTimestamp"]
    return Event(item["metadata"]["uid"], at, item.get("reason", ""), item.get("note", ""))
