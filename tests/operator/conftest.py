"""One cluster for all tests of this folder that need a real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.cluster.provider import Cluster
from tests.operator.cluster import cluster_without_operator


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    with cluster_without_operator() as made:
        yield made
