"""What the tests of this folder share that need a real API server: a cluster, and a control plane without nodes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.cluster.provider import Cluster
from tests.operator.cluster import cluster_without_operator
from tests.operator.story import Tell, storyteller


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with cluster_without_operator() as made:
        yield made


@pytest.fixture(scope="package")
def tell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tell]:
    with storyteller(tmp_path_factory.mktemp("lone")) as made:
        yield made
