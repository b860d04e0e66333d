"""The cluster's network: one switch and a cable to each node, all in namespaces of the cluster's own.

Nothing of it exists in the machine's own network namespace: no address, no route, no rule.
"""

from __future__ import annotations

from pathlib import Path

from .commands import run
from .errors import ClusterError
from .layout import API_ADDRESS, NODE_NETWORK, SERVICE_NETWORK, Layout, NodePlan

_SWITCH = "switch"
_NODE_LINK = "eth0"
_NETNS_FOLDER = Path("/run/netns")


def make_fabric(layout: Layout) -> None:
    """The switch, with the control plane's address on it."""
    fabric = layout.fabric
    make_netns(fabric)
    _ip(fabric, "link", "add", _SWITCH, "type", "bridge")
    _ip(fabric, "address", "add", f"{API_ADDRESS}/{NODE_NETWORK.prefixlen}", "dev", _SWITCH)
    _ip(fabric, "link", "set", _SWITCH, "up")
    # A Service's address is rewritten only after a route for it was found; any will do.
    _ip(fabric, "route", "add", str(SERVICE_NETWORK), "dev", _SWITCH)
    for node in layout.nodes:
        # The route outlives the node's cable, as an entry of a real router would.
        _ip(fabric, "route", "add", str(node.pod_network), "via", str(node.address))
    # Frames between nodes are switched; the rules of the clients' kube-proxy must not touch them.
    _sysctl(fabric, "net.bridge.bridge-nf-call-iptables", "0")


def make_node(layout: Layout, node: NodePlan) -> None:
    """A node's network namespace, its cable to the switch, and its routes to the other nodes' pods."""
    netns = layout.netns(node.name)
    make_netns(netns)
    cable = ("type", "veth", "peer", "name", _NODE_LINK, "netns", netns)
    run("ip", "link", "add", node.fabric_link, "netns", layout.fabric, *cable)
    _ip(netns, "address", "add", f"{node.address}/{NODE_NETWORK.prefixlen}", "dev", _NODE_LINK)
    _ip(netns, "link", "set", _NODE_LINK, "up")
    _ip(netns, "route", "add", "default", "via", str(API_ADDRESS))
    for other in layout.nodes:
        if other != node:
            _ip(netns, "route", "add", str(other.pod_network), "via", str(other.address))
    _sysctl(netns, "net.bridge.bridge-nf-call-iptables", "1")
    connect(layout, node)
    _ip(layout.fabric, "link", "set", node.fabric_link, "up")


def connect(layout: Layout, node: NodePlan) -> None:
    _ip(layout.fabric, "link", "set", node.fabric_link, "master", _SWITCH)


def disconnect(layout: Layout, node: NodePlan) -> None:
    """Take a node's cable out of the switch. The node sees no change of its link, only silence."""
    _ip(layout.fabric, "link", "set", node.fabric_link, "nomaster")


def remove_node(layout: Layout, node: NodePlan) -> None:
    """Remove a dead node's cable and namespace.

    The cable is removed by name: connections that the node could not close keep the namespace itself,
    nameless, in the kernel for minutes, and the cable would stay with it.
    """
    _ip(layout.fabric, "link", "delete", node.fabric_link)
    remove_netns(layout.netns(node.name))


def remove_netns(name: str) -> None:
    """Remove a network namespace with its interfaces; no error when there is none."""
    if (_NETNS_FOLDER / name).exists():
        run("ip", "netns", "delete", name)


def namespaces(prefix: str) -> list[str]:
    """Names of the network namespaces that belong to the cluster with this prefix."""
    if not _NETNS_FOLDER.exists():
        return []
    return sorted(entry.name for entry in _NETNS_FOLDER.iterdir() if entry.name.startswith(f"{prefix}."))


def netns_file(name: str) -> Path:
    """The file that stands for a network namespace, for ``nsenter``."""
    return _NETNS_FOLDER / name


def make_netns(name: str) -> None:
    """Make a network namespace that has its own loopback and may route."""
    run("ip", "netns", "add", name)
    _ip(name, "link", "set", "lo", "up")
    _sysctl(name, "net.ipv4.ip_forward", "1")


def _ip(netns: str, *arguments: str) -> None:
    run("ip", "-netns", netns, *arguments)


def _sysctl(netns: str, key: str, value: str) -> None:
    inside = ("nsenter", f"--net={_NETNS_FOLDER / netns}")
    try:
        run(*inside, "sysctl", "-qw", f"{key}={value}")
    except ClusterError as error:
        raise ClusterError(
            expected=f"the kernel setting {key} in a network namespace",
            found=error.found,
            remedy="load the kernel module that brings it (modprobe br_netfilter)",
        ) from error
