"""What is read out of the API server's JSON."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from resilientllm_operator.observe import owner_of, view_object, view_pods, view_status
from resilientllm_operator.pods import build_pod
from resilientllm_operator.world import Exit, Owner, PodView, Waiting

from tests.operator.builders import UID, obj, stage

RUNNING = {
    "phase": "Running",
    "podIP": "10.1.2.3",
    "podIPs": [{"ip": "10.1.2.3"}],
    "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
    "containerStatuses": [{"restartCount": 2, "state": {"running": {}}, "lastState": {}}],
}


def observed(status: dict[str, Any], **metadata: Any) -> PodView:
    manifest = build_pod(obj(), stage(0, 1))
    manifest["metadata"] |= {"uid": "pod-uid", "creationTimestamp": "2026-11-21T11:00:00Z", **metadata}
    manifest["spec"]["nodeName"] = "node-1"
    (view,) = view_pods([{**manifest, "status": status}], UID)
    return view


def with_container(**container: Any) -> dict[str, Any]:
    return {**RUNNING, "containerStatuses": [{"restartCount": 1, **container}]}


def test_a_running_pod() -> None:
    view = observed(RUNNING)
    assert (view.slot, view.ip, view.node, view.ready, view.restarts) == (stage(0, 1), "10.1.2.3", "node-1", True, 2)
    assert not view.leaving and view.last_exit is None and view.waiting is None and view.unschedulable is None


def test_a_new_pod_has_nothing_yet() -> None:
    view = observed({})
    assert (view.ip, view.ready, view.leaving) == (None, False, False)


def test_a_terminating_pod_is_leaving() -> None:
    view = observed(RUNNING, deletionTimestamp="2026-11-21T12:00:00Z")
    assert view.leaving and not view.ended


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_an_ended_pod_is_still_to_be_deleted(phase: str) -> None:
    view = observed({"phase": phase})
    assert view.leaving and view.ended


def test_the_exit_is_the_latest_one() -> None:
    ended = {"terminated": {"exitCode": 2, "message": "no such folder"}}
    killed = {"terminated": {"exitCode": 137}}
    assert observed(with_container(state=ended, lastState=killed)).last_exit == Exit(2, "no such folder")
    assert observed(with_container(state={"running": {}}, lastState=killed)).last_exit == Exit(137, "")


def test_the_kubelet_says_why_it_waits() -> None:
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    assert observed(with_container(state=waiting)).waiting == Waiting("ErrImagePull", "not found")


def test_the_scheduler_says_why_not() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}
    assert observed({"conditions": [condition]}).unschedulable == "0/3 nodes"


def test_ipv4_is_chosen_of_two_families() -> None:
    assert observed({**RUNNING, "podIPs": [{"ip": "fd00::1"}, {"ip": "10.1.2.3"}]}).ip == "10.1.2.3"


def test_pods_of_an_earlier_object_of_the_same_name_are_not_ours() -> None:
    manifest = build_pod(obj(uid="earlier"), stage(0, 1))
    manifest["metadata"] |= {"uid": "pod-uid", "creationTimestamp": "2026-11-21T11:00:00Z"}
    assert view_pods([manifest], UID) == ()


def test_whose_an_object_is() -> None:
    assert owner_of(None, UID) is Owner.NOBODY
    assert owner_of(build_pod(obj(), stage(0, 0)), UID) is Owner.OURS
    assert owner_of({"metadata": {}}, UID) is Owner.FOREIGN


def test_a_status_that_cannot_be_read_is_a_status_lost() -> None:
    assert view_status({"status": {"conditions": "nonsense"}}).conditions == ()


def test_an_unreadable_spec_is_an_error() -> None:
    metadata = {"name": "tiny", "namespace": "default", "uid": UID, "generation": 1}
    with pytest.raises(ValidationError):
        view_object({"metadata": metadata, "spec": {"image": "x"}})
