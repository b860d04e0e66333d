"""Objects as Helm and Kustomize render them, in a form that can be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster.build import binaries, helm
from e2e.cluster.commands import run

MANIFESTS = Path(__file__).parents[2] / "manifests"
CHART = MANIFESTS / "helm" / "resilientllm"
SYSTEM = "resilientllm-system"

Objects = dict[tuple[str, str, str], Any]
"""By kind, namespace (empty for those that have none) and name."""


def kustomized(folder: Path) -> Objects:
    return _by_name(run(binaries() / "kubectl", "kustomize", folder))


def base_with(folder: Path, *components: str, resources: Sequence[Mapping[str, Any]] = ()) -> Objects:
    """``manifests/base`` with components and ``resources``, by an overlay that is written into ``folder``."""
    (folder / "resources.yaml").write_text(yaml.safe_dump_all(resources))
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [
            os.path.relpath(MANIFESTS / "base", folder.resolve()),
            *(["resources.yaml"] if resources else []),
        ],
        "components": [os.path.relpath(MANIFESTS / "components" / each, folder.resolve()) for each in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    return kustomized(folder)


def charted(values: Mapping[str, Any], *more: str, namespace: str = SYSTEM) -> Objects:
    return _by_name(template(values, *more, namespace=namespace))


def template(values: Mapping[str, Any], *more: str, namespace: str = SYSTEM) -> str:
    """What ``helm template`` prints. Raises ClusterError with Helm's words when it refuses."""
    arguments: Sequence[str] = [f"--set-json={name}={json.dumps(value)}" for name, value in values.items()]
    return run(helm(), "template", "any-release", CHART, f"--namespace={namespace}", *arguments, *more)


def _by_name(text: str) -> Objects:
    found: Objects = {}
    for each in yaml.safe_load_all(text):
        if each is None:
            continue
        metadata = each["metadata"]
        key = (each["kind"], metadata.get("namespace", ""), metadata["name"])
        assert key not in found, f"{key} is there twice"
        found[key] = each
    return found
