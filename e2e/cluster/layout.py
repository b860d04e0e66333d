"""What a cluster is called, where its files lie and which addresses it uses: pure data.

Everything that a cluster makes carries its prefix, so that two clusters can live side by side and
`down` can find all of one from its folder alone. Addresses may repeat between clusters: they exist
only inside network namespaces of the cluster's own.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from .errors import ClusterError
from .timings import TUNED, Timings

DEFAULT_ROOT = Path("/var/tmp/resilientllm-e2e")

NODE_NETWORK = IPv4Network("10.200.0.0/24")
POD_NETWORK = IPv4Network("10.244.0.0/16")
SERVICE_NETWORK = IPv4Network("10.96.0.0/16")
API_ADDRESS = NODE_NETWORK[1]
API_PORT = 6443
API_SERVICE_ADDRESS = SERVICE_NETWORK[1]

MAX_NODES = 200
_FIRST_NODE_HOST = 11
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")

# A node hides these folders behind its own, so a cluster whose files lay below them would lose them.
_HIDDEN_IN_NODES = tuple(Path(p) for p in ("/run", "/proc", "/sys", "/var/log", "/var/lib/kubelet", "/var/lib/cni"))


@dataclass(frozen=True)
class NodePlan:
    """One node's name and the addresses that follow from its place in the list."""

    name: str
    ordinal: int

    @property
    def address(self) -> IPv4Address:
        return NODE_NETWORK[_FIRST_NODE_HOST + self.ordinal]

    @property
    def pod_network(self) -> IPv4Network:
        return IPv4Network((int(POD_NETWORK[0]) + 256 * (_FIRST_NODE_HOST + self.ordinal), 24))

    @property
    def fabric_link(self) -> str:
        """Name of the fabric's end of the cable to this node."""
        return f"to-node-{self.ordinal}"


@dataclass(frozen=True)
class Layout:
    """A cluster's constant facts. It is written to the folder before anything else is made."""

    name: str
    folder: Path
    binaries: Path
    mounts: tuple[Path, ...]
    node_names: tuple[str, ...]
    host_port: int
    """Port of the host's loopback where the API server answers."""
    timings: Timings = TUNED

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ClusterError(
                expected="a cluster name of at most 24 lower-case letters, digits and dashes",
                found=repr(self.name),
                remedy="choose another name",
            )
        if not 1 <= len(self.node_names) <= MAX_NODES:
            raise ClusterError(
                expected=f"1 to {MAX_NODES} nodes", found=str(len(self.node_names)), remedy="ask for fewer or more"
            )
        for hidden in _HIDDEN_IN_NODES:
            if self.folder.is_relative_to(hidden):
                raise ClusterError(
                    expected=f"a cluster folder outside {hidden}, which every node replaces by its own",
                    found=str(self.folder),
                    remedy=f"choose another, for example below {DEFAULT_ROOT}",
                )

    @property
    def prefix(self) -> str:
        return prefix_of(self.name)

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        return tuple(NodePlan(name, ordinal) for ordinal, name in enumerate(self.node_names))

    def node(self, name: str) -> NodePlan:
        for node in self.nodes:
            if node.name == name:
                return node
        raise ClusterError(
            expected="one of the nodes " + ", ".join(self.node_names), found=repr(name), remedy="name an existing node"
        )

    @property
    def fabric(self) -> str:
        """Network namespace of the switch, where the control plane and the clients live too."""
        return f"{self.prefix}.fabric"

    def netns(self, node: str) -> str:
        return f"{self.prefix}.{node}"

    @property
    def pki(self) -> Path:
        return self.folder / "pki"

    @property
    def images(self) -> Path:
        """Image archives that every node imports when it starts."""
        return self.folder / "images"

    @property
    def base_spec(self) -> Path:
        return self.folder / "base-runtime-spec.json"

    @property
    def control_plane(self) -> Path:
        return self.folder / "control-plane"

    def node_folder(self, node: str) -> Path:
        return self.folder / "nodes" / node

    def kubeconfig(self, user: str) -> Path:
        return self.folder / "kubeconfigs" / user

    @property
    def host_kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def save(self) -> None:
        facts = asdict(self) | {
            "folder": str(self.folder),
            "binaries": str(self.binaries),
            "mounts": [str(mount) for mount in self.mounts],
        }
        _file_in(self.folder).write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Layout:
        file = _file_in(folder)
        if not file.exists():
            raise ClusterError(
                expected=f"a cluster in {folder}",
                found="no such cluster",
                remedy="bring it up first: python -m e2e.cluster up",
            )
        facts = json.loads(file.read_text())
        return cls(
            name=facts["name"],
            folder=folder,
            binaries=Path(facts["binaries"]),
            mounts=tuple(Path(mount) for mount in facts["mounts"]),
            node_names=tuple(facts["node_names"]),
            host_port=facts["host_port"],
            timings=Timings(**facts["timings"]),
        )


def prefix_of(name: str) -> str:
    # A name has no dot, so a dot after the prefix tells the parts of "x" from those of "x-y".
    return f"rllm-{name}"


def node_names(count: int) -> tuple[str, ...]:
    return tuple(f"node-{number}" for number in range(1, count + 1))


def _file_in(folder: Path) -> Path:
    return folder / "cluster.json"
