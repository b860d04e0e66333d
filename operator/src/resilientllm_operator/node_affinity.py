"""Keeping a pod off nodes, by name. Pure.

Not a part of what a pod is made from (:func:`pods.spec_hash`): a node that gets into trouble must not roll out
anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from resilientllm_operator.actions import Manifest

MOST = 100
"""More names than that would make the pod's manifest the trouble."""
_RULE = "requiredDuringSchedulingIgnoredDuringExecution"
_FIELD = "metadata.name"


def keep_off(pod: Manifest, nodes: Collection[str]) -> Manifest:
    """The pod, not to be placed on any of these nodes."""
    if not nodes:
        return pod
    # The API server takes one name in each requirement on a field; requirements of one term are joined by "and".
    fields = [{"key": _FIELD, "operator": "NotIn", "values": [node]} for node in sorted(nodes)[:MOST]]
    rule = {_RULE: {"nodeSelectorTerms": [{"matchFields": fields}]}}
    affinity = {**pod["spec"].get("affinity", {}), "nodeAffinity": rule}
    return {**pod, "spec": {**pod["spec"], "affinity": affinity}}


def nodes_kept_off(spec: Mapping[str, Any]) -> frozenset[str]:
    """The nodes that a pod of this spec was made to avoid."""
    rule = spec.get("affinity", {}).get("nodeAffinity", {}).get(_RULE, {})
    return frozenset(
        value
        for term in rule.get("nodeSelectorTerms", ())
        for requirement in term.get("matchFields", ())
        if requirement["key"] == _FIELD and requirement["operator"] == "NotIn"
        for value in requirement.get("values", ())
    )
