"""A real Kubernetes of several nodes in Linux namespaces: no Docker, no registry, seconds to start.

The order of `up` is the order in which `down` can clean: the folder with the layout is written
first, and everything made after it carries the cluster's prefix.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import build, cgroups, faults, launch, machine_files, network, node, packages, pki
from .commands import run, wait_until
from .errors import ClusterError
from .image import pause_image, write_archive, write_thin_image
from .layout import API_PORT, DEFAULT_ROOT, Layout, NodePlan, node_names
from .leftovers import left_behind, remove
from .provider import HostPort
from .supervisor import ready_folder
from .timings import TUNED, Timings

_START_TIMEOUT_SECONDS = 120.0
_NODE_SERVICES = ("containerd", "kubelet", "kube-proxy")
_CONTROL_PLANE_SERVICES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")


class NamespaceCluster:
    """A running cluster. It keeps no state in memory: another process may hold the same one."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def kubeconfig(self) -> Path:
        return self.layout.host_kubeconfig

    @property
    def mounts(self) -> tuple[Path, ...]:
        return self.layout.mounts

    def node_path(self, path: Path) -> Path:
        return path

    def kubectl_command(self, *arguments: str) -> list[str]:
        # The default place of kubectl's cache of the API is the home folder, which is not ours.
        cache = self.layout.folder / "kubectl-cache"
        program = self.layout.binaries / "kubectl"
        return [str(program), f"--kubeconfig={self.kubeconfig}", f"--cache-dir={cache}", *arguments]

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        return run(*self.kubectl_command(*arguments), stdin=stdin, timeout_seconds=timeout_seconds)

    def nodes(self) -> tuple[str, ...]:
        return self.layout.node_names

    def load_image(self, archive: Path) -> None:
        # Two archives may have the same name; one name must not push out another's on nodes that come later.
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        kept = self.layout.images / f"{archive.stem}-{digest[:16]}.tar"
        shutil.copyfile(archive, kept)
        self._import(kept)

    def _import(self, archive: Path) -> None:
        for name in self.nodes():
            init = cgroups.namespace_init(faults.group_of(self.layout, name))
            if init is not None:
                node.import_image(archive, f"/proc/{init}/root{node.CONTAINERD_SOCKET}")

    def load_thin_image(self, ref: str, *, entrypoint: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        archive = self.layout.images / f"{ref.replace('/', '_').replace(':', '_')}.tar"
        write_thin_image(archive, ref, entrypoint=entrypoint, env=env, mounts=self.mounts)
        self._import(archive)

    def forward(self, address: str, port: int) -> HostPort:
        return HostPort("127.0.0.1", _start_forwarder(self.layout, listen(), address, port))

    def container_pids(self, namespace: str, pod: str, container: str) -> list[int]:
        described = json.loads(self.kubectl("get", "pod", pod, f"--namespace={namespace}", "--output=json"))
        group = faults.group_of(self.layout, described["spec"].get("nodeName", "not-scheduled"))
        container_id = running_container_id(described, container)
        folders = list(cgroups.record(group).glob(f"kubepods*/**/{container_id}"))
        pids = cgroups.processes(f"{group}/{folders[0].relative_to(cgroups.record(group))}") if folders else []
        if not pids:
            raise ClusterError(
                expected=f"processes of container {container} of pod {namespace}/{pod}",
                found="none on this machine",
                remedy="see whether it has just ended: kubectl describe pod",
            )
        # Pid 1 of a container is its main process; what came later has a higher number there.
        return sorted(pids, key=lambda pid: cgroups.namespace_pids(pid)[-1:])

    def pod_processes(self) -> list[int]:
        """Of all pods on all nodes, whether the API server knows of them or not."""
        groups = [faults.group_of(self.layout, node) for node in self.nodes()]
        folders = [(group, folder.name) for group in groups for folder in cgroups.record(group).glob("kubepods*")]
        return [pid for group, name in folders for pid in cgroups.processes(f"{group}/{name}")]

    def kill_node(self, node: str) -> None:
        faults.cut_power(self.layout, self.layout.node(node))
        launch.reap()

    def start_node(self, node: str) -> None:
        plan = self.layout.node(node)
        if faults.is_alive(self.layout, node):
            raise ClusterError(expected=f"{node} to be dead", found="it runs", remedy="kill it first")
        network.make_node(self.layout, plan)
        _start_node(self.layout, plan)
        self._wait_for_services(self.layout.node_folder(node), _NODE_SERVICES)

    def partition_node(self, node: str) -> None:
        faults.cut_network(self.layout, self.layout.node(node))

    def heal_node(self, node: str) -> None:
        faults.join_network(self.layout, self.layout.node(node))

    def stop_service(self, machine: str, service: str) -> None:
        """Kill a service, such as ``kubelet`` of a node or ``kube-apiserver`` of ``control-plane``, for good."""
        faults.hold_service(self.layout, machine, service)
        ready = ready_folder(faults.folder_of(self.layout, machine)) / service
        wait_until(lambda: not ready.exists(), f"{service} of {machine} to end", timeout_seconds=5)

    def start_service(self, machine: str, service: str) -> None:
        faults.release_service(self.layout, machine, service)
        self._wait_for_services(faults.folder_of(self.layout, machine), (service,))

    def fake_gpus(self, node_name: str, count: int) -> tuple[str, ...]:
        """Let a node advertise GPUs as ``nvidia.com/gpu``; their ids. They can be allocated, but not used."""
        if importlib.util.find_spec("grpc") is None:
            raise ClusterError(
                expected="the Python package grpcio", found="none", remedy="use the project's virtual environment"
            )
        gpus = tuple(f"gpu-{number}" for number in range(count))
        self._write_gpus(node_name, dict.fromkeys(gpus, True))
        advertised = r"--output=jsonpath={.status.allocatable.nvidia\.com/gpu}"
        wait_until(
            lambda: self.kubectl("get", "node", node_name, advertised) == str(count),
            f"{node_name} to advertise {count} GPUs",
            timeout_seconds=30,
            where_to_look=[self.layout.node_folder(node_name) / "log" / "gpu-plugin.log"],
        )
        return gpus

    def set_gpu_health(self, node_name: str, gpu: str, *, healthy: bool) -> None:
        """Break or mend a GPU; its pods' ``allocatedResourcesStatus`` follows within a second."""
        gpus = json.loads(node.gpu_file(self.layout.node_folder(node_name)).read_text())
        if gpu not in gpus:
            raise ClusterError(expected="one of " + ", ".join(gpus), found=gpu, remedy="name an existing GPU")
        self._write_gpus(node_name, {**gpus, gpu: healthy})

    def _write_gpus(self, node_name: str, healthy: Mapping[str, bool]) -> None:
        file = node.gpu_file(self.layout.node_folder(self.layout.node(node_name).name))
        # The plugin must never read half of it.
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(dict(healthy)))
        unfinished.replace(file)

    def down(self) -> None:
        remove(self.layout.name, self.layout.folder)

    def wait_until_ready(self) -> None:
        """Wait for all services, for the nodes, and for what a pod needs to be admitted."""
        self._wait_for_services(self.layout.control_plane, _CONTROL_PLANE_SERVICES)
        for name in self.nodes():
            self._wait_for_services(self.layout.node_folder(name), _NODE_SERVICES)
        ready = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        wait_until(
            lambda: self.kubectl("get", "nodes", f"--output={ready}").split() == ["True"] * len(self.nodes()),
            f"{len(self.nodes())} nodes to be Ready",
            timeout_seconds=_START_TIMEOUT_SECONDS,
            where_to_look=[self.layout.node_folder(name) / "log" for name in self.nodes()],
        )
        wait_until(
            self._has_default_account,
            "the service account that pods run as by default",
            timeout_seconds=_START_TIMEOUT_SECONDS,
            where_to_look=[self.layout.control_plane / "log"],
        )

    def _has_default_account(self) -> bool:
        return "default" in self.kubectl("get", "serviceaccounts", "--namespace=default", "--output=name")

    def _wait_for_services(self, folder: Path, services: Sequence[str]) -> None:
        wanted = set(services)
        wait_until(
            lambda: wanted <= _files_in(ready_folder(folder)),
            f"{', '.join(services)} of {folder.name} to be ready",
            timeout_seconds=_START_TIMEOUT_SECONDS,
            poll_seconds=0.05,
            where_to_look=[folder / "log"],
        )


