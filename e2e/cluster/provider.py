"""What a test may ask of a cluster, whatever it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from .timings import TUNED, Timings


class HostPort(NamedTuple):
    """Where on this machine something in the cluster can be reached."""

    host: str
    port: int


class Cluster(Protocol):
    """A running Kubernetes with several nodes, and the ways to hurt it."""

    @property
    def name(self) -> str: ...

    @property
    def kubeconfig(self) -> Path:
        """An administrator's kubeconfig whose server is a port of this machine's loopback."""

    @property
    def mounts(self) -> tuple[Path, ...]:
        """Paths of this machine that every container sees, read-only."""

    def node_path(self, path: Path) -> Path:
        """Where the nodes see one of ``mounts``, or what lies below it: for volumes of type hostPath."""

    def kubectl_command(self, *arguments: str) -> list[str]:
        """The full command line of a kubectl for this cluster."""

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        """Output of kubectl; raises :class:`CommandFailed` with what it said."""

    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that pods can run on, dead ones included."""

    def load_image(self, archive: Path) -> None:
        """Put an image archive, as ``docker save`` writes it, on every living node and on later ones."""

    def load_thin_image(self, ref: str, *, entrypoint: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Write an image that runs this machine's own files, and load it."""

    def forward(self, address: str, port: int) -> HostPort:
        """A port of the loopback that leads to an address of the cluster: a pod's, a node's or a Service's."""

    def container_pids(self, namespace: str, pod: str, container: str) -> list[int]:
        """This machine's pids of a running container's processes, its main process first."""

    def kill_node(self, node: str) -> None:
        """Cut a node's power: no process ends in an orderly way, and no packet says so."""

    def start_node(self, node: str) -> None:
        """Switch a killed node on again, with the disk that it had."""

    def partition_node(self, node: str) -> None:
        """Cut a node's network; everything on it goes on."""

    def heal_node(self, node: str) -> None:
        """Join a partitioned node again."""

    def down(self) -> None:
        """Remove the cluster with all that it made. Does nothing when there is none."""


class Provider(Protocol):
    """One way to make clusters on this machine."""

    def up(self, nodes: int = 3, *, mounts: Sequence[Path] = (), timings: Timings = TUNED) -> Cluster:
        """Make a cluster; returns when all nodes are Ready and pods can be created.

        ``mounts`` are paths of this machine that every container sees, read-only, at the same place.
        ``timings``: how fast a lost node is noticed.
        """

    def existing(self) -> Cluster:
        """The cluster that an earlier process brought up."""

    def down(self) -> None:
        """As :meth:`Cluster.down`, and also when `up` failed half-way."""
