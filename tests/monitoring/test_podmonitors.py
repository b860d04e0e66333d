"""What is scraped is what the pods have: their labels and the names of their ports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from resilientllm_operator.names import NAME_LABEL, Role, Slot
from resilientllm_operator.pods import build_pod

from tests.operator.builders import obj

MANIFESTS = Path(__file__).parents[2] / "manifests"
MONITORS = {
    each["metadata"]["name"]: each["spec"]
    for each in yaml.safe_load_all((MANIFESTS / "components" / "prometheus" / "podmonitors.yaml").read_text())
}


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


def test_engines_and_stages_are_told_by_the_name_of_their_object() -> None:
    meta = "__meta_kubernetes_pod_label_" + NAME_LABEL.replace(".", "_").replace("/", "_")

    for name in ("resilientllm-engines", "resilientllm-stages"):
        (endpoint,) = MONITORS[name]["podMetricsEndpoints"]
        assert endpoint["relabelings"] == [{"sourceLabels": [meta], "targetLabel": "name"}]
