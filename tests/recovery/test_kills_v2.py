"""kill -9 of stages under vLLM's V2 runner, the default on GPUs, with its kernels interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import Limits
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, asks, compared, merged_steps, undisturbed, with_kill

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FLAGS = (
    "--kv-cache-memory-bytes",
    str(64 * 2**20),
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "256",
    "--max-model-len",
    "512",
)
INTERPRETED = Path(__file__).parent.parent / "v2_on_cpu"


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=2,
        directory=tmp_path_factory.mktemp("v2"),
        runner="v2",
        extra_flags=FLAGS,
        env={"PYTHONPATH": str(INTERPRETED)},
        weights=WeightsSource.TWIN,
        limits=Limits(heartbeat_timeout_seconds=20.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def test_it_is_the_v2_runner_that_runs(cluster: LocalCluster) -> None:
    assert "Using V2 Model Runner" in cluster.log("stage-0.0")


@pytest.mark.parametrize("stage", [0, 1], ids=["first", "last"])
def test_streams_of_both_tenants_survive(cluster: LocalCluster, stage: int) -> None:
    cluster.wait_ready(READY_SECONDS)
    mine, theirs = asks(3, tokens=60, shorter=12), asks(2, tokens=60, first=20, shorter=20)
    urls = [engine.url for engine in cluster.engines]
    expected = [undisturbed(urls[0], mine), undisturbed(urls[1], theirs)]
    streams, beside = with_kill(
        urls[0], mine, lambda: cluster.kill_stage(0, stage), after_tokens=15, beside=[(urls[1], theirs)]
    )
    assert compared(expected[0], streams) == Tokens(delivered=60 + 48 + 36)
    assert compared(expected[1], beside) == Tokens(delivered=60 + 40)
    cluster.wait_ready(READY_SECONDS)
    weights = cluster.stage_weights(0, stage)
    assert weights is not None and weights.source == f"twin {cluster.stage(1, stage).address}"


def test_a_donor_runs_steps_of_both_tenants_in_one_forward(cluster: LocalCluster) -> None:
    cluster.wait_ready(READY_SECONDS)
    merged = merged_steps(cluster, (1, 1), lambda: cluster.kill_stage(0, 1), tokens=60, prompt_tokens=200)
    assert merged > 0
