"""PodDisruptionBudgets: how much of an object ``kubectl drain`` and its like may take at a time. Pure.

One copy of each stage, and one engine: its work has moved elsewhere, and the pod that follows it is ready, before the
eviction API lets the next one go. A single instance has no other copy to wait for, and a node must still be drainable.

Only a number of pods that must stay can be said: pods that belong to a custom resource have no scale to be counted by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resilientllm_operator.actions import Manifest
from resilientllm_operator.names import NAME_LABEL, ROLE_LABEL, STAGE_LABEL, Role, budget_name, common_labels
from resilientllm_operator.pods import owner_references
from resilientllm_operator.world import ObjectView


def build_budgets(obj: ObjectView) -> list[Manifest]:
    stages = [{ROLE_LABEL: str(Role.STAGE), STAGE_LABEL: str(stage)} for stage in range(obj.spec.stages)]
    names = [budget_name(obj.name, None), *(budget_name(obj.name, stage) for stage in range(obj.spec.stages))]
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": name,
                "namespace": obj.namespace,
                "labels": common_labels(obj.name),
                "ownerReferences": owner_references(obj.name, obj.uid),
            },
            "spec": {
                "minAvailable": obj.spec.instances - 1,
                "selector": {"matchLabels": {NAME_LABEL: obj.name} | labels},
                # What is not ready serves nobody: it must not be in the way of a drain.
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
            },
        }
        for name, labels in zip(names, [{ROLE_LABEL: str(Role.ENGINE)}, *stages], strict=True)
    ]


def budget_essence(manifest: Mapping[str, Any]) -> Manifest:
    """What of a PodDisruptionBudget is ours to say."""
    return {key: manifest["spec"].get(key) for key in ("minAvailable", "selector", "unhealthyPodEvictionPolicy")}
