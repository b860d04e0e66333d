"""The Service and its EndpointSlice: who may get requests, told from the engines' own state.

The Service has no selector: a pod's readiness is a probe every two seconds, and an engine knows better and sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resilientllm_api.crd import InstancePhase, InstanceStatus
from resilientllm_api.ports import ENGINE_API_PORT

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import SLICE_MANAGER, Role, common_labels, slice_name
from resilientllm_operator.pods import owner_references
from resilientllm_operator.world import Contact, ObjectView, PodView, World

PORT_NAME = "http"
SERVICE_NAME_LABEL = "kubernetes.io/service-name"
SLICE_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"


def endpoint_url(obj: ObjectView) -> str:
    """The base URL for OpenAI clients inside the cluster."""
    port = obj.spec.service.port
    return f"http://{obj.name}.{obj.namespace}.svc{'' if port == 80 else f':{port}'}/v1"


def build_service(obj: ObjectView) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(obj, obj.name, {}),
        "spec": {
            "type": "ClusterIP",
            "ports": [
                {
                    "name": PORT_NAME,
                    "port": obj.spec.service.port,
                    "targetPort": ENGINE_API_PORT,
                    "protocol": "TCP",
                }
            ],
        },
    }


def build_endpoints(world: World, instances: Sequence[InstanceStatus]) -> Manifest:
    obj = world.object
    endpoints = [endpoint for endpoint in (_endpoint(world, pod, instances) for pod in _engine_pods(world)) if endpoint]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": _metadata(
            obj, slice_name(obj.name), {SERVICE_NAME_LABEL: obj.name, SLICE_MANAGED_BY: SLICE_MANAGER}
        ),
        "addressType": "IPv4",
        "ports": [{"name": PORT_NAME, "port": ENGINE_API_PORT, "protocol": "TCP"}],
        "endpoints": endpoints,
    }


def service_essence(manifest: Mapping[str, Any]) -> Manifest:
    """What of a Service is ours to say; the API server adds addresses and defaults."""
    ports = manifest["spec"].get("ports", [])
    return {
        "ports": [{key: port.get(key) for key in ("name", "port", "targetPort")} for port in ports],
        "labels": _own_labels(manifest),
        "selector": manifest["spec"].get("selector"),
    }


def endpoints_essence(manifest: Mapping[str, Any]) -> Manifest:
    """What of an EndpointSlice is ours to say."""
    return {
        "addressType": manifest["addressType"],
        "ports": [{key: port.get(key) for key in ("name", "port")} for port in manifest.get("ports") or []],
        "endpoints": list(manifest.get("endpoints") or []),
        "labels": _own_labels(manifest),
    }


def only_adds(before: Mapping[str, Any] | None, manifest: Manifest) -> bool:
    """Whether everything that gets requests by ``before``, an essence, goes on doing so."""
    return _ready_addresses(before or {}) <= _ready_addresses(manifest)


def _ready_addresses(endpoints: Mapping[str, Any]) -> set[str]:
    ready = [each for each in endpoints.get("endpoints", []) if each["conditions"]["ready"]]
    return {address for each in ready for address in each["addresses"]}


def _metadata(obj: ObjectView, name: str, labels: dict[str, str]) -> Manifest:
    return {
        "name": name,
        "namespace": obj.namespace,
        "labels": common_labels(obj.name) | labels,
        "ownerReferences": owner_references(obj.name, obj.uid),
    }


def _own_labels(manifest: Mapping[str, Any]) -> dict[str, str]:
    labels = manifest["metadata"].get("labels", {})
    return {key: value for key, value in labels.items() if "kubernetes.io/" in key}


def _engine_pods(world: World) -> list[PodView]:
    return sorted(
        (pod for pod in world.pods if pod.slot.role is Role.ENGINE and pod.ip and not pod.ended),
        key=lambda pod: (pod.slot, pod.created, pod.name),
    )


def _endpoint(world: World, pod: PodView, instances: Sequence[InstanceStatus]) -> Manifest | None:
    ready, serving = _ready_and_serving(world, pod, instances)
    endpoint: Manifest = {
        "addresses": [pod.ip],
        "conditions": {"ready": ready, "serving": serving, "terminating": pod.leaving},
        "targetRef": {"kind": "Pod", "namespace": world.object.namespace, "name": pod.name, "uid": pod.uid},
    }
    return endpoint if pod.node is None else endpoint | {"nodeName": pod.node}


def _ready_and_serving(world: World, pod: PodView, instances: Sequence[InstanceStatus]) -> tuple[bool, bool]:
    """Whether an engine may get new requests, and whether what it has goes on: both end apart when it gives way."""
    view = world.engine(pod)
    if pod.leaving:
        state = view.state if view.contact is Contact.ANSWERS else None
        return False, state is not None and (state.serving or state.leaving)
    status = next((each for each in instances if each.engine == pod.name), None)
    if status is None:
        return False, False
    leaving = view.state is not None and view.state.leaving
    return status.serving, status.serving or status.phase is InstancePhase.DRAINING or leaving
