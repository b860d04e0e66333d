"""What is read out of the API server's JSON."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError
from resilientllm_operator.observe import (
    essence,
    node_essence,
    owner_of,
    view_node,
    view_object,
    view_pods,
    view_status,
)
from resilientllm_operator.pods import build_pod
from resilientllm_operator.world import Ailment, Exit, NodeView, Owner, PodView, Taint, Waiting

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
    assert view_pods([essence("Pod", {**manifest, "status": status})], UID) == (view,), "what is kept is all there is"
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


@pytest.mark.parametrize(
    ("began", "status", "turned", "loads"),
    [
        ("2026-11-20T12:00:05Z", "False", "2026-11-20T12:00:04Z", True),
        ("2026-11-20T12:00:05Z", "False", "2026-11-20T12:00:05Z", True),
        ("2026-11-20T12:00:05Z", "True", "2026-11-20T12:00:30Z", False),
        ("2026-11-20T12:00:05Z", "False", "2026-11-20T12:10:00Z", False),
        (None, "False", "2026-11-20T12:00:04Z", False),
    ],
    ids=["not ready yet", "in the same second", "ready", "was ready", "does not run"],
)
def test_a_pod_loads_until_it_was_ready_once(began: str | None, status: str, turned: str, loads: bool) -> None:
    container = with_container(state={"running": {"startedAt": began}} if began else {"waiting": {"reason": "Soon"}})
    ready = {"type": "Ready", "status": status, "lastTransitionTime": turned}
    assert observed({**container, "conditions": [ready]}).loads is loads


def test_a_terminating_pod_is_leaving() -> None:
    view = observed(RUNNING, deletionTimestamp="2026-11-21T12:00:00Z")
    assert view.leaving and not view.ended
    assert view.ends_by == datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


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


def test_the_kubelet_says_which_devices_are_not_well() -> None:
    gpus = [
        {"resourceID": "GPU-1", "health": "Healthy"},
        {"resourceID": "GPU-2", "health": "Unhealthy", "message": "ECC error count exceeded threshold"},
        {"resourceID": "GPU-3", "health": "Unknown"},
    ]
    statuses = [{"name": "nvidia.com/gpu", "resources": gpus}, {"name": "claim:nic"}]
    assert observed(with_container(allocatedResourcesStatus=statuses)).ailments == (
        Ailment("nvidia.com/gpu", "GPU-2", certain=True, message="ECC error count exceeded threshold"),
        Ailment("nvidia.com/gpu", "GPU-3", certain=False),
    )
    assert observed(RUNNING).ailments == ()


NODE: dict[str, Any] = {
    "metadata": {
        "name": "node-1",
        "resourceVersion": "7",
        "labels": {"topology.kubernetes.io/zone": "a"},
        "annotations": {"long": "text"},
    },
    "spec": {"podCIDR": "10.1.0.0/24"},
    "status": {
        "images": [{"names": ["example.invalid/large:1"]}],
        "conditions": [
            {
                "type": "Ready",
                "status": "True",
                "lastHeartbeatTime": "2026-11-21T12:00:00Z",
                "lastTransitionTime": "2026-11-20T12:00:00Z",
                "reason": "KubeletReady",
            }
        ],
    },
}


def changed(part: str, **changes: Any) -> NodeView:
    return view_node(node_essence({**NODE, part: {**NODE[part], **changes}}))


def test_a_node_that_is_well() -> None:
    view = view_node(node_essence(NODE))
    assert (view.name, view.ready, view.unschedulable, view.deleting, view.taints) == ("node-1", True, False, False, ())
    assert view.labels == {"topology.kubernetes.io/zone": "a"}
    assert view.conditions["Ready"].since == datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def test_a_heartbeat_changes_nothing() -> None:
    (ready,) = NODE["status"]["conditions"]
    beat = changed("status", conditions=[{**ready, "lastHeartbeatTime": "2026-11-21T13:00:00Z"}])
    assert beat == view_node(node_essence(NODE))


@pytest.mark.parametrize(("status", "ready"), [("True", True), ("False", False), ("Unknown", None)])
def test_a_node_is_ready_or_not_or_unknown(status: str, ready: bool | None) -> None:
    assert changed("status", conditions=[{"type": "Ready", "status": status}]).ready is ready


def test_a_node_that_never_said_anything_is_unknown() -> None:
    assert changed("status", conditions=[]).ready is None


def test_what_keeps_pods_off_a_node() -> None:
    taint = {"key": "gpu", "value": "broken", "effect": "NoExecute", "timeAdded": "2026-11-21T12:00:00Z"}
    view = changed("spec", unschedulable=True, taints=[taint])
    assert view.unschedulable and view.taints == (Taint("gpu", "NoExecute", "broken"),)
    assert str(view.taints[0]) == "gpu=broken:NoExecute"
    assert changed("metadata", deletionTimestamp="2026-11-21T12:00:00Z").deleting


def test_only_what_is_looked_at_of_a_node_is_kept() -> None:
    kept = node_essence(NODE)
    assert "images" not in kept["status"] and "annotations" not in kept["metadata"]
    assert kept["metadata"]["resourceVersion"] == "7"


def test_ipv4_is_chosen_of_two_families() -> None:
    assert observed({**RUNNING, "podIPs": [{"ip": "fd00::1"}, {"ip": "10.1.2.3"}]}).ip == "10.1.2.3"


def test_who_wrote_which_field_is_not_kept() -> None:
    metadata = {"namespace": "n", "name": "a", "resourceVersion": "5"}
    written = {"metadata": metadata | {"managedFields": [{"manager": "somebody"}]}, "spec": {"ports": []}}
    assert essence("Service", written) == {"metadata": metadata, "spec": {"ports": []}}


def test_pods_of_an_earlier_object_of_the_same_name_are_not_ours() -> None:
    manifest = build_pod(obj(uid="earlier"), stage(0, 1))
    manifest["metadata"] |= {"uid": "pod-uid", "creationTimestamp": "2026-11-21T11:00:00Z"}
    assert view_pods([manifest], UID) == ()
    assert view_pods([essence("Pod", manifest)], UID) == ()


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
