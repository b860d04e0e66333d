"""The same clusters made by kind, on a machine that has Docker: what most people will have.

It differs from the namespace clusters in that nodes are containers with systemd and kubeadm inside.
The control plane is a node of its own here, and is not among :meth:`KindCluster.nodes`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from . import build, launch, pidfile
from .cgroups import namespace_pids
from .cni import bridge_network
from .commands import run, wait_until
from .errors import ClusterError
from .image import write_thin_image
from .layout import DEFAULT_ROOT, POD_NETWORK, prefix_of
from .machine_files import base_spec
from .namespaces import listen, running_container_id
from .provider import HostPort
from .timings import TUNED, Timings

_CREATE_TIMEOUT_SECONDS = 600.0
_READY_TIMEOUT_SECONDS = 180.0
_DOCKER_TIMEOUT_SECONDS = 180.0
"""Bounds a hang, not a speed: on a busy machine Docker may need a minute to end a container with systemd in it."""
_MACHINE_FILES = "/machine"
"""Where a node sees this machine's files: over its own /usr they would replace its systemd."""
_CRI_BASE_SPEC = "/etc/containerd/cri-base.json"
_FIRST_OWN_POD_NETWORK = 100


@dataclass(frozen=True)
class Docker:
    """A Docker daemon, and what is special about it. The default is the machine's ordinary one."""

    program: str = "docker"
    environment: Mapping[str, str] = field(default_factory=dict)
    node_image: str | None = None
    """None means the image that this version of kind was made for, pulled from its registry."""
    own_pod_network: bool = False
    """Whether nodes get a static bridge each, since the usual network daemon is not in the image."""
    group: str | None = None
    """Control group of a daemon of our own, whose view of pids is not this machine's."""
    netns: Path | None = None
    """Network namespace of a daemon of our own; its loopback is not this machine's."""

    def run(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = _DOCKER_TIMEOUT_SECONDS) -> str:
        command = [self.program, *arguments]
        return run(*command, stdin=stdin, env=self.full_environment(), timeout_seconds=timeout_seconds)

    def full_environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def pid(self, container: str) -> int:
        """This machine's pid of a container's first process."""
        theirs = int(self.run("inspect", "--format={{.State.Pid}}", container))
        if self.group is None:
            return theirs
        for pid in pids_with(f"/{self.group}/"):
            if namespace_pids(pid)[1:2] == [theirs]:
                return pid
        raise ClusterError(
            expected=f"a process of container {container}", found="none", remedy="see whether it runs: docker ps"
        )


