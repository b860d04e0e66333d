"""Copies of KV blocks under vLLM's V2 runner, with its kernels interpreted: what a kill costs with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, Ask, asks, compared, undisturbed, with_kill
from tests.recovery.replicas import delivered, keep_asking, last_recovery, paused, wait_all_kept

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

BLOCK = 32
PROMPT_TOKENS, OUTPUT_TOKENS = 950, 60
FLAGS = (
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-seqs", "4"),
    *("--max-num-batched-tokens", "512", "--max-model-len", "1088"),
)
INTERPRETED = Path(__file__).parent.parent / "v2_on_cpu"


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=2,
        directory=tmp_path_factory.mktemp("replicas-v2"),
        runner="v2",
        extra_flags=FLAGS,
        env={"PYTHONPATH": str(INTERPRETED)},
        limits=Limits(heartbeat_interval_seconds=0.1, heartbeat_timeout_seconds=60.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def kill_in_decode(cluster: LocalCluster, stage: int) -> tuple[list[Ask], list[list[int]]]:
    """Checks what it costs. Returns what was asked, and the right answers."""
    cluster.wait_ready(READY_SECONDS)
    wanted = asks(3, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=3 * stage, shorter=11)
    url = cluster.engines[0].url
    expected = undisturbed(url, wanted)

    def kill() -> None:
        with paused(cluster, 0, 1 - stage):
            wait_all_kept(cluster, 0, stage)
            cluster.kill_stage(0, stage)

    (streams,) = with_kill(url, wanted, kill, after_tokens=15)
    assert compared(expected, streams) == delivered(wanted)
    borrow = last_recovery(cluster, 0, RecoveryKind.BORROW)
    assert (borrow.stages, borrow.requests) == ((stage,), 3)
    assert borrow.tokens_recomputed_max < 2 * BLOCK
    assert borrow.tokens_kept > 3 * (PROMPT_TOKENS - BLOCK)
    return wanted, expected


def test_it_is_the_v2_runner_that_runs(cluster: LocalCluster) -> None:
    assert "Using V2 Model Runner" in cluster.log("stage-0.0")


def test_a_stage_that_comes_back_is_sent_the_blocks_before_it_takes_its_place(cluster: LocalCluster) -> None:
    wanted, expected = kill_in_decode(cluster, 0)
    # No more clients than are needed for one request at any time: a stage loads with low priority.
    answers = keep_asking(cluster.engines[0].url, wanted[:2], expected[:2], lambda: cluster.wait_ready(READY_SECONDS))
    assert answers >= 2
    back = last_recovery(cluster, 0, RecoveryKind.SWAP_BACK)
    assert back.stages == (0,)
    assert back.requests > 0
    assert back.tokens_kept > 0
    assert back.tokens_recomputed_max <= OUTPUT_TOKENS + BLOCK, "a prompt was computed again"


def test_a_kill_costs_no_more_than_the_last_block_and_what_is_not_kept_yet(cluster: LocalCluster) -> None:
    kill_in_decode(cluster, 1)
