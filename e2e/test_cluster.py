"""The cluster itself: a real Kubernetes starts, runs our kind of pod, suffers what tests do to it, and goes.

The tests share one cluster, since they would otherwise spend their time on starting it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster import network
from e2e.cluster.errors import CommandFailed
from e2e.cluster.image import NONROOT_ID
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.layout import DEFAULT_ROOT, prefix_of
from e2e.cluster.leftovers import left_behind
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.namespaces import NamespaceCluster, NamespaceProvider

pytestmark = pytest.mark.cluster

_VENV = REPOSITORY / ".venv"
PYTHON = str(_VENV / "bin" / "python") if _VENV.exists() else "/usr/bin/python3"
IMAGE = "resilientllm/thin-under-test:dev"
PORT = 8000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    # pytest makes its folders private to root; a volume's reader is not root.
    for made in (folder, folder.parent, folder.parent.parent):
        made.chmod(0o755)
    (folder / "weights").write_text("weights of the model")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[NamespaceCluster]:
    provider = NamespaceProvider(f"test-{os.getpid()}")
    try:
        made = provider.up(3, mounts=default_mounts(REPOSITORY))
        made.kubectl("label", "namespace", "default", "pod-security.kubernetes.io/enforce=restricted")
        made.load_thin_image(IMAGE, entrypoint=[PYTHON])
        yield made
    finally:
        provider.down()


def pod(
    name: str, node: str, *arguments: str, volumes: list[dict[str, Any]] | None = None, restart: str = "Always"
) -> dict[str, Any]:
    """A pod that the ``restricted`` Pod Security level admits; each volume is mounted at /<its name>."""
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "args": list(arguments),
        "volumeMounts": [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes or []],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    spec = {
        "nodeName": node,
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": volumes or [],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def apply(cluster: NamespaceCluster, *objects: dict[str, Any]) -> None:
    cluster.kubectl("apply", "--filename=-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def get(cluster: NamespaceCluster, kind: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("get", kind, name, "--output=json"))
    return found


def eventually(condition: Callable[[], bool], within_seconds: float) -> None:
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {within_seconds:g} s"
        time.sleep(0.2)


def readiness(cluster: NamespaceCluster, node: str) -> str:
    conditions = get(cluster, "node", node)["status"]["conditions"]
    return str(next(condition["status"] for condition in conditions if condition["type"] == "Ready"))


def wait_for_ready_pod(cluster: NamespaceCluster, name: str) -> None:
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=30s")


def test_thin_image_runs_the_machines_python_without_rights(cluster: NamespaceCluster) -> None:
    program = (
        "import os, sys\n"
        "print('user', os.getuid())\n"
        "print('prefix', sys.prefix)\n"
        f"try:\n    open('{REPOSITORY}/written', 'w')\n"
        "except OSError as error:\n    print('error', error.errno)\n"
    )
    apply(cluster, pod("thin", "node-1", "-c", program, restart="Never"))

    eventually(lambda: get(cluster, "pod", "thin")["status"]["phase"] == "Succeeded", within_seconds=20)

    said = cluster.kubectl("logs", "thin").splitlines()
    assert f"user {NONROOT_ID}" in said
    assert f"prefix {_VENV if _VENV.exists() else '/usr'}" in said
    assert f"error {errno.EROFS}" in said


def test_host_path_volume_is_the_machines_own_folder(cluster: NamespaceCluster, model_folder: Path) -> None:
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": "model"},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": str(model_folder), "type": "Directory"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "model"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": "model",
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    mounted = {"name": "model", "persistentVolumeClaim": {"claimName": "model", "readOnly": True}}
    reader = pod("reader", "node-2", "-c", "print(open('/model/weights').read())", volumes=[mounted], restart="Never")
    apply(cluster, volume, claim, reader)

    eventually(lambda: get(cluster, "pod", "reader")["status"]["phase"] == "Succeeded", within_seconds=30)

    assert cluster.kubectl("logs", "reader").strip() == "weights of the model"


def test_killed_container_is_started_again_by_the_kubelet(cluster: NamespaceCluster) -> None:
    apply(cluster, pod("killed", "node-1", "-c", "import time; print('up', flush=True); time.sleep(600)"))
    wait_for_ready_pod(cluster, "killed")
    first = cluster.container_pids("default", "killed", "main")[0]
    assert PYTHON in Path(f"/proc/{first}/cmdline").read_text().split("\0")

    os.kill(first, signal.SIGKILL)

    eventually(lambda: restarts(cluster, "killed") == 1, within_seconds=15)
    wait_for_ready_pod(cluster, "killed")
    assert cluster.container_pids("default", "killed", "main")[0] != first


def restarts(cluster: NamespaceCluster, name: str) -> int:
    return int(get(cluster, "pod", name)["status"]["containerStatuses"][0]["restartCount"])


def test_service_without_selector_is_reached_through_a_forwarded_port(
    cluster: NamespaceCluster, model_folder: Path
) -> None:
    served = {"name": "model", "persistentVolumeClaim": {"claimName": "model", "readOnly": True}}
    server = ("-m", "http.server", str(PORT), "--directory=/model")
    apply(cluster, pod("web", "node-2", *server, volumes=[served]))
    wait_for_ready_pod(cluster, "web")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80, "targetPort": PORT}]},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": PORT}],
        "endpoints": [
            {"addresses": [get(cluster, "pod", "web")["status"]["podIP"]], "conditions": {"ready": True}},
        ],
    }
    apply(cluster, service, endpoints)
    host, port = cluster.forward(get(cluster, "service", "web")["spec"]["clusterIP"], 80)
    answers: list[str] = []

    def answered() -> bool:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/weights", timeout=5) as answer:
                answers.append(answer.read().decode())
        except OSError:
            # The rules of kube-proxy follow the EndpointSlice a moment later.
            return False
        return True

    eventually(answered, within_seconds=15)
    assert answers == ["weights of the model"]


def test_broken_gpu_is_seen_in_the_status_of_its_pod(cluster: NamespaceCluster) -> None:
    (gpu,) = cluster.fake_gpus("node-1", 1)
    wanting = pod("wants-gpu", "node-1", "-c", "import time; time.sleep(600)")
    wanting["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    apply(cluster, wanting)
    wait_for_ready_pod(cluster, "wants-gpu")
    eventually(lambda: gpu_health(cluster, "wants-gpu") == [(gpu, "Healthy")], within_seconds=15)

    cluster.set_gpu_health("node-1", gpu, healthy=False)

    eventually(lambda: gpu_health(cluster, "wants-gpu") == [(gpu, "Unhealthy")], within_seconds=15)


def gpu_health(cluster: NamespaceCluster, name: str) -> list[tuple[str, str]]:
    container = get(cluster, "pod", name)["status"]["containerStatuses"][0]
    return [
        (resource["resourceID"], resource["health"])
        for allocated in container.get("allocatedResourcesStatus", [])
        for resource in allocated["resources"]
    ]


def test_partitioned_node_is_lost_and_comes_back(cluster: NamespaceCluster) -> None:
    apply(cluster, pod("cut-off", "node-3", "-c", "import time; time.sleep(600)"))
    wait_for_ready_pod(cluster, "cut-off")
    before = cluster.container_pids("default", "cut-off", "main")

    cluster.partition_node("node-3")
    eventually(lambda: readiness(cluster, "node-3") == "Unknown", within_seconds=20)
    assert Path(f"/proc/{before[0]}").exists(), "a partition must not end what runs on the node"
    cluster.heal_node("node-3")

    eventually(lambda: readiness(cluster, "node-3") == "True", within_seconds=15)


def test_killed_node_is_lost_and_can_be_started_again(cluster: NamespaceCluster) -> None:
    apply(cluster, pod("on-dying-node", "node-2", "-c", "import time; time.sleep(600)"))
    wait_for_ready_pod(cluster, "on-dying-node")
    processes = cluster.container_pids("default", "on-dying-node", "main")

    cluster.kill_node("node-2")

    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    eventually(lambda: readiness(cluster, "node-2") == "Unknown", within_seconds=20)
    cluster.start_node("node-2")
    eventually(lambda: readiness(cluster, "node-2") == "True", within_seconds=20)
    apply(cluster, pod("on-revived-node", "node-2", "-c", "import time; time.sleep(600)"))
    wait_for_ready_pod(cluster, "on-revived-node")


def test_stopped_api_server_stays_down_until_it_is_started(cluster: NamespaceCluster) -> None:
    cluster.stop_service("control-plane", "kube-apiserver")
    with pytest.raises(CommandFailed):
        cluster.kubectl("get", "nodes", "--request-timeout=2s")

    cluster.start_service("control-plane", "kube-apiserver")

    assert len(cluster.kubectl("get", "nodes", "--output=name").split()) == 3


def test_down_leaves_nothing_behind(cluster: NamespaceCluster) -> None:
    layout = cluster.layout
    kinds = {word.split()[0] for word in left_behind(layout.name, layout.folder)}
    assert kinds == {"process", "control", "network", "mount", "folder"}, "else the next assertion would prove nothing"

    cluster.down()

    assert left_behind(layout.name, layout.folder) == []
    cluster.down()


def test_down_cleans_up_after_an_up_that_was_killed_half_way() -> None:
    name = f"killed-{os.getpid()}"
    provider = NamespaceProvider(name)
    up = subprocess.Popen([sys.executable, "-m", "e2e.cluster", f"--name={name}", "up"], cwd=REPOSITORY)
    try:
        eventually(lambda: len(network.namespaces(prefix_of(name))) >= 3, within_seconds=60)
    finally:
        up.kill()
        up.wait()
        folder = DEFAULT_ROOT / name
        before = left_behind(name, folder)
        provider.down()

    assert before, "else there was nothing to clean up"
    assert left_behind(name, folder) == []
