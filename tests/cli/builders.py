"""Objects as the operator leaves them, for what the command line makes of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from resilientllm_api.crd import ResilientLLM

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def place(instance: int, number: int, **changes: Any) -> dict[str, Any]:
    """A stage on a node of its own, whose copies the next instance keeps."""
    return {
        "stage": number,
        "pod": f"tiny-{instance}-s{number}-abc",
        "node": f"node-{instance}-{number}",
        "ready": True,
        "servedBy": f"{instance}.{number}",
        "pair": f"{(instance + 1) % 2}.{number}",
        "keptBy": f"{(instance + 1) % 2}.{number}",
        "lagSeconds": 0,
    } | changes


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, Any]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "observedGeneration": 1,
        "lastTransitionTime": NOW.isoformat(),
    }


WELL = (
    condition("Ready", "True", "AllInstancesServing", "Every instance serves."),
    condition("Degraded", "False", "AsSpecified", "Nothing that served is lost."),
    condition("Progressing", "False", "AsSpecified", "All pods run as the spec says."),
    condition("ReplicationHealthy", "True", "Replicating", "The copies keep up."),
)


def instance(number: int, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "instance": number,
        "phase": "Serving",
        "engine": f"tiny-{number}-engine-abc",
        "node": f"node-{number}",
        "serving": True,
        "planVersion": 4,
        "stages": list(stages or (place(number, 0), place(number, 1))),
    } | changes


def tiny(*instances: dict[str, Any], topology_key: str = "kubernetes.io/hostname", **status: Any) -> ResilientLLM:
    """Two instances of two stages, and all is well, unless a test says otherwise."""
    shown = instances or (instance(0), instance(1))
    return ResilientLLM.model_validate(
        {
            "metadata": {"name": "tiny", "namespace": "default", "generation": 1},
            "spec": {
                "image": "worker",
                "model": {"path": "/models/tiny"},
                "instances": 2,
                "stages": 2,
                "replication": {"topologyKey": topology_key},
            },
            "status": {
                "observedGeneration": 1,
                "ready": "2/2",
                "endpoint": "http://tiny.default.svc/v1",
                "conditions": WELL,
                "instances": shown,
                "plan": {"version": 4, "hash": "abc"},
            }
            | status,
        }
    )


BORROWED = tiny(
    instance(0),
    instance(1, place(1, 0), place(1, 1, servedBy="0.1", keptBy=None, lagSeconds=None, ready=False), phase="Degraded"),
)
