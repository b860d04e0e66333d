"""What is scraped is what the pods have: their labels and the names of their ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from resilientllm_operator.names import NAME_LABEL, Role, Slot
from resilientllm_operator.pods import build_pod

from e2e.monitoring.scraping import configuration, rules
from tests.monitoring.test_rules import promtool
from tests.operator.builders import obj

MANIFESTS = Path(__file__).parents[2] / "manifests"
MONITORS = {
    each["metadata"]["name"]: each["spec"]
    for each in yaml.safe_load_all((MANIFESTS / "components" / "prometheus" / "podmonitors.yaml").read_text())
}
POLICIES = [
    policy
    for file in ("components/network-policies/operator.yaml", "overlays/models/network-policies.yaml")
    for policy in yaml.safe_load_all((MANIFESTS / file).read_text())
]
"""Those of Kustomize; the chart's are the same, as tests/packages shows."""


def scrapes(monitor: dict[str, Any], pod: dict[str, Any]) -> bool:
    (endpoint,) = monitor["podMetricsEndpoints"]
    ports = {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
    labels = pod["metadata"]["labels"]
    return monitor["selector"]["matchLabels"].items() <= labels.items() and endpoint["port"] in ports


def test_engines_and_stages_of_all_namespaces_are_scraped_by_one_each() -> None:
    engine, stage = (build_pod(obj(), slot) for slot in (Slot(0, Role.ENGINE), Slot(0, Role.STAGE, 1)))

    assert [name for name, monitor in MONITORS.items() if scrapes(monitor, engine)] == ["resilientllm-engines"]
    assert [name for name, monitor in MONITORS.items() if scrapes(monitor, stage)] == ["resilientllm-stages"]
    for name in ("resilientllm-engines", "resilientllm-stages"):
        assert MONITORS[name]["namespaceSelector"] == {"any": True}


def test_the_operator_is_scraped_and_says_itself_of_which_object_it_speaks() -> None:
    deployment = next(iter(yaml.safe_load_all((MANIFESTS / "base" / "operator.yaml").read_text())))
    pod = deployment["spec"]["template"]

    assert [name for name, monitor in MONITORS.items() if scrapes(monitor, pod)] == ["resilientllm-operator"]
    (endpoint,) = MONITORS["resilientllm-operator"]["podMetricsEndpoints"]
    assert endpoint["honorLabels"] is True


def lets_in(policy: dict[str, Any], port: int) -> bool:
    """From anywhere."""
    return any(
        "from" not in rule and {"port": port, "protocol": "TCP"} in rule["ports"] for rule in policy["spec"]["ingress"]
    )


@pytest.mark.parametrize("name", MONITORS)
def test_network_policies_let_prometheus_in(name: str) -> None:
    """It is in a namespace of the user's, which no policy of ours can know."""
    deployment = next(iter(yaml.safe_load_all((MANIFESTS / "base" / "operator.yaml").read_text())))
    slots = [Slot(0, Role.ENGINE), Slot(0, Role.STAGE, 1)]
    pods = [deployment["spec"]["template"], *(build_pod(obj(), slot) for slot in slots)]
    (pod,) = [each for each in pods if scrapes(MONITORS[name], each)]
    (endpoint,) = MONITORS[name]["podMetricsEndpoints"]
    (port,) = [
        each["containerPort"]
        for container in pod["spec"]["containers"]
        for each in container["ports"]
        if each["name"] == endpoint["port"]
    ]
    labels = pod["metadata"]["labels"].items()
    chosen = [each for each in POLICIES if each["spec"]["podSelector"]["matchLabels"].items() <= labels]

    assert chosen, "a pod of each kind has a policy"
    assert all(lets_in(policy, port) for policy in chosen)


def test_prometheus_can_read_what_the_tests_on_a_cluster_make_of_them(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    (tmp_path / "targets.json").write_text("[]")
    config = configuration(tmp_path / "targets.json", tmp_path / "rules.yaml", interval_seconds=2.0)
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))

    promtool(tmp_path, "check", "config", "prometheus.yaml")


def test_engines_and_stages_are_told_by_the_name_of_their_object() -> None:
    meta = "__meta_kubernetes_pod_label_" + NAME_LABEL.replace(".", "_").replace("/", "_")

    for name in ("resilientllm-engines", "resilientllm-stages"):
        (endpoint,) = MONITORS[name]["podMetricsEndpoints"]
        assert endpoint["relabelings"] == [{"sourceLabels": [meta], "targetLabel": "name"}]
