"""Observe: from the API server's JSON to the plain data that decisions are made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic import ValidationError
from resilientllm_api.crd import KIND, PAUSED_ANNOTATION, RETRY_ANNOTATION, ResilientLLMSpec, ResilientLLMStatus

from resilientllm_operator.names import NAME_LABEL, SPEC_HASH_ANNOTATION, slot_of
from resilientllm_operator.node_affinity import nodes_kept_off
from resilientllm_operator.world import (
    Ailment,
    Exit,
    NodeCondition,
    NodeView,
    ObjectView,
    Owner,
    PodView,
    Taint,
    Toleration,
    Waiting,
)

Json = Mapping[str, Any]
_VIEW = "view"
"""Where the essence of a pod has what was read from it."""
_ASIDE = ("apiVersion", "kind", "status")


def view_object(obj: Json) -> ObjectView:
    """Raises ValidationError for a spec that this version cannot read."""
    metadata = obj["metadata"]
    return ObjectView(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        spec=ResilientLLMSpec.model_validate(obj["spec"]),
        status=view_status(obj),
        retry=metadata.get("annotations", {}).get(RETRY_ANNOTATION),
        paused=metadata.get("annotations", {}).get(PAUSED_ANNOTATION) == "true",
        deleting="deletionTimestamp" in metadata,
        resource_version=metadata.get("resourceVersion", ""),
    )


def view_status(obj: Json) -> ResilientLLMStatus:
    """The status, or an empty one: memory that cannot be read is memory lost, and everything here survives that."""
    try:
        return ResilientLLMStatus.model_validate(obj.get("status") or {})
    except ValidationError:
        return ResilientLLMStatus()


def view_pods(pods: Iterable[Json], owner_uid: str) -> tuple[PodView, ...]:
    """Our pods of one object. The owner's uid tells them from those of an earlier object of the same name."""
    views = (pod.get(_VIEW) or _view_pod(pod) for pod in pods if is_controlled_by(pod, owner_uid))
    return tuple(sorted((view for view in views if view is not None), key=lambda view: (view.slot, view.name)))


def essence(kind: str, obj: Json) -> dict[str, Any]:
    """What of an object is worth keeping."""
    if kind == "Node":
        return node_essence(obj)
    if kind == "Pod":
        return pod_essence(obj)
    if kind == KIND:
        return {**obj, "metadata": {key: value for key, value in obj["metadata"].items() if key != "managedFields"}}
    return ours_essence(obj)


def ours_essence(obj: Json) -> dict[str, Any]:
    """What we have made, other than pods: nothing is decided from its status."""
    kept = ("namespace", "name", "uid", "resourceVersion", "labels", "ownerReferences")
    metadata = {key: value for key, value in obj["metadata"].items() if key in kept}
    return {**{key: value for key, value in obj.items() if key not in _ASIDE}, "metadata": metadata}


def pod_essence(pod: Json) -> dict[str, Any]:
    """A pod as it is looked at, and what names it."""
    metadata = pod["metadata"]
    kept = ("namespace", "name", "uid", "resourceVersion")
    owners = [each for each in metadata.get("ownerReferences", []) if each.get("controller")]
    return {
        "metadata": {
            **{key: metadata[key] for key in kept if key in metadata},
            "labels": {key: value for key, value in metadata.get("labels", {}).items() if key == NAME_LABEL},
            "ownerReferences": [{"controller": True, "uid": each["uid"]} for each in owners],
        },
        "spec": {"nodeName": pod.get("spec", {}).get("nodeName")},
        _VIEW: _view_pod(pod),
    }


def node_essence(node: Json) -> dict[str, Any]:
    """What of a node is worth keeping: its list of images alone is longer than all that we look at."""
    metadata, spec, status = node["metadata"], node.get("spec", {}), node.get("status", {})
    kept = ("name", "resourceVersion", "labels", "deletionTimestamp")
    return {
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {key: spec[key] for key in ("unschedulable", "taints") if key in spec},
        "status": {"conditions": status.get("conditions", [])},
    }


def view_node(node: Json) -> NodeView:
    metadata, spec = node["metadata"], node.get("spec", {})
    return NodeView(
        name=metadata["name"],
        labels=metadata.get("labels", {}),
        unschedulable=spec.get("unschedulable", False),
        deleting="deletionTimestamp" in metadata,
        taints=tuple(Taint(each["key"], each["effect"], each.get("value", "")) for each in spec.get("taints") or ()),
        conditions={
            each["type"]: NodeCondition(
                status=each["status"],
                reason=each.get("reason", ""),
                message=each.get("message", ""),
                since=_time(each["lastTransitionTime"]) if each.get("lastTransitionTime") else None,
            )
            for each in node.get("status", {}).get("conditions") or ()
        },
    )


