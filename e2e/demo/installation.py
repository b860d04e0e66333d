"""Installs the product into a cluster as a user would: images, ``manifests/base``, a model, an example.

The manifests are the shipped ones. What differs from a real cluster is said here: where the images come from, and
which folder of the nodes holds the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

from e2e.cluster.commands import run
from e2e.cluster.image import OPERATOR_REF, WORKER_REF
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.provider import Cluster

SYSTEM_NAMESPACE = "resilientllm-system"
OPERATOR = "resilientllm-operator"
NAMESPACE = "default"
"""Where models-pv.yaml has its claim, and therefore where the examples run."""
MANIFESTS = REPOSITORY / "manifests"
MODEL = "tiny"
"""The folder's name below the volume, as manifests/examples/tiny.yaml has it."""

_OPERATOR_TIMEOUT_SECONDS = 180
_BUILD_TIMEOUT_SECONDS = 3600.0
"""The worker image has gigabytes of packages to fetch."""
_BINARIES = REPOSITORY / ".venv" / "bin"


def load_thin_images(cluster: Cluster) -> None:
    """Images of a few kilobytes that run the checkout and its environment: no Docker, no registry."""
    environment = {"PATH": f"{_BINARIES}:/usr/local/bin:/usr/bin:/bin"}
    cluster.load_thin_image(OPERATOR_REF, entrypoint=[str(_BINARIES / OPERATOR)], env=environment)
    cluster.load_thin_image(WORKER_REF, entrypoint=[str(_BINARIES / "python")], env=environment)


def load_built_images(cluster: Cluster) -> None:
    """The real images, built with Docker from the Dockerfiles."""
    with tempfile.TemporaryDirectory() as folder:
        for ref, dockerfile in ((OPERATOR_REF, "operator/Dockerfile"), (WORKER_REF, "worker/Dockerfile")):
            archive = Path(folder) / f"{dockerfile.partition('/')[0]}.tar"
            build = ("docker", "build", "--file", str(REPOSITORY / dockerfile), "--tag", ref, str(REPOSITORY))
            run(*build, timeout_seconds=_BUILD_TIMEOUT_SECONDS)
            run("docker", "save", "--output", archive, ref, timeout_seconds=_BUILD_TIMEOUT_SECONDS)
            cluster.load_image(archive)


def install_operator(cluster: Cluster) -> None:
    """The CRD, the operator and its rights, as shipped; returns when it has looked at the cluster."""
    cluster.kubectl("apply", "--kustomize", str(MANIFESTS / "base"))
    cluster.kubectl("wait", "--for=condition=Established", "crd/resilientllms.resilientllm.dev", "--timeout=60s")
    cluster.kubectl(
        *("rollout", "status", f"deployment/{OPERATOR}", f"--namespace={SYSTEM_NAMESPACE}"),
        f"--timeout={_OPERATOR_TIMEOUT_SECONDS}s",
        timeout_seconds=_OPERATOR_TIMEOUT_SECONDS + 10,
    )


def make_model(folder: Path) -> None:
    """The tiny model in a folder that becomes a volume; pods read it as a user without rights."""
    write_tiny_model(folder / MODEL, TinyModel())
    for place in (folder, folder / MODEL):
        place.chmod(0o755)
    for file in (folder / MODEL).iterdir():
        file.chmod(0o644)


def open_to_all(folder: Path) -> Path:
    """The folder. pytest makes its folders private to root, and a volume's reader is not root."""
    for made in (folder, folder.parent, folder.parent.parent):
        made.chmod(0o755)
    return folder


def provide_model(cluster: Cluster, folder: Path) -> None:
    """The volume of manifests/examples/models-pv.yaml, with the nodes' folder that holds the model here."""
    objects = list(documents(MANIFESTS / "examples" / "models-pv.yaml"))
    for each in objects:
        if each["kind"] == "PersistentVolume":
            each["spec"]["hostPath"]["path"] = str(cluster.node_path(folder))
    apply(cluster, objects)


def example() -> dict[str, Any]:
    """manifests/examples/tiny.yaml."""
    (obj,) = documents(MANIFESTS / "examples" / "tiny.yaml")
    return obj


def apply(cluster: Cluster, objects: Iterable[dict[str, Any]]) -> None:
    cluster.kubectl("apply", f"--namespace={NAMESPACE}", "--filename=-", stdin=yaml.safe_dump_all(objects))


def documents(file: Path) -> Iterable[dict[str, Any]]:
    return (document for document in yaml.safe_load_all(file.read_text()) if document)


def service_address(cluster: Cluster, name: str) -> tuple[str, int]:
    """Address and port of the Service of a ResilientLLM."""
    found = cluster.kubectl(
        *("get", "service", name, f"--namespace={NAMESPACE}"),
        "--output=jsonpath={.spec.clusterIP} {.spec.ports[0].port}",
    )
    address, port = found.split()
    return address, int(port)
