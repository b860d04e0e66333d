"""What kind is told, and how a daemon without all rights is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.kind import cluster_config, own_pod_network
from e2e.cluster.runc import lacking, option, without
from e2e.cluster.timings import Timings

SYS_RESOURCE = 1 << 24


def patch(config: dict[str, Any], kind: str) -> dict[str, Any]:
    patches = [json.loads(text) for text in config["kubeadmConfigPatches"]]
    found: dict[str, Any] = next(one for one in patches if one["kind"] == kind)
    return found


def test_one_control_plane_comes_before_the_workers() -> None:
    roles = [node["role"] for node in cluster_config(2, [])["nodes"]]

    assert roles == ["control-plane", "worker", "worker"]


def test_machines_files_never_lie_over_the_nodes_own() -> None:
    config = cluster_config(1, [Path("/usr"), Path("/checkout")])

    for node in config["nodes"]:
        assert [mount["hostPath"] for mount in node["extraMounts"]] == ["/usr", "/checkout"]
        assert all(mount["containerPath"].startswith("/machine/") for mount in node["extraMounts"])
        assert all(mount["readOnly"] for mount in node["extraMounts"])


def test_timings_reach_all_three_parts_that_must_agree() -> None:
    config = cluster_config(1, [], timings=Timings(node_lease_seconds=8, node_grace_seconds=12, toleration_seconds=5))

    control_plane = patch(config, "ClusterConfiguration")
    arguments = {one["name"]: one["value"] for one in control_plane["controllerManager"]["extraArgs"]}
    tolerations = {one["value"] for one in control_plane["apiServer"]["extraArgs"]}
    assert patch(config, "KubeletConfiguration")["nodeLeaseDurationSeconds"] == 8
    assert arguments["node-monitor-grace-period"] == "12s"
    assert tolerations == {"5"}


def test_ordinary_docker_keeps_kinds_own_network() -> None:
    config = cluster_config(1, [])

    assert "disableDefaultCNI" not in config["networking"]
    assert "containerdConfigPatches" not in config


def test_each_node_gets_its_own_network_where_there_is_no_daemon_for_it() -> None:
    networks = [Path("/cni/0"), Path("/cni/1")]

    config = cluster_config(1, [], networks)

    assert config["networking"]["disableDefaultCNI"] is True
    assert [node["extraMounts"][0]["hostPath"] for node in config["nodes"]] == ["/cni/0", "/cni/1"]
    assert own_pod_network(0) != own_pod_network(1)


def test_lacking_capability_is_taken_out_of_every_set() -> None:
    process = {
        "args": ["sh"],
        "capabilities": {"bounding": ["CAP_SYS_RESOURCE", "CAP_KILL"], "effective": ["CAP_SYS_RESOURCE"]},
    }

    changed = without(process, {"CAP_SYS_RESOURCE"})

    assert changed == {"args": ["sh"], "capabilities": {"bounding": ["CAP_KILL"], "effective": []}}


def test_process_without_capabilities_stays_as_it_is() -> None:
    assert without({"args": ["sh"]}, {"CAP_SYS_RESOURCE"}) == {"args": ["sh"]}


def test_only_what_root_really_lacks_is_lacking() -> None:
    assert lacking(SYS_RESOURCE) == set()
    assert lacking(~SYS_RESOURCE) == {"CAP_SYS_RESOURCE"}


@pytest.mark.parametrize("arguments", [["create", "--bundle", "/b", "id"], ["create", "--bundle=/b", "id"]])
def test_option_is_found_in_both_ways_to_write_it(arguments: list[str]) -> None:
    assert option(arguments, "--bundle", "-b") == "/b"
    assert option(arguments, "--process", "-p") is None
