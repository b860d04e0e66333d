"""Planned moves under vLLM's V1 runner: nothing is computed again, and every stream goes on with its own tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import Limits, StageId
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, asks, compared, undisturbed, with_kill
from tests.recovery.replicas import (
    delivered,
    keep_asking,
    kv_usage,
    last_recovery,
    paused,
    publish,
    published,
    recoveries,
    wait_all_kept,
    wait_state,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STAGES = 2
FLAGS = ("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-batched-tokens", "512", "--max-model-len", "2048")
OWN, DONOR = StageId(instance=0, stage=1), StageId(instance=1, stage=1)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=2,
        stages=STAGES,
        directory=tmp_path_factory.mktemp("moves-v1"),
        runner="v1",
        extra_flags=FLAGS,
        limits=Limits(heartbeat_interval_seconds=0.1, heartbeat_timeout_seconds=60.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, and all that they have sealed is kept."""
    cluster.wait_ready(READY_SECONDS)
    for engine in cluster.engines:
        undisturbed(engine.url, asks(1, tokens=40, first=90))
    for instance in range(2):
        wait_all_kept(cluster, instance)
    return cluster


def wait_served_by(cluster: LocalCluster, stage: StageId) -> None:
    wait_state(
        cluster, 0, lambda state: state.stages[stage.stage].served_by == stage, f"stage {stage} at work", READY_SECONDS
    )


def assert_nothing_was_lost(move: Recovery, requests: int) -> None:
    assert (move.requests, move.reason, move.stages) == (requests, None, (1,))
    assert move.tokens_recomputed == 0
    assert move.tokens_kept > 0
    assert {"hold", "flush", "fence", "stitch", "rollBack", "resume", "total"} <= move.phases_ms.keys()


def test_two_tenants_are_moved_together_and_apart_again_and_nothing_is_computed_again(whole: LocalCluster) -> None:
    mine, theirs = asks(4, tokens=700, prompt_tokens=200), asks(3, tokens=700, prompt_tokens=150, first=20)
    urls = [engine.url for engine in whole.engines]
    expected = [undisturbed(urls[0], mine), undisturbed(urls[1], theirs)]

    def there_and_back() -> None:
        with published(whole, 0, leaving=(OWN,)):
            wait_served_by(whole, DONOR)
        wait_served_by(whole, OWN)

    streams, beside = with_kill(urls[0], mine, there_and_back, after_tokens=40, beside=[(urls[1], theirs)])
    assert compared(expected[0], streams) == delivered(mine)
    assert compared(expected[1], beside) == delivered(theirs)
    for kind in (RecoveryKind.MOVE, RecoveryKind.SWAP_BACK):
        move = last_recovery(whole, 0, kind)
        assert_nothing_was_lost(move, requests=4)
        assert move.tokens_kept > 4 * 200
    assert [kv_usage(url) for url in urls] == [0.0, 0.0]


def test_prompts_that_are_half_computed_are_moved_as_they_are(whole: LocalCluster) -> None:
    wanted = asks(6, tokens=60, prompt_tokens=1500, first=30)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    whole.engine_state(0)
    before = recoveries(whole, 0)

    def move() -> None:
        publish(whole, 0, leaving=(OWN,))
        wait_served_by(whole, DONOR)

    (streams,) = with_kill(url, wanted, move, after_tokens=0)
    publish(whole, 0, leaving=())
    assert compared(expected, streams) == delivered(wanted)
    assert recoveries(whole, 0) > before
    assert last_recovery(whole, 0, RecoveryKind.MOVE).tokens_recomputed == 0


def test_a_stage_that_gets_sigterm_is_left_then_ends_and_its_successor_is_moved_to(whole: LocalCluster) -> None:
    wanted = asks(4, tokens=700, prompt_tokens=200, first=40)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    pid = whole.stage(0, 1).pid
    assert pid is not None

    def terminate() -> None:
        os.kill(pid, signal.SIGTERM)
        whole.wait_for(
            lambda now: all(entry.pid != pid for entry in now.stages), READY_SECONDS, "the stage to have ended"
        )

    (streams,) = with_kill(url, wanted, terminate, after_tokens=40)
    assert compared(expected, streams) == delivered(wanted)
    assert_nothing_was_lost(last_recovery(whole, 0, RecoveryKind.MOVE), requests=4)
    assert whole.log("stage-0.1").count("Traceback") == 0

    answers = keep_asking(url, wanted[:2], expected[:2], lambda: whole.wait_ready(READY_SECONDS))
    assert answers >= 2
    back = last_recovery(whole, 0, RecoveryKind.SWAP_BACK)
    assert back.tokens_recomputed == 0
    assert kv_usage(url) == 0.0


def begin_a_move_that_waits(cluster: LocalCluster) -> None:
    """To a newcomer that does not answer."""
    publish(cluster, 0, leaving=(OWN,))
    wait_state(cluster, 0, lambda state: state.message == "moves to 0.0, 1.1", "a move that has begun")


def test_streams_survive_a_kill_of_the_stage_that_is_just_being_left(whole: LocalCluster) -> None:
    wanted = asks(4, tokens=400, prompt_tokens=200, first=50)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)

    def kill() -> None:
        with paused(whole, 1, 1):
            begin_a_move_that_waits(whole)
            whole.kill_stage(0, 1)

    (streams,) = with_kill(url, wanted, kill, after_tokens=40)
    publish(whole, 0, leaving=())
    assert compared(expected, streams) == delivered(wanted)
    borrow = last_recovery(whole, 0, RecoveryKind.BORROW)
    assert borrow.reason is LossReason.RESET
    assert borrow.requests == 4
    whole.wait_ready(READY_SECONDS)
    assert kv_usage(url) == 0.0


def test_streams_go_on_where_they_are_when_the_newcomer_is_killed_in_the_move(whole: LocalCluster) -> None:
    wanted = asks(4, tokens=400, prompt_tokens=200, first=60)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    before = recoveries(whole, 0)

    def kill() -> None:
        newcomer = whole.stage(1, 1).pid
        assert newcomer is not None
        os.kill(newcomer, signal.SIGSTOP)
        begin_a_move_that_waits(whole)
        whole.kill_stage(1, 1)
        publish(whole, 0, leaving=())

    (streams,) = with_kill(url, wanted, kill, after_tokens=40)
    assert compared(expected, streams) == delivered(wanted)
    assert recoveries(whole, 0) == before, "nothing has changed hands"
    whole.wait_ready(READY_SECONDS)
    assert kv_usage(url) == 0.0