class NamespaceProvider:
    """Makes clusters out of namespaces. Needs root, cgroup v1, and Go or a build from an earlier run."""

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self._name = name
        self._folder = (folder or DEFAULT_ROOT / name).resolve()

    def up(self, nodes: int = 3, *, mounts: Sequence[Path] = (), timings: Timings = TUNED) -> NamespaceCluster:
        _check_machine()
        packages.install(packages.missing_packages())
        binaries = build.binaries()
        listener = listen()
        layout = Layout(
            name=self._name,
            folder=self._folder,
            binaries=binaries,
            mounts=tuple(mounts),
            node_names=node_names(nodes),
            host_port=listener.getsockname()[1],
            timings=timings,
        )
        self._claim(layout)
        cluster = NamespaceCluster(layout)
        try:
            _make(layout, listener)
            cluster.wait_until_ready()
        finally:
            listener.close()
        return cluster

    def existing(self) -> NamespaceCluster:
        return NamespaceCluster(Layout.load(self._folder))

    def down(self) -> None:
        remove(self._name, self._folder)

    def _claim(self, layout: Layout) -> None:
        layout.folder.parent.mkdir(parents=True, exist_ok=True)
        leftovers = left_behind(layout.name, layout.folder)
        if leftovers:
            raise ClusterError(
                expected=f"no cluster named {layout.name}",
                found=f"{len(leftovers)} things of it, such as {leftovers[0]}",
                remedy="remove it first: python -m e2e.cluster down",
            )
        # The folder holds private keys.
        layout.folder.mkdir(mode=0o755)
        layout.save()


