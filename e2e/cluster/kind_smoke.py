"""Shows that the kind provider works, on a machine that may have no Docker: one cluster, from make to gone.

With a Docker daemon on the machine it uses that and kind's own image; else one of our own, and an
image made here. It is opt-in, since a first run takes minutes, and every run a quarter of a gigabyte
for each node.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import kind_image
from .commands import wait_until
from .errors import ClusterError
from .kind import Docker, KindCluster, KindProvider
from .launch import REPOSITORY
from .layout import DEFAULT_ROOT
from .machine_files import default_mounts
from .private_docker import private_docker

_IMAGE = "resilientllm/kind-smoke:dev"
_WORKERS = 2
_PYTHON = "/usr/bin/python3"


def kind_smoke() -> None:
    """Create, load an image, run a pod on each worker, reach one, lose a node and get it back, delete."""
    name = f"smoke-{os.getpid()}"
    with _docker(name) as docker:
        provider = KindProvider(name, docker=docker)
        try:
            with _timed("create one control plane and two workers"):
                cluster = provider.up(_WORKERS, mounts=default_mounts(REPOSITORY))
            with _timed("load an image"):
                cluster.load_thin_image(_IMAGE, entrypoint=[_PYTHON])
            with _timed("run a pod on each worker"):
                for node in cluster.nodes():
                    cluster.kubectl("apply", "--filename=-", stdin=json.dumps(_pod(node)))
                cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=120s", timeout_seconds=150)
            with _timed("reach a pod from this machine"):
                _reach(cluster, f"on-{cluster.nodes()[0]}")
            with _timed("partition a worker, and heal it"):
                cluster.partition_node(cluster.nodes()[0])
                _wait_for_readiness(cluster, cluster.nodes()[0], "Unknown")
                cluster.heal_node(cluster.nodes()[0])
                _wait_for_readiness(cluster, cluster.nodes()[0], "True")
            with _timed("kill a worker, and start it again"):
                cluster.kill_node(cluster.nodes()[1])
                _wait_for_readiness(cluster, cluster.nodes()[1], "Unknown")
                cluster.start_node(cluster.nodes()[1])
                _wait_for_readiness(cluster, cluster.nodes()[1], "True")
        finally:
            with _timed("delete"):
                provider.down()


@contextmanager
def _docker(name: str) -> Iterator[Docker]:
    ordinary = Docker()
    if shutil.which("docker"):
        try:
            ordinary.run("info")
        except ClusterError:
            print("no Docker daemon answers; starting one in namespaces of its own", flush=True)
        else:
            yield ordinary
            return
    with private_docker(name, DEFAULT_ROOT / f"{name}-docker") as docker:
        with _timed("give it a node image"):
            image = kind_image.load(docker)
        yield replace(docker, node_image=image)


def _pod(node: str) -> dict[str, Any]:
    server = {"name": "main", "image": _IMAGE, "imagePullPolicy": "IfNotPresent", "args": ["-m", "http.server", "8000"]}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"on-{node}"},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [server]},
    }


def _reach(cluster: KindCluster, pod: str) -> None:
    described = json.loads(cluster.kubectl("get", "pod", pod, "--output=json"))
    pid = cluster.container_pids("default", pod, "main")[0]
    command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    if _PYTHON not in command:
        raise ClusterError(expected=f"pid {pid} to run {_PYTHON}", found=" ".join(command), remedy="look at the pids")
    host, port = cluster.forward(described["status"]["podIP"], 8000)
    _get(f"http://{host}:{port}/")


def _get(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as answer:
        if answer.status != 200:
            raise ClusterError(expected=f"200 from {url}", found=str(answer.status), remedy="look at the pod's log")


def _wait_for_readiness(cluster: KindCluster, node: str, wanted: str) -> None:
    ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    wait_until(
        lambda: cluster.kubectl("get", "node", node, f"--output={ready}") == wanted,
        f"{node} to have Ready={wanted}",
        timeout_seconds=180,
        poll_seconds=0.5,
    )


@contextmanager
def _timed(what: str) -> Iterator[None]:
    print(f"{what} …", flush=True)
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.1f} s", flush=True)
