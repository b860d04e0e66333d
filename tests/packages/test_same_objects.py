"""The Helm chart and the Kustomize manifests give the same objects, whatever is switched on.

Marked as cluster tests, because the programs are those of the cluster, which are built when they are first wanted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.errors import ClusterError
from tests.packages.rendering import MANIFESTS, SYSTEM, Objects, base_with, charted, kustomized, template

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
CRD = ("CustomResourceDefinition", "", "resilientllms.resilientllm.dev")
NAMESPACE = ("Namespace", "", SYSTEM)
DEPLOYMENT = ("Deployment", SYSTEM, "resilientllm-operator")

DOCS = "https://git.example.com/resilientllm/blob/main/docs"

CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({"crds.keep": False}, []),
    "kept": ({}, ["keep-crd"]),
    "one namespace": ({"watchNamespace": "models", "crds.keep": False}, ["one-namespace"]),
    "one replica": ({"replicas": 1, "crds.keep": False}, ["one-replica"]),
    "policies": ({"networkPolicies.operator": True, "crds.keep": False}, ["network-policies"]),
    "monitoring": (
        {"monitoring.prometheus": True, "monitoring.grafana": True, "crds.keep": False},
        ["prometheus", "grafana"],
    ),
    "waves": (
        {"argocd.syncWaves": True, "networkPolicies.operator": True, "monitoring.prometheus": True},
        ["keep-crd", "network-policies", "prometheus", "argocd-sync-waves"],
    ),
    "all": (
        {"watchNamespace": "models", "replicas": 1, "networkPolicies.operator": True},
        ["one-namespace", "one-replica", "network-policies", "keep-crd"],
    ),
}


def without_helms_own(objects: Objects) -> Objects:
    """Helm's mark for what it does not uninstall means nothing to anybody else."""
    annotations = objects[CRD]["metadata"].get("annotations", {})
    annotations.pop("helm.sh/resource-policy", None)
    return objects


@pytest.mark.parametrize("name", CASES)
def test_chart_and_base_give_the_same_objects(name: str, tmp_path: Path) -> None:
    values, components = CASES[name]
    expected = base_with(tmp_path, *components)
    del expected[NAMESPACE]  # `helm install --create-namespace` makes it.

    found = without_helms_own(charted(values))
    assert len(found) > 8
    assert found == expected


def test_every_component_is_compared() -> None:
    compared = {component for _, components in CASES.values() for component in components}

    assert {path.name for path in (MANIFESTS / "components").iterdir()} - {"runbooks"} == compared


@pytest.mark.parametrize("docs", [DOCS, f"{DOCS}/"])
def test_alerts_lead_to_where_the_user_keeps_the_docs(docs: str, tmp_path: Path) -> None:
    """By a ConfigMap that Kustomize alone sees, and by a value of the chart."""
    place = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": "resilientllm-runbooks",
            "annotations": {"config.kubernetes.io/local-config": "true"},
        },
        "data": {"docs": DOCS},
    }
    expected = base_with(tmp_path, "prometheus", "runbooks", resources=[place])
    del expected[NAMESPACE]
    groups = expected["PrometheusRule", SYSTEM, "resilientllm"]["spec"]["groups"]
    pages = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]

    assert pages and all(page.startswith(f"{DOCS}/runbooks/ResilientLLM") for page in pages)
    found = charted({"monitoring.prometheus": True, "monitoring.docs": docs, "crds.keep": False})
    assert without_helms_own(found) == expected


def test_the_crd_can_come_from_elsewhere() -> None:
    expected = kustomized(MANIFESTS / "overlays" / "without-crd")

    assert charted({"crds.enabled": False}) == expected


def test_the_policies_of_models_are_the_same_for_every_namespace() -> None:
    extra = charted({"networkPolicies.modelNamespaces": ["models", "research"]})
    expected = kustomized(MANIFESTS / "overlays" / "models")
    policies = {key: each for key, each in extra.items() if key[0] == "NetworkPolicy"}

    assert {key: each for key, each in policies.items() if key[1] == "models"} == expected
    assert len(policies) == 2 * len(expected) == 4


@pytest.mark.parametrize("overlay", ["one-namespace", "hardened"])
def test_overlays_render_an_operator(overlay: str) -> None:
    assert DEPLOYMENT in kustomized(MANIFESTS / "overlays" / overlay)


def test_nothing_stays_in_the_namespace_of_the_manifests_when_the_release_is_elsewhere() -> None:
    text = template({"networkPolicies.operator": True, "networkPolicies.modelNamespaces": ["a"]}, namespace="elsewhere")

    assert "namespace: elsewhere" in text
    assert SYSTEM not in text


def test_values_arrive_in_the_deployment() -> None:
    values = {
        "image": {"repository": "registry.example.com/operator", "digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "pull"}],
        "logLevel": "DEBUG",
        "watchNamespace": "models",
        "nodeSelector": {"pool": "system"},
        "tolerations": [{"key": "system", "operator": "Exists"}],
        "priorityClassName": "system-cluster-critical",
        "podLabels": {"team": "inference"},
        "podAnnotations": {"a": "b: {{ c }}"},
        "resources": {"limits": {"memory": "1Gi"}},
        "affinity": {"nodeAffinity": {}},
    }
    template_of_pods = charted(values)[DEPLOYMENT]["spec"]["template"]
    pod = template_of_pods["spec"]
    (container,) = pod["containers"]

    assert container["image"] == "registry.example.com/operator@sha256:" + "0" * 64
    assert container["args"] == ["--namespace=models", "--log-level=DEBUG"]
    assert container["resources"] == {"requests": {"cpu": "20m", "memory": "96Mi"}, "limits": {"memory": "1Gi"}}
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["nodeSelector"] == {"pool": "system"}
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert pod["priorityClassName"] == "system-cluster-critical"
    assert {"key": "system", "operator": "Exists"} in pod["tolerations"] and len(pod["tolerations"]) == 3
    assert template_of_pods["metadata"]["labels"]["team"] == "inference"
    assert template_of_pods["metadata"]["annotations"] == {"a": "b: {{ c }}"}


def test_helm_refuses_what_the_schema_does() -> None:
    with pytest.raises(ClusterError, match=r"at '/replicas': minimum"):
        template({"replicas": 0})
    with pytest.raises(ClusterError, match="additional properties 'watchNamespaces' not allowed"):
        template({"watchNamespaces": "models"})


def test_without_the_right_to_look_at_nodes_none_is_bound() -> None:
    assert [key for key in charted({"nodes.watch": False}) if key[2] == "resilientllm-operator-nodes"] == []