def running_container_id(pod: dict[str, object], container: str) -> str:
    """The id of a pod's running container, from the pod as the API gives it."""
    status = pod.get("status")
    statuses = status.get("containerStatuses", []) if isinstance(status, dict) else []
    for entry in statuses:
        if entry["name"] == container and "running" in entry["state"]:
            return str(entry["containerID"]).rpartition("://")[2]
    raise ClusterError(
        expected=f"a running container {container}",
        found=", ".join(f"{entry['name']} {'/'.join(entry['state'])}" for entry in statuses) or "no container",
        remedy="wait until it runs",
    )


def _make(layout: Layout, listener: socket.socket) -> None:
    layout.images.mkdir()
    write_archive(layout.images / "pause.tar", pause_image(layout.binaries / "pause"))
    machine_files.write_base_spec(layout.base_spec, layout.mounts)
    pki.make(layout)
    network.make_fabric(layout)
    _start_forwarder(layout, listener, "127.0.0.1", API_PORT)
    launch.spawn_machine(
        launch.module("control_plane", layout.folder),
        group=f"{layout.prefix}/{cgroups.CONTROL_PLANE}",
        netns=network.netns_file(layout.fabric),
        log=layout.control_plane / "log" / "init.log",
    )
    for plan in layout.nodes:
        node.prepare(layout, plan)
        network.make_node(layout, plan)
        _start_node(layout, plan)


def _start_node(layout: Layout, plan: NodePlan) -> None:
    folder = layout.node_folder(plan.name)
    # What a node that lost its power said about its services no longer holds.
    for stale in _files_in(ready_folder(folder)):
        (ready_folder(folder) / stale).unlink()
    for place in node.PRIVATE_FOLDERS:
        Path(place).mkdir(parents=True, exist_ok=True)
    launch.spawn_machine(
        launch.module("node", layout.folder, plan.name),
        group=faults.group_of(layout, plan.name),
        netns=network.netns_file(layout.netns(plan.name)),
        log=folder / "log" / "init.log",
    )


def listen(port: int = 0) -> socket.socket:
    """A listening socket on the loopback; any free port unless one is asked for."""
    return socket.create_server(("127.0.0.1", port), backlog=128)


def _start_forwarder(layout: Layout, listener: socket.socket, address: str, port: int) -> int:
    """Hand a listening socket to a forwarder that runs in the clients' network; the port it listens on."""
    host_port = int(listener.getsockname()[1])
    with listener:
        launch.spawn(
            launch.module("forwarder", str(listener.fileno()), address, str(port)),
            group=f"{layout.prefix}/{cgroups.HOST_SIDE}",
            netns=network.netns_file(layout.fabric),
            log=layout.folder / "forwarders" / f"{host_port}.log",
            keep_open=[listener.fileno()],
        )
    return host_port


def _files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            expected="to run as root", found=f"user id {os.geteuid()}", remedy="run it with sudo, or use kind"
        )
    cgroups.hierarchies()
