"""A real Kubernetes of one node with the shipped manifests, where no operator runs: tests stand in for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from e2e.cluster.launch import REPOSITORY
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.namespaces import NamespaceProvider
from e2e.cluster.provider import Cluster

SYSTEM = "resilientllm-system"
ACCOUNT = "resilientllm-operator"
IMAGE = "resilientllm/worker:operator-test"
BIN = REPOSITORY / ".venv" / "bin"


@contextmanager
def cluster_without_operator() -> Iterator[Cluster]:
    """A new one, or that which ``RESILIENTLLM_TEST_CLUSTER`` names."""
    existing = os.environ.get("RESILIENTLLM_TEST_CLUSTER")
    provider = NamespaceProvider(existing or f"operator-{os.getpid()}")
    try:
        made: Cluster = provider.existing() if existing else provider.up(1, mounts=default_mounts(REPOSITORY))
        made.kubectl("apply", "-k", str(REPOSITORY / "manifests" / "base"))
        # The process under test stands in for the Deployment.
        made.kubectl("-n", SYSTEM, "scale", "deployment", ACCOUNT, "--replicas=0")
        made.kubectl("wait", "--for=condition=Established", "crd/resilientllms.resilientllm.dev", "--timeout=30s")
        made.load_thin_image(
            IMAGE, entrypoint=[str(BIN / "python")], env={"PATH": f"{BIN}:/usr/local/bin:/usr/bin:/bin"}
        )
        yield made
    finally:
        if not existing:
            provider.down()
