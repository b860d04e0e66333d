"""Sliding windows beside full attention make several KV cache groups: nothing is replicated, and no token is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster, local_cluster
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

from tests.recovery.load import READY_SECONDS, asks, compared, merged_steps, stream_all, undisturbed, with_kill
from tests.recovery.replicas import last_recovery

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STAGES = 2
WINDOW = 48
"""Tokens: more than a block and far less than a context, so that blocks fall out of it in prompts and in outputs."""
FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS = [FULL, SLIDING, FULL, SLIDING, SLIDING, SLIDING]
"""The last stage has no full attention, so there is a group of which it has no layer."""
FLAGS = (
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "256", "--max-model-len", "1024"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, most of its layers with a window: llama's own layers have it if the config says so."""
    directory = tmp_path_factory.mktemp("models") / "windows"
    write_tiny_model(directory, TinyModel())
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_types": LAYERS, "sliding_window": WINDOW}))
    return directory


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        model,
        instances=2,
        stages=STAGES,
        directory=tmp_path_factory.mktemp("groups"),
        runner="v1",
        extra_flags=FLAGS,
        limits=Limits(heartbeat_timeout_seconds=20.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, whatever the test before did."""
    cluster.wait_ready(READY_SECONDS)
    return cluster


@pytest.mark.parametrize("stage", range(STAGES), ids=["first", "last"])
def test_streams_survive_a_killed_stage_by_computing_again(whole: LocalCluster, stage: int) -> None:
    urls = [engine.url for engine in whole.engines]
    # Prompts of several steps: blocks leave the window while a prompt is computed, at first and after the loss.
    mine, theirs = asks(4, tokens=150, prompt_tokens=300), asks(2, tokens=140, prompt_tokens=200, first=20)
    expected = [undisturbed(urls[0], mine), undisturbed(urls[1], theirs)]
    assert len({tuple(tokens[-32:]) for tokens in expected[0]}) == len(mine), "outputs ignore the requests"

    streams, beside = with_kill(
        urls[0], mine, lambda: whole.kill_stage(0, stage), after_tokens=60, beside=[(urls[1], theirs)]
    )

    assert compared(expected[0], streams) == Tokens(delivered=4 * 150)
    assert compared(expected[1], beside) == Tokens(delivered=2 * 140)
    borrow = last_recovery(whole, 0, RecoveryKind.BORROW)
    assert (borrow.stages, borrow.requests) == ((stage,), len(mine))
    assert borrow.tokens_recomputed > 4 * 300
    assert borrow.tokens_kept == 0
    whole.wait_ready(READY_SECONDS)
    assert compared(expected[0], asyncio.run(stream_all(urls[0], mine))) == Tokens(delivered=4 * 150)


def test_a_donor_runs_steps_of_both_tenants_in_one_forward(whole: LocalCluster) -> None:
    merged = merged_steps(whole, (1, 1), lambda: whole.kill_stage(0, 1), tokens=100, prompt_tokens=300)
    assert merged > 0


def test_the_state_says_why_no_copies_are_kept(whole: LocalCluster) -> None:
    state = whole.engine_state(0)
    assert state is not None
    assert len(state.replication) == STAGES
    for place in state.replication:
        assert (place.supported, place.healthy, place.kept_by, place.sealed_blocks) == (False, False, None, 0)
        assert "KV cache groups: only models with one are replicated yet" in place.message