class KindCluster:
    """A cluster made by kind. Its folder holds the kubeconfig, so that another process finds it."""

    def __init__(self, name: str, folder: Path, docker: Docker) -> None:
        self._name = name
        self._folder = folder
        self._docker = docker

    @property
    def name(self) -> str:
        return self._name

    @property
    def kubeconfig(self) -> Path:
        return self._folder / "kubeconfig"

    @property
    def mounts(self) -> tuple[Path, ...]:
        return tuple(Path(mount) for mount in json.loads((self._folder / "mounts.json").read_text()))

    def node_path(self, path: Path) -> Path:
        return Path(f"{_MACHINE_FILES}{path}")

    def kubectl_command(self, *arguments: str) -> list[str]:
        program = shutil.which("kubectl") or str(build.binaries() / "kubectl")
        return [
            program,
            f"--kubeconfig={self.kubeconfig}",
            f"--cache-dir={self._folder / 'kubectl-cache'}",
            *arguments,
        ]

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        return run(*self.kubectl_command(*arguments), stdin=stdin, timeout_seconds=timeout_seconds)

    def nodes(self) -> tuple[str, ...]:
        return tuple(sorted(node for node in self._containers() if not node.endswith("-control-plane")))

    def load_image(self, archive: Path) -> None:
        kind(self._docker, "load", "image-archive", str(archive), f"--name={self._kind_name}")

    def load_thin_image(self, ref: str, *, entrypoint: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        with tempfile.TemporaryDirectory() as folder:
            archive = Path(folder) / "image.tar"
            write_thin_image(archive, ref, entrypoint=entrypoint, env=env, mounts=self.mounts)
            self.load_image(archive)

    def forward(self, address: str, port: int) -> HostPort:
        _check_root("to enter a node's network")
        netns = Path(f"/proc/{self._docker.pid(self._control_plane)}/ns/net")
        return self._start_forwarder(0, netns, address, port)

    def container_pids(self, namespace: str, pod: str, container: str) -> list[int]:
        described = json.loads(self.kubectl("get", "pod", pod, f"--namespace={namespace}", "--output=json"))
        found = pids_with(running_container_id(described, container))
        if not found:
            raise ClusterError(
                expected=f"processes of container {container} of pod {namespace}/{pod}",
                found="none on this machine",
                remedy="use a Docker daemon that runs on this machine",
            )
        return sorted(found, key=lambda pid: namespace_pids(pid)[-1:])

    def kill_node(self, node: str) -> None:
        # The cable goes first, so that no packet tells the peers.
        self._in_node(node, "ip", "link", "set", "eth0", "down")
        self._docker.run("kill", node)

    def start_node(self, node: str) -> None:
        self._docker.run("start", node)
        if self._docker.own_pod_network:
            self._route_between_nodes()

    def partition_node(self, node: str) -> None:
        rules = "add table inet partition\n"
        for hook, direction in (("prerouting", "iifname"), ("postrouting", "oifname")):
            rules += f"add chain inet partition {hook} {{ type filter hook {hook} priority -300; }}\n"
            rules += f"add rule inet partition {hook} {direction} eth0 drop\n"
        self._in_node(node, "nft", "--file", "-", stdin=rules)

    def heal_node(self, node: str) -> None:
        self._in_node(node, "nft", "delete", "table", "inet", "partition")

    def down(self) -> None:
        pidfile.end_all(self._processes)
        launch.reap()
        kind(self._docker, "delete", "cluster", f"--name={self._kind_name}", f"--kubeconfig={self.kubeconfig}")
        if self._folder.exists():
            shutil.rmtree(self._folder)
        if self._folder.parent == DEFAULT_ROOT and DEFAULT_ROOT.exists() and not any(DEFAULT_ROOT.iterdir()):
            DEFAULT_ROOT.rmdir()

    def create(self, nodes: int, mounts: Sequence[Path], timings: Timings) -> None:
        self._folder.mkdir(parents=True)
        (self._folder / "mounts.json").write_text(json.dumps([str(mount) for mount in mounts]))
        own_networks = self._write_own_networks(nodes) if self._docker.own_pod_network else []
        config = cluster_config(nodes, mounts, own_networks, timings)
        image = [f"--image={self._docker.node_image}"] if self._docker.node_image else []
        kind(
            self._docker,
            *("create", "cluster", f"--name={self._kind_name}", f"--kubeconfig={self.kubeconfig}", "--config=-"),
            *image,
            stdin=json.dumps(config),
        )
        if self._docker.netns is not None:
            self._start_forwarder(self._api_port(), self._docker.netns, "127.0.0.1", self._api_port())
        if own_networks:
            self._route_between_nodes()
        for node in self._containers():
            self._show_machine_files(node, mounts)
        ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        wait_until(
            lambda: self.kubectl("get", "nodes", f"--output={ready}").split() == ["True"] * (nodes + 1),
            f"{nodes + 1} nodes to be Ready",
            timeout_seconds=_READY_TIMEOUT_SECONDS,
        )

    @property
    def _kind_name(self) -> str:
        return prefix_of(self._name)

    @property
    def _control_plane(self) -> str:
        return f"{self._kind_name}-control-plane"

    @property
    def _processes(self) -> Path:
        return self._folder / "processes"

    def _containers(self) -> list[str]:
        return kind(self._docker, "get", "nodes", f"--name={self._kind_name}").split()

    def _in_node(self, node: str, *command: str, stdin: str | None = None) -> str:
        return self._docker.run("exec", "--interactive", node, *command, stdin=stdin)

    def _api_port(self) -> int:
        server = self.kubeconfig.read_text().partition("server: ")[2].split()[0]
        return int(server.rpartition(":")[2])

    def _start_forwarder(self, host_port: int, netns: Path, address: str, port: int) -> HostPort:
        with listen(host_port) as listener:
            bound = HostPort("127.0.0.1", listener.getsockname()[1])
            pid = launch.spawn(
                launch.module("forwarder", str(listener.fileno()), address, str(port)),
                group=None,
                netns=netns,
                log=self._folder / "forwarders" / f"{bound.port}.log",
                keep_open=[listener.fileno()],
            )
            pidfile.remember(self._processes, pid)
        return bound

    def _write_own_networks(self, nodes: int) -> list[Path]:
        folders = []
        for ordinal in range(nodes + 1):
            folder = self._folder / "cni" / str(ordinal)
            folder.mkdir(parents=True)
            (folder / "10-pods.conflist").write_text(bridge_network(own_pod_network(ordinal)))
            folders.append(folder)
        return folders

    def _route_between_nodes(self) -> None:
        addresses = {}
        for node in self._containers():
            if self._docker.run("inspect", "--format={{.State.Running}}", node).strip() != "true":
                continue
            address = self._docker.run(
                "inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", node
            )
            config = json.loads(self._in_node(node, "cat", "/etc/cni/net.d/10-pods.conflist"))
            addresses[node] = (address.strip(), config["plugins"][0]["ipam"]["ranges"][0][0]["subnet"])
        for node in addresses:
            for other, (address, subnet) in addresses.items():
                if other != node:
                    self._in_node(node, "ip", "route", "replace", subnet, "via", address)

    def _show_machine_files(self, node: str, mounts: Sequence[Path]) -> None:
        spec = base_spec(json.loads(self._in_node(node, "cat", _CRI_BASE_SPEC)), mounts)
        for mount in spec["mounts"]:
            if mount["type"] == "bind" and Path(mount["source"]) in mounts:
                mount["source"] = _MACHINE_FILES + mount["source"]
        self._in_node(node, "cp", "/dev/stdin", _CRI_BASE_SPEC, stdin=json.dumps(spec))
        self._in_node(node, "systemctl", "restart", "containerd")


class KindProvider:
    """Makes clusters with kind. Needs a Docker daemon; builds kind itself when it is not installed."""

    def __init__(self, name: str, folder: Path | None = None, docker: Docker | None = None) -> None:
        self._docker = docker or Docker()
        self._cluster = KindCluster(name, (folder or DEFAULT_ROOT / name).resolve(), self._docker)

    def up(self, nodes: int = 3, *, mounts: Sequence[Path] = (), timings: Timings = TUNED) -> KindCluster:
        _check_docker(self._docker)
        self._cluster.create(nodes, mounts, timings)
        return self._cluster

    def existing(self) -> KindCluster:
        if not self._cluster.kubeconfig.exists():
            raise ClusterError(
                expected=f"a kind cluster named {self._cluster.name}",
                found=f"no {self._cluster.kubeconfig}",
                remedy="bring it up first: python -m e2e.cluster --provider kind up",
            )
        return self._cluster

    def down(self) -> None:
        self._cluster.down()


def kind(docker: Docker, *arguments: str, stdin: str | None = None) -> str:
    program = shutil.which("kind") or str(build.kind_tools() / "kind")
    return run(program, *arguments, stdin=stdin, env=docker.full_environment(), timeout_seconds=_CREATE_TIMEOUT_SECONDS)


def cluster_config(
    nodes: int, mounts: Sequence[Path], own_networks: Sequence[Path] = (), timings: Timings = TUNED
) -> dict[str, Any]:
    """kind's configuration of one control plane and ``nodes`` workers."""
    files = [{"hostPath": str(path), "containerPath": f"{_MACHINE_FILES}{path}", "readOnly": True} for path in mounts]
    roles = ["control-plane", *["worker"] * nodes]
    described: list[dict[str, Any]] = [{"role": role, "extraMounts": list(files)} for role in roles]
    for node, network in zip(described, own_networks, strict=False):
        node["extraMounts"].append({"hostPath": str(network), "containerPath": "/etc/cni/net.d"})
    kubelet = {
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "nodeStatusUpdateFrequency": f"{timings.node_status_seconds}s",
        "nodeLeaseDurationSeconds": timings.node_lease_seconds,
        "crashLoopBackOff": {"maxContainerRestartPeriod": f"{timings.max_restart_backoff_seconds}s"},
    }
    toleration = str(timings.toleration_seconds)
    control_plane = {
        "kind": "ClusterConfiguration",
        "apiServer": {
            "extraArgs": _arguments(
                {
                    "default-unreachable-toleration-seconds": toleration,
                    "default-not-ready-toleration-seconds": toleration,
                }
            )
        },
        "controllerManager": {
            "extraArgs": _arguments(
                {
                    # A patch replaces the whole list, so kind's own argument is repeated here.
                    "enable-hostpath-provisioner": "true",
                    "node-monitor-period": f"{timings.node_monitor_seconds}s",
                    "node-monitor-grace-period": f"{timings.node_grace_seconds}s",
                }
            )
        },
    }
    config: dict[str, Any] = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "networking": {"kubeProxyMode": "nftables", "podSubnet": str(POD_NETWORK)},
        "nodes": described,
        "kubeadmConfigPatches": [json.dumps(kubelet), json.dumps(control_plane)],
    }
    if own_networks:
        # A machine without a registry: no network daemon, no name server, and perhaps no right to
        # lower a score of the out-of-memory killer.
        config["networking"]["disableDefaultCNI"] = True
        skip = {"kind": "InitConfiguration", "skipPhases": ["preflight", "addon/coredns"]}
        config["kubeadmConfigPatches"].append(json.dumps(skip))
        config["containerdConfigPatches"] = ['[plugins."io.containerd.grpc.v1.cri"]\nrestrict_oom_score_adj = true\n']
    return config


def own_pod_network(ordinal: int) -> IPv4Network:
    """Above those that the controller manager gives to nodes, so that the two never meet."""
    return IPv4Network((int(POD_NETWORK[0]) + 256 * (_FIRST_OWN_POD_NETWORK + ordinal), 24))


def pids_with(part_of_cgroup: str) -> list[int]:
    """This machine's processes whose control group's path contains a text, such as a container's id."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if part_of_cgroup in (entry / "cgroup").read_text():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _arguments(values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _check_docker(docker: Docker) -> None:
    try:
        docker.run("info", "--format={{.ServerVersion}}")
    except ClusterError as error:
        raise ClusterError(
            expected="a Docker daemon",
            found=error.found,
            remedy="start Docker, or use the namespaces provider, which needs none",
        ) from error


def _check_root(purpose: str) -> None:
    if os.geteuid() != 0:
        raise ClusterError(expected=f"root {purpose}", found=f"user id {os.geteuid()}", remedy="run it with sudo")
