"""What the Prometheus operator makes of our PodMonitors: the configuration of a Prometheus that has none beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).parents[2] / "manifests"
_CAMEL = re.compile(r"(?<=[a-z])[A-Z]")


def pod_monitors() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / "components" / "prometheus" / "podmonitors.yaml").read_text()))


def rules() -> dict[str, Any]:
    """Groups of recording rules and alerts, as Prometheus reads them."""
    rule = yaml.safe_load((MANIFESTS / "components" / "prometheus" / "rules.yaml").read_text())
    groups: dict[str, Any] = rule["spec"]
    return groups


def configuration(targets_file: Path, rules_file: Path, interval_seconds: float) -> dict[str, Any]:
    """``interval_seconds`` between scrapes, in place of what the PodMonitors say."""
    return {
        "global": {"scrape_interval": f"{interval_seconds:g}s", "evaluation_interval": f"{interval_seconds:g}s"},
        "rule_files": [str(rules_file)],
        "scrape_configs": [scrape_config(each, targets_file) for each in pod_monitors()],
    }


def discovered(pods: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What Prometheus' own discovery says of pods, which Debian's build of it has not: a target for each port of a pod
    that has an address. Which of them are scraped, Prometheus decides, by its configuration."""
    return [
        {
            "targets": [f"{pod['status']['podIP']}:{port['containerPort']}"],
            "labels": {
                "__meta_kubernetes_namespace": pod["metadata"]["namespace"],
                "__meta_kubernetes_pod_name": pod["metadata"]["name"],
                "__meta_kubernetes_pod_phase": pod["status"]["phase"],
                "__meta_kubernetes_pod_container_name": container["name"],
                "__meta_kubernetes_pod_container_port_name": port.get("name", ""),
                **{_label(name): value for name, value in pod["metadata"].get("labels", {}).items()},
            },
        }
        for pod in pods
        if pod["status"].get("podIP")
        for container in pod["spec"]["containers"]
        for port in container.get("ports", [])
    ]


def scrape_config(monitor: Mapping[str, Any], targets_file: Path) -> dict[str, Any]:
    """As the Prometheus operator translates one, if it has one endpoint and chooses pods by labels that must match."""
    spec, namespace, name = monitor["spec"], monitor["metadata"]["namespace"], monitor["metadata"]["name"]
    (endpoint,) = spec["podMetricsEndpoints"]
    everywhere = spec.get("namespaceSelector", {}).get("any", False)
    return {
        "job_name": f"podMonitor/{namespace}/{name}/0",
        "honor_labels": endpoint.get("honorLabels", False),
        "metrics_path": endpoint["path"],
        "file_sd_configs": [{"files": [str(targets_file)]}],
        "relabel_configs": [
            *([] if everywhere else [_keep("__meta_kubernetes_namespace", namespace)]),
            *(_keep(_label(label), value) for label, value in spec["selector"]["matchLabels"].items()),
            {**_keep("__meta_kubernetes_pod_phase", "(Failed|Succeeded)"), "action": "drop"},
            _keep("__meta_kubernetes_pod_container_port_name", endpoint["port"]),
            {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
            {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
            {"source_labels": ["__meta_kubernetes_pod_container_name"], "target_label": "container"},
            {"target_label": "job", "replacement": f"{namespace}/{name}"},
            {"target_label": "endpoint", "replacement": endpoint["port"]},
            *(
                {_CAMEL.sub(lambda found: f"_{found[0].lower()}", field): value for field, value in each.items()}
                for each in endpoint.get("relabelings", [])
            ),
        ],
    }


def _label(name: str) -> str:
    return f"__meta_kubernetes_pod_label_{re.sub('[^A-Za-z0-9_]', '_', name)}"


def _keep(label: str, value: str) -> dict[str, Any]:
    return {"source_labels": [label], "regex": value, "action": "keep"}
