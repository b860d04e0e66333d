"""Names and addresses of a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.cluster.errors import ClusterError
from e2e.cluster.layout import MAX_NODES, NODE_NETWORK, POD_NETWORK, Layout, node_names, prefix_of


def layout(name: str = "one", folder: Path = Path("/var/tmp/one"), nodes: int = 3) -> Layout:
    return Layout(
        name=name,
        folder=folder,
        binaries=Path("/cache/build"),
        mounts=(Path("/usr"),),
        node_names=node_names(nodes),
        host_port=40001,
    )


def test_layout_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = layout(folder=tmp_path)
    saved.save()

    assert Layout.load(tmp_path) == saved


def test_missing_cluster_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"e2e\.cluster up"):
        Layout.load(tmp_path)


def test_no_two_nodes_share_an_address_or_a_pod_network() -> None:
    nodes = layout(nodes=MAX_NODES).nodes

    assert len({node.address for node in nodes}) == MAX_NODES
    assert len({node.pod_network for node in nodes}) == MAX_NODES
    assert all(node.address in NODE_NETWORK for node in nodes)
    assert all(node.pod_network.subnet_of(POD_NETWORK) for node in nodes)


def test_interface_names_fit_into_the_kernels_fifteen_characters() -> None:
    assert all(len(node.fabric_link) <= 15 for node in layout(nodes=MAX_NODES).nodes)


@pytest.mark.parametrize("other", ["one-two", "on", "one2"])
def test_namespaces_of_one_cluster_are_never_taken_for_anothers(other: str) -> None:
    """`down` finds what is a cluster's by the prefix and a dot."""
    mine, theirs = layout("one"), layout(other)

    for namespace in (theirs.fabric, theirs.netns("node-1")):
        assert not namespace.startswith(f"{prefix_of(mine.name)}.")


@pytest.mark.parametrize("name", ["", "Upper", "a.b", "-a", "a-", "a" * 25, "a/b"])
def test_names_that_could_not_be_told_apart_are_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="cluster name"):
        layout(name)


@pytest.mark.parametrize("hidden", ["/run/x", "/var/log/x", "/var/lib/kubelet"])
def test_folder_that_nodes_would_not_see_is_refused(hidden: str) -> None:
    with pytest.raises(ClusterError, match="outside"):
        layout(folder=Path(hidden))


@pytest.mark.parametrize("nodes", [0, MAX_NODES + 1])
def test_impossible_numbers_of_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(ClusterError, match="nodes"):
        layout(nodes=nodes)


def test_unknown_node_is_an_error_that_names_the_known() -> None:
    with pytest.raises(ClusterError, match="node-1, node-2, node-3"):
        layout().node("node-9")
