"""Tools that know nothing of us see by the rules of kstatus whether to wait."""

from __future__ import annotations

import pytest

from tests.operator.kstatus import Kstatus, kstatus
from tests.operator.recorded import objects

EXPECTED = {
    "not-seen-yet": Kstatus.IN_PROGRESS,
    "starting": Kstatus.IN_PROGRESS,
    "no-node-takes-it": Kstatus.FAILED,
    "healthy": Kstatus.CURRENT,
    "donor-stands-in": Kstatus.IN_PROGRESS,
    "nothing-can-replace-a-stage": Kstatus.FAILED,
    "one-instance-waits": Kstatus.IN_PROGRESS,
    "all-engines-lost": Kstatus.IN_PROGRESS,
    "grown": Kstatus.IN_PROGRESS,
    "grown-beyond-the-nodes": Kstatus.FAILED,
    "rolling-out": Kstatus.IN_PROGRESS,
    "roll-out-stopped": Kstatus.FAILED,
    "paused": Kstatus.CURRENT,
    "paused-roll-out": Kstatus.IN_PROGRESS,
    "observing": Kstatus.FAILED,
    "spec-changed": Kstatus.IN_PROGRESS,
    "spec-unreadable": Kstatus.FAILED,
}
OBJECTS = dict(objects())


@pytest.mark.parametrize("name", OBJECTS)
def test_says_whether_waiting_helps(name: str) -> None:
    assert kstatus(OBJECTS[name]) is EXPECTED[name]


@pytest.mark.parametrize("name", OBJECTS)
def test_every_condition_has_what_the_kubernetes_api_asks_of_one(name: str) -> None:
    status = OBJECTS[name]["status"]
    kinds = [each["type"] for each in status.get("conditions", [])]

    assert len(set(kinds)) == len(kinds)
    for each in status.get("conditions", []):
        assert each["status"] in ("True", "False", "Unknown")
        assert each["reason"].isalnum() and each["message"] and each["lastTransitionTime"]
        assert each["observedGeneration"] <= status["observedGeneration"]


def test_an_object_is_not_complete_before_the_operator_has_seen_it() -> None:
    """Without the default of the CRD it would have no status at all, which kstatus takes for complete."""
    unseen = OBJECTS["not-seen-yet"]

    assert kstatus(unseen) is Kstatus.IN_PROGRESS
    assert kstatus({**unseen, "status": {}}) is Kstatus.CURRENT


def test_deletion_comes_before_all_else() -> None:
    healthy = OBJECTS["healthy"]
    leaving = {**healthy, "metadata": {**healthy["metadata"], "deletionTimestamp": "2026-11-21T12:00:00Z"}}

    assert kstatus(leaving) is Kstatus.TERMINATING
