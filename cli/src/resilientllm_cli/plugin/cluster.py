"""What the plugin asks of a cluster, with the rights and the kubeconfig of whoever calls it. Thin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import kubernetes
import urllib3
from pydantic import ValidationError
from resilientllm_api.crd import GROUP, PLURAL, VERSION, ResilientLLM

from resilientllm_cli.errors import UsageError

TIMEOUT_SECONDS = 10


@dataclass(frozen=True)
class Node:
    name: str
    labels: Mapping[str, str]
    cordoned: bool


class Cluster:
    """Every method raises UsageError, in words, where the API server cannot be reached or refuses."""

    def __init__(self, client: Any, namespace: str) -> None:
        self.namespace = namespace
        """The one that the kubeconfig's context names."""
        self._objects = kubernetes.client.CustomObjectsApi(client)
        self._core = kubernetes.client.CoreV1Api(client)

    @classmethod
    def connect(cls, kubeconfig: Path | None, context: str | None) -> Self:
        """``kubeconfig``: by default as kubectl finds it; ``context``: by default the current one."""
        file = str(kubeconfig) if kubeconfig else None
        try:
            contexts, current = kubernetes.config.list_kube_config_contexts(file)
            chosen = next((each for each in contexts if each["name"] == context), current if context is None else None)
            if chosen is None:
                names = ", ".join(each["name"] for each in contexts)
                raise UsageError(f"--context: expected one of {names}, found {context}")
            client = kubernetes.config.new_client_from_config(file, context)
        except kubernetes.config.ConfigException as error:
            raise UsageError(f"no usable kubeconfig: {error}. Pass --kubeconfig FILE, or set KUBECONFIG") from error
        client.configuration.retries = False
        return cls(client, chosen["context"].get("namespace") or "default")

    def objects(self, namespace: str | None) -> list[ResilientLLM]:
        """All of one namespace; None: of all namespaces."""
        where = () if namespace is None else (namespace,)
        ask = self._objects.list_namespaced_custom_object if where else self._objects.list_cluster_custom_object
        with _in_words():
            found = ask(GROUP, VERSION, *where, PLURAL, _request_timeout=TIMEOUT_SECONDS)
        return [_read(each) for each in found["items"]]

    def object(self, namespace: str, name: str) -> ResilientLLM:
        with _in_words():
            return _read(
                self._objects.get_namespaced_custom_object(
                    GROUP, VERSION, namespace, PLURAL, name, _request_timeout=TIMEOUT_SECONDS
                )
            )

    def nodes(self) -> dict[str, Node]:
        with _in_words():
            return {
                each.metadata.name: _node(each) for each in self._core.list_node(_request_timeout=TIMEOUT_SECONDS).items
            }

    def node(self, name: str) -> Node:
        with _in_words():
            return _node(self._core.read_node(name, _request_timeout=TIMEOUT_SECONDS))

    def cordon(self, node: str) -> None:
        with _in_words():
            self._core.patch_node(node, {"spec": {"unschedulable": True}}, _request_timeout=TIMEOUT_SECONDS)


def _node(node: Any) -> Node:
    return Node(node.metadata.name, node.metadata.labels or {}, bool(node.spec.unschedulable))


def _read(found: Mapping[str, Any]) -> ResilientLLM:
    try:
        return ResilientLLM.model_validate(found)
    except ValidationError as error:
        name = found["metadata"]["name"]
        words = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise UsageError(
            f"cannot read ResilientLLM {name}: use the plugin and the CRD of one version. {words}"
        ) from error


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except kubernetes.client.ApiException as error:
        raise UsageError(_refusal(error)) from error
    except urllib3.exceptions.HTTPError as error:
        raise UsageError(f"cannot reach the API server: {error}") from error


def _refusal(error: Any) -> str:
    try:
        status = json.loads(error.body)
    except (TypeError, ValueError):
        status = {}
    if error.status == 404 and not status.get("details", {}).get("name"):
        return f"this cluster has no {PLURAL}.{GROUP}: install it with the operator, kubectl apply -k manifests/base"
    return f"the API server refuses: {status.get('message') or error.reason}"
