"""A planned move under vLLM's V2 runner, with its kernels interpreted: nothing is computed again there, either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits, StageId
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, asks, compared, undisturbed, with_kill
from tests.recovery.replicas import delivered, kv_usage, last_recovery, published, wait_all_kept, wait_state

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

FLAGS = (
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "512", "--max-model-len", "1088"),
)
INTERPRETED = Path(__file__).parent.parent / "v2_on_cpu"
PROMPT_TOKENS, OUTPUT_TOKENS = 300, 150


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=2,
        directory=tmp_path_factory.mktemp("moves-v2"),
        runner="v2",
        extra_flags=FLAGS,
        env={"PYTHONPATH": str(INTERPRETED)},
        limits=Limits(heartbeat_interval_seconds=0.1, heartbeat_timeout_seconds=60.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def test_it_is_the_v2_runner_that_runs(cluster: LocalCluster) -> None:
    assert "Using V2 Model Runner" in cluster.log("stage-0.0")


@pytest.mark.parametrize("stage", [0, 1], ids=["first", "last"])
def test_requests_go_along_there_and_back(cluster: LocalCluster, stage: int) -> None:
    own, donor = (StageId(instance=instance, stage=stage) for instance in range(2))
    wanted = asks(3, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=3 * stage)
    url = cluster.engines[0].url
    expected = undisturbed(url, wanted)
    wait_all_kept(cluster, 0)

    def there_and_back() -> None:
        with published(cluster, 0, leaving=(own,)):
            wait_state(cluster, 0, lambda state: state.stages[stage].served_by == donor, "the donor at work")
        wait_state(cluster, 0, lambda state: state.on_own_stages, "the own stage at work")

    (streams,) = with_kill(url, wanted, there_and_back, after_tokens=15)
    assert compared(expected, streams) == delivered(wanted)
    for kind in (RecoveryKind.MOVE, RecoveryKind.SWAP_BACK):
        move = last_recovery(cluster, 0, kind)
        assert (move.stages, move.requests) == ((stage,), 3)
        assert move.tokens_recomputed == 0
        assert move.tokens_kept > 3 * PROMPT_TOKENS
    assert kv_usage(url) == 0.0
