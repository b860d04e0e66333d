"""Copies of KV blocks under vLLM's V1 runner: what a kill costs with them, and what becomes of them in bad times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits, ReplicationMode, StageId
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, Ask, asks, compared, undisturbed, with_kill
from tests.recovery.relay import Relay
from tests.recovery.replicas import (
    all_kept,
    delivered,
    keep_asking,
    last_recovery,
    paused,
    plan_of,
    published,
    reached_at,
    recoveries,
    wait_all_kept,
    wait_state,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STAGES = 3
BLOCK = 32
PROMPT_TOKENS, OUTPUT_TOKENS = 1000, 200
FLAGS = ("--kv-cache-memory-bytes", str(128 * 2**20), "--max-num-batched-tokens", "512", "--max-model-len", "2048")
SLOW_BYTES_PER_SECOND = 128 * 2**10
"""Four blocks."""


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=STAGES,
        directory=tmp_path_factory.mktemp("replicas-v1"),
        runner="v1",
        extra_flags=FLAGS,
        limits=Limits(heartbeat_interval_seconds=0.1, heartbeat_timeout_seconds=60.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, whatever the test before did."""
    cluster.wait_ready(READY_SECONDS)
    return cluster


@pytest.fixture
def relay(whole: LocalCluster) -> Iterator[Relay]:
    """Before stage 1.1 as instance 0 sees it."""
    keeper = StageId(instance=1, stage=1)
    with (
        Relay(whole.endpoints.stages[keeper].address) as between,
        published(whole, 0, **reached_at(plan_of(whole, 0), keeper, between.address)),
    ):
        yield between


def kill_in_decode(cluster: LocalCluster, stage: int) -> tuple[list[Ask], list[list[int]]]:
    """Checks what it costs. Returns what was asked, and the right answers."""
    wanted = asks(6, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=10 * stage, shorter=17)
    url = cluster.engines[0].url
    expected = undisturbed(url, wanted)
    lag_tokens = 0

    def kill() -> None:
        nonlocal lag_tokens
        with paused(cluster, 0, (stage + 1) % STAGES):
            lag_tokens = wait_all_kept(cluster, 0, stage).replication[stage].lag_tokens
            cluster.kill_stage(0, stage)

    (streams,) = with_kill(url, wanted, kill, after_tokens=60)
    assert compared(expected, streams) == delivered(wanted)
    borrow = last_recovery(cluster, 0, RecoveryKind.BORROW)
    assert (borrow.stages, borrow.requests) == ((stage,), 6)
    # Besides what is open, a block that was sealed a moment ago, which stages are told of every 20 ms.
    assert borrow.tokens_recomputed_max < 2 * BLOCK + lag_tokens
    assert borrow.tokens_kept > 6 * PROMPT_TOKENS
    return wanted, expected


@pytest.mark.parametrize("stage", [0, 2], ids=["first", "last"])
def test_a_kill_costs_no_more_than_the_last_block_and_what_is_not_kept_yet(whole: LocalCluster, stage: int) -> None:
    kill_in_decode(whole, stage)


def test_a_stage_that_comes_back_is_sent_the_blocks_before_it_takes_its_place(whole: LocalCluster) -> None:
    wanted, expected = kill_in_decode(whole, 1)
    # No more clients than are needed for one request at any time: a stage loads with low priority.
    answers = keep_asking(whole.engines[0].url, wanted[:2], expected[:2], lambda: whole.wait_ready(READY_SECONDS))
    assert answers >= 2
    back = last_recovery(whole, 0, RecoveryKind.SWAP_BACK)
    assert (back.stages, back.served_by) == ((1,), tuple(StageId(instance=0, stage=stage) for stage in range(STAGES)))
    assert back.requests > 0
    assert back.tokens_kept > 0
    assert back.tokens_recomputed_max <= OUTPUT_TOKENS + BLOCK, "a prompt was computed again"


def test_without_replication_everything_is_computed_again(whole: LocalCluster) -> None:
    wanted = asks(6, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=40)
    url = whole.engines[0].url
    with published(whole, 0, replication=ReplicationMode.NONE):
        expected = undisturbed(url, wanted)
        (streams,) = with_kill(url, wanted, lambda: whole.kill_stage(0, 1), after_tokens=60)
        assert compared(expected, streams) == delivered(wanted)
        borrow = last_recovery(whole, 0, RecoveryKind.BORROW)
        assert borrow.tokens_kept == 0
        assert borrow.tokens_recomputed >= sum(len(ask.prompt) for ask in wanted)
        whole.wait_ready(READY_SECONDS)


def test_serving_goes_on_when_the_path_to_the_keeper_is_slow_and_then_cut(whole: LocalCluster, relay: Relay) -> None:
    wanted = asks(6, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=50)
    url = whole.engines[0].url
    before = recoveries(whole, 0)
    wait_state(whole, 0, lambda state: state.replication[1].healthy, "copies through the relay")
    relay.bytes_per_second = SLOW_BYTES_PER_SECOND
    expected = undisturbed(url, wanted)
    assert wait_state(whole, 0, lambda state: state.requests_running == 0, "no request").replication[1].lag_tokens > 0

    def cut() -> None:
        assert relay.cut() > 0, "nothing was on its way"

    (streams,) = with_kill(url, wanted, cut, after_tokens=20)
    assert compared(expected, streams) == delivered(wanted)
    state = wait_state(whole, 0, lambda state: not state.replication[1].healthy, "a path that is not healthy")
    assert state.replication[1].message == "stage 0.1 connects to 1.1"
    assert state.replication[1].kept_by == StageId(instance=1, stage=1)
    assert state.replication[1].stored_blocks < state.replication[1].sealed_blocks

    relay.bytes_per_second = float("inf")
    relay.mend()
    wait_all_kept(whole, 0)
    assert recoveries(whole, 0) == before


def test_serving_goes_on_when_the_keeper_dies_in_mid_transfer_and_what_it_kept_is_kept_again(
    whole: LocalCluster, relay: Relay
) -> None:
    wanted = asks(6, tokens=OUTPUT_TOKENS, prompt_tokens=PROMPT_TOKENS, first=60)
    url = whole.engines[0].url
    before = recoveries(whole, 0)
    wait_state(whole, 0, lambda state: state.replication[1].healthy, "copies through the relay")
    relay.bytes_per_second = SLOW_BYTES_PER_SECOND
    expected = undisturbed(url, wanted)
    assert wait_state(whole, 0, lambda state: state.requests_running == 0, "no request").replication[1].lag_tokens > 0

    (streams,) = with_kill(url, wanted, lambda: whole.kill_stage(1, 1), after_tokens=20)
    assert compared(expected, streams) == delivered(wanted)
    state = wait_state(whole, 0, lambda state: not state.replication[1].healthy, "a keeper that is gone")
    assert state.replication[1].kept_by is None
    assert "no other stage 1 can keep copies" in state.replication[1].message
    wait_state(whole, 0, lambda state: all(all_kept(state.replication[place]) for place in (0, 2)), "the other keepers")
    relay.bytes_per_second = float("inf")
    whole.wait_ready(READY_SECONDS)
    wait_all_kept(whole, 0)
    assert recoveries(whole, 0) == before

    (streams,) = with_kill(url, wanted, lambda: whole.kill_stage(0, 1), after_tokens=20)
    assert compared(expected, streams) == delivered(wanted)
    assert last_recovery(whole, 0, RecoveryKind.BORROW).tokens_kept >= 6 * (PROMPT_TOKENS - BLOCK)
