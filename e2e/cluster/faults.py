"""Faults of a namespace cluster's nodes: what fails, fails as it would in a data centre."""

from __future__ import annotations

from pathlib import Path

from . import cgroups, network
from .errors import ClusterError
from .layout import Layout, NodePlan
from .supervisor import hold_folder


def group_of(layout: Layout, node: str) -> str:
    return f"{layout.prefix}/{node}"


def is_alive(layout: Layout, node: str) -> bool:
    return cgroups.namespace_init(group_of(layout, node)) is not None


def cut_power(layout: Layout, node: NodePlan) -> None:
    """The cable goes first: a kernel that ends a process says so to its peers, and a dead node cannot."""
    if not is_alive(layout, node.name):
        raise ClusterError(expected=f"{node.name} to run", found="it does not", remedy="start it first")
    network.disconnect(layout, node)
    cgroups.kill(group_of(layout, node.name))
    network.remove_node(layout, node)
    cgroups.remove(group_of(layout, node.name))


def cut_network(layout: Layout, node: NodePlan) -> None:
    if not is_alive(layout, node.name):
        raise ClusterError(expected=f"{node.name} to run", found="it does not", remedy="start it first")
    network.disconnect(layout, node)


def join_network(layout: Layout, node: NodePlan) -> None:
    network.connect(layout, node)


def hold_service(layout: Layout, machine: str, service: str) -> None:
    """End a service of a node, or of ``control-plane``, with SIGKILL, and keep it down until released."""
    (hold_folder(folder_of(layout, machine)) / service).touch()


def release_service(layout: Layout, machine: str, service: str) -> None:
    (hold_folder(folder_of(layout, machine)) / service).unlink(missing_ok=True)


def folder_of(layout: Layout, machine: str) -> Path:
    """Where a node, or ``control-plane``, keeps its files."""
    return layout.control_plane if machine == cgroups.CONTROL_PLANE else layout.node_folder(layout.node(machine).name)