def is_controlled_by(obj: Json, owner_uid: str) -> bool:
    references = obj["metadata"].get("ownerReferences", [])
    return any(reference.get("controller") and reference["uid"] == owner_uid for reference in references)


def owner_of(obj: Json | None, owner_uid: str) -> Owner:
    if obj is None:
        return Owner.NOBODY
    return Owner.OURS if is_controlled_by(obj, owner_uid) else Owner.FOREIGN


def _view_pod(pod: Json) -> PodView | None:
    metadata, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    slot = slot_of(metadata.get("labels", {}))
    if slot is None:
        return None
    container: Json = next(iter(status.get("containerStatuses", [])), {})
    ended = status.get("phase") in ("Failed", "Succeeded")
    ready = _condition(status, "Ready")
    return PodView(
        name=metadata["name"],
        uid=metadata["uid"],
        slot=slot,
        spec_hash=metadata.get("annotations", {}).get(SPEC_HASH_ANNOTATION, ""),
        created=_time(metadata["creationTimestamp"]),
        ip=_ipv4(status),
        node=spec.get("nodeName"),
        leaving="deletionTimestamp" in metadata or ended,
        ended=ended and "deletionTimestamp" not in metadata,
        ends_by=_time(metadata["deletionTimestamp"]) if "deletionTimestamp" in metadata else None,
        ready=ready.get("status") == "True",
        ready_since=_time(ready["lastTransitionTime"]) if ready.get("lastTransitionTime") else None,
        loads=_loads(container, ready),
        restarts=container.get("restartCount", 0),
        unschedulable=_unschedulable(status),
        waiting=_waiting(container),
        last_exit=_last_exit(container),
        ailments=tuple(_ailments(container)),
        tolerations=_once(tuple(map(_toleration, spec.get("tolerations") or ()))),
        kept_off=nodes_kept_off(spec),
    )


def _ipv4(status: Json) -> str | None:
    """Plans and endpoints are IPv4 for now."""
    addresses = [each["ip"] for each in status.get("podIPs", [])] or [status.get("podIP")]
    return next((address for address in addresses if address and ":" not in address), None)


def _condition(status: Json, kind: str) -> Json:
    return next((each for each in status.get("conditions", []) if each["type"] == kind), {})


def _unschedulable(status: Json) -> str | None:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return str(scheduled.get("message") or "the scheduler does not say why")
    return None


def _loads(container: Json, ready: Json) -> bool:
    """Not ready since before the process at hand began. One that was ready has turned since."""
    began, since = container.get("state", {}).get("running", {}).get("startedAt"), ready.get("lastTransitionTime")
    return bool(ready.get("status") != "True" and began and since and _time(since) <= _time(began))


def _waiting(container: Json) -> Waiting | None:
    waiting = container.get("state", {}).get("waiting")
    return Waiting(waiting.get("reason", ""), waiting.get("message", "")) if waiting else None


def _last_exit(container: Json) -> Exit | None:
    for state in (container.get("state", {}), container.get("lastState", {})):
        if terminated := state.get("terminated"):
            at = terminated.get("finishedAt")
            return Exit(terminated["exitCode"], terminated.get("message", ""), _time(at) if at else None)
    return None


@lru_cache(maxsize=1024)
def _once(tolerations: tuple[Toleration, ...]) -> tuple[Toleration, ...]:
    """Thousands of pods have the same, which is kept once."""
    return tolerations


def _toleration(toleration: Json) -> Toleration:
    return Toleration(
        key=toleration.get("key"),
        value=None if toleration.get("operator") == "Exists" else toleration.get("value", ""),
        effect=toleration.get("effect"),
        seconds=toleration.get("tolerationSeconds"),
    )


def _ailments(container: Json) -> Iterator[Ailment]:
    """KEP-4680: the health of every device that the container was given, by device plugins and by DRA drivers."""
    for resource in container.get("allocatedResourcesStatus") or ():
        for device in resource.get("resources") or ():
            if (health := device.get("health", "Healthy")) != "Healthy":
                certain, message = health == "Unhealthy", device.get("message") or ""
                yield Ailment(resource["name"], device["resourceID"], certain, message)


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
