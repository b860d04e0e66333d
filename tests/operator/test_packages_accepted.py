"""A real API server takes what the packages render, field by field."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.cluster.provider import Cluster
from tests.operator.cluster import SYSTEM
from tests.packages.rendering import MANIFESTS, template

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
STRICTLY = ("--dry-run=server", "--validate=strict", "--server-side", "--force-conflicts")
EVERYTHING: dict[str, Any] = {
    "watchNamespace": "default",
    "logLevel": "DEBUG",
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "system", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "system-cluster-critical",
    "podLabels": {"team": "inference"},
    "podAnnotations": {"example.com/owner": "inference"},
    "networkPolicies": {"operator": True, "modelNamespaces": ["default"]},
    "argocd": {"syncWaves": True},
}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_of_the_chart(cluster: Cluster, values: dict[str, Any]) -> None:
    said = cluster.kubectl("apply", *STRICTLY, "--filename=-", stdin=template(values, namespace=SYSTEM))

    assert "deployment.apps/resilientllm-operator serverside-applied (server dry run)" in said
    assert ("networkpolicy.networking.k8s.io/resilientllm-stages" in said) == bool(values)


@pytest.mark.parametrize("overlay", ["hardened", "without-crd"])
def test_of_overlays(cluster: Cluster, overlay: str) -> None:
    said = cluster.kubectl("apply", *STRICTLY, "-k", str(MANIFESTS / "overlays" / overlay))

    assert "deployment.apps/resilientllm-operator serverside-applied (server dry run)" in said
