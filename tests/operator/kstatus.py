"""What tools like Flux, ``kpt`` and ``cli-utils`` make of an object that they know nothing of.

The rules of ``Compute`` in sigs.k8s.io/cli-utils/pkg/kstatus/status (``status.go``, ``generic.go``), in its order.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Kstatus(StrEnum):
    CURRENT = "Current"
    IN_PROGRESS = "InProgress"
    FAILED = "Failed"
    TERMINATING = "Terminating"


def kstatus(obj: Mapping[str, Any]) -> Kstatus:
    metadata, status = obj["metadata"], obj.get("status", {})
    if metadata.get("deletionTimestamp"):
        return Kstatus.TERMINATING
    if status.get("observedGeneration", metadata["generation"]) != metadata["generation"]:
        return Kstatus.IN_PROGRESS
    conditions = status.get("conditions", [])
    for each in conditions:  # The first that is found decides, so the two must not contradict each other.
        if each["type"] == "Reconciling" and each["status"] == "True":
            return Kstatus.IN_PROGRESS
        if each["type"] == "Stalled" and each["status"] == "True":
            return Kstatus.FAILED
    ready = next((each["status"] for each in conditions if each["type"] == "Ready"), "True")
    return Kstatus.CURRENT if ready == "True" else Kstatus.IN_PROGRESS
