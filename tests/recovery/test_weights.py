"""A stage that is started again has its weights from its twin, and the same tokens come out; else from storage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import Limits
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster, local_cluster
from resilientllm_cli.local.observe import StageWeights

from tests.recovery.load import READY_SECONDS, asks, compared, stream_all, undisturbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STAGES = 2
FLAGS = ("--kv-cache-memory-bytes", str(32 * 2**20), "--max-num-batched-tokens", "512", "--max-model-len", "1024")
ASKED = asks(4, tokens=80)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=STAGES,
        directory=tmp_path_factory.mktemp("weights"),
        runner="v1",
        extra_flags=FLAGS,
        weights=WeightsSource.TWIN,
        limits=Limits(heartbeat_timeout_seconds=20.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture(scope="module")
def expected(cluster: LocalCluster) -> list[list[int]]:
    return undisturbed(cluster.engines[0].url, ASKED)


@contextmanager
def no_weights_in_storage(model: Path) -> Iterator[None]:
    file = model / "model.safetensors"
    hidden = file.rename(model / "elsewhere")
    try:
        yield
    finally:
        hidden.rename(file)


def weights_of(cluster: LocalCluster, instance: int, stage: int) -> StageWeights:
    found = cluster.stage_weights(instance, stage)
    assert found is not None
    return found


@pytest.mark.parametrize("stage", range(STAGES), ids=["first", "last"])
def test_a_stage_that_finds_none_in_storage_serves_with_those_of_its_twin(
    cluster: LocalCluster, tiny_model: Path, expected: list[list[int]], stage: int
) -> None:
    with no_weights_in_storage(tiny_model):
        cluster.kill_stage(0, stage)
        cluster.wait_ready(READY_SECONDS)
    weights = weights_of(cluster, 0, stage)
    twin = cluster.stage(1, stage).address
    assert (weights.source, weights.reason) == (f"twin {twin}", "")
    assert weights.nbytes > 1 << 20
    assert f"weights came from twin {twin}" in cluster.log(f"stage-0.{stage}")
    assert "gave its weights to" in cluster.log(f"stage-1.{stage}")
    streams = asyncio.run(stream_all(cluster.engines[0].url, ASKED))
    assert compared(expected, streams) == Tokens(delivered=4 * 80)


def test_stages_that_find_no_twin_alive_load_from_storage(cluster: LocalCluster, expected: list[list[int]]) -> None:
    """Both copies are lost at once, so neither finds the other listening, or only one of them does."""
    cluster.wait_ready(READY_SECONDS)
    cluster.kill_stage(1, 1)
    cluster.kill_stage(0, 1)
    cluster.wait_ready(READY_SECONDS)
    both = [weights_of(cluster, instance, 1) for instance in (0, 1)]
    from_storage = [weights for weights in both if weights.source == "storage"]
    assert from_storage and all("expected a listener at" in weights.reason for weights in from_storage)
    streams = asyncio.run(stream_all(cluster.engines[0].url, ASKED))
    assert compared(expected, streams) == Tokens(delivered=4 * 80)
