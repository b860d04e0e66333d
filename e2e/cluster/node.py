"""A node: containerd, kubelet and kube-proxy as a machine of their own.

`python -m e2e.cluster.node <cluster folder> <node>` runs as pid 1 of fresh pid, mount, cgroup, host
name, IPC and network namespaces. Upstream's standard paths work unchanged inside, since the node
gets its own /run, /var/log and so on; all other files are the machine's, as hostPath volumes expect.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import pki
from .cni import bridge_network
from .commands import run
from .control_plane import PROXY_HEALTH, api_server_ready_url, proxy
from .errors import ClusterError
from .image import PAUSE_REF
from .launch import module
from .layout import Layout, NodePlan
from .machine import become_machine, shield_sysctls
from .packages import cni_folder
from .supervisor import Service, Supervisor, http_ok, socket_accepts

CONTAINERD_SOCKET = "/run/containerd/containerd.sock"

DEVICE_PLUGINS = Path("/var/lib/kubelet/device-plugins")

# Folders of the machine that a node replaces by its own, where programs cannot be told another path.
PRIVATE_FOLDERS = ("/var/lib/kubelet", "/var/lib/cni", "/var/log")


def containerd_config(layout: Layout, node: NodePlan, cni_plugins: Path) -> str:
    folder = layout.node_folder(node.name)
    cri = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""\
version = 2
root = "{folder / "containerd"}"
state = "/run/containerd"
[grpc]
address = "{CONTAINERD_SOCKET}"
# The default is a folder of the machine that a cluster has no business in.
[plugins."io.containerd.internal.v1.opt"]
path = "{folder / "opt"}"
[{cri}]
sandbox_image = "{PAUSE_REF}"
# Root may lack CAP_SYS_RESOURCE, without which a score cannot be lowered.
restrict_oom_score_adj = true
[{cri}.cni]
bin_dir = "{cni_plugins}"
conf_dir = "{folder / "cni"}"
[{cri}.containerd]
default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
base_runtime_spec = "{layout.base_spec}"
[{cri}.containerd.runtimes.runc.options]
SystemdCgroup = false
"""


def kubelet_config(layout: Layout, node: NodePlan) -> str:
    server = layout.pki / pki.kubelet_server(node.name)
    config = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "0.0.0.0",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{server}.crt",
        "tlsPrivateKeyFile": f"{server}.key",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "clusterDomain": "cluster.local",
        # There is no name server in the cluster, and the machine's cannot be reached from it.
        "resolvConf": "",
        # The default lies below /usr, where a node must write nothing.
        "volumePluginDir": str(layout.node_folder(node.name) / "volume-plugins"),
        # Nodes share the machine's disk: one node's view of it must never evict a pod or an image.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "nodefs.inodesFree": "1%",
            "imagefs.available": "1%",
        },
        "syncFrequency": "10s",
        "nodeStatusUpdateFrequency": f"{layout.timings.node_status_seconds}s",
        "nodeLeaseDurationSeconds": layout.timings.node_lease_seconds,
        "crashLoopBackOff": {"maxContainerRestartPeriod": f"{layout.timings.max_restart_backoff_seconds}s"},
    }
    return json.dumps(config, indent=2)


def services(layout: Layout, node: NodePlan) -> list[Service]:
    folder = layout.node_folder(node.name)
    containerd_ready = socket_accepts(CONTAINERD_SOCKET)
    api_ready = http_ok(api_server_ready_url(), layout.pki / "ca.crt")
    kubelet = (
        str(layout.binaries / "kubelet"),
        f"--config={folder / 'kubelet.json'}",
        f"--kubeconfig={layout.kubeconfig(pki.node_user(node.name))}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        "--v=2",
    )
    return [
        Service("containerd", ("containerd", f"--config={folder / 'containerd.toml'}"), ready=containerd_ready),
        Service(
            "kubelet",
            kubelet,
            ready=http_ok("http://127.0.0.1:10248/healthz"),
            # A kubelet that finds no API server backs off for seconds; waiting here is quicker.
            start_when=lambda: containerd_ready() and api_ready(),
            before_start=lambda: import_images(layout.images),
        ),
        Service(
            "kube-proxy",
            proxy(layout, node=node.name, address=str(node.address)),
            ready=http_ok(PROXY_HEALTH),
            start_when=api_ready,
        ),
        # Belongs to the node, so that its GPUs go and come with it.
        Service(
            "gpu-plugin",
            tuple(module("gpu_plugin", DEVICE_PLUGINS, gpu_file(folder))),
            ready=lambda: True,
            start_when=lambda: gpu_file(folder).exists() and (DEVICE_PLUGINS / "kubelet.sock").exists(),
        ),
    ]


def gpu_file(folder: Path) -> Path:
    """The GPUs that a node pretends to have, and their health; without it, the node has none."""
    return folder / "gpus.json"


def import_images(archives: Path, socket_path: str = CONTAINERD_SOCKET) -> None:
    for archive in sorted(archives.glob("*.tar")):
        import_image(archive, socket_path)


def import_image(archive: Path, socket_path: str = CONTAINERD_SOCKET) -> None:
    run("ctr", "--address", socket_path, "--namespace", "k8s.io", "images", "import", archive, timeout_seconds=300)


def prepare(layout: Layout, node: NodePlan) -> None:
    """Write a node's configuration. Done once: a node that comes back finds its disk as it left it."""
    folder = layout.node_folder(node.name)
    (folder / "cni").mkdir(parents=True)
    plugins = cni_folder()
    if plugins is None:
        raise ClusterError(
            expected="CNI plugins on this machine", found="none", remedy="install containernetworking-plugins"
        )
    (folder / "containerd.toml").write_text(containerd_config(layout, node, plugins))
    (folder / "cni" / "10-pods.conflist").write_text(bridge_network(node.pod_network))
    (folder / "kubelet.json").write_text(kubelet_config(layout, node))


def mount_private_folders(folder: Path) -> None:
    for private in PRIVATE_FOLDERS:
        own = folder / "disk" / private.strip("/")
        own.mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", own, private)
    for wanted in ("/var/log/pods", "/var/log/containers"):
        Path(wanted).mkdir(exist_ok=True)


def main() -> None:
    layout = Layout.load(Path(sys.argv[1]))
    node = layout.node(sys.argv[2])
    folder = layout.node_folder(node.name)
    become_machine(node.name)
    shield_sysctls(folder)
    mount_private_folders(folder)
    Supervisor(services(layout, node), folder).run()


if __name__ == "__main__":
    main()
