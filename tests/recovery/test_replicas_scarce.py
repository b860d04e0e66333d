"""Copies of KV blocks where little fits: a small KV cache, a pool a quarter of it; and three instances, which lose two
stages one after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits, StageId, StageRef
from resilientllm_cli.local.cluster import LocalCluster, local_cluster

from tests.recovery.load import READY_SECONDS, asks, compared, stream_all, undisturbed, with_kill
from tests.recovery.relay import Relay
from tests.recovery.replicas import (
    delivered,
    killed,
    kv_usage,
    last_recovery,
    metric,
    plan_of,
    published,
    recoveries,
    sharing,
    wait_all_kept,
    wait_state,
    with_aborts,
)

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HOME_BLOCKS, POOL_FRACTION = 192, 0.25
BLOCK_BYTES = 6 * 2 * 32 * 2 * 32 * 4
"""Of all six layers: keys and values of 32 tokens in two heads of 32 floats."""
FLAGS = (
    *("--kv-cache-memory-bytes", str(int(HOME_BLOCKS * (1 + POOL_FRACTION)) * BLOCK_BYTES)),
    *("--max-num-batched-tokens", "512", "--max-model-len", "1024"),
)
SLOW_BYTES_PER_SECOND = 5 * BLOCK_BYTES
FIRST, SECOND, THIRD = (StageId(instance=instance, stage=0) for instance in range(3))


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=3,
        stages=1,
        directory=tmp_path_factory.mktemp("replicas-scarce"),
        runner="v1",
        extra_flags=FLAGS,
        stage_flags=("--pool-fraction", str(POOL_FRACTION)),
        limits=Limits(heartbeat_interval_seconds=0.1, heartbeat_timeout_seconds=60.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, whatever the test before did."""
    cluster.wait_ready(READY_SECONDS)
    return cluster


def close_the_ring(cluster: LocalCluster) -> None:
    """Has each instance kept by the next one. An engine stays with whom it found first, which may be another."""
    for instance in range(3):
        pair = plan_of(cluster, instance).donors[0][0]
        with published(cluster, instance, donors=((pair,),)):
            wait_kept_by(cluster, instance, pair.id)


def wait_kept_by(cluster: LocalCluster, instance: int, keeper: StageId) -> None:
    wait_state(cluster, instance, lambda state: state.replication[0].kept_by == keeper, f"{keeper} as keeper")


def test_a_guest_is_kept_by_the_third_instance_which_stands_in_when_the_donor_is_lost_too(whole: LocalCluster) -> None:
    wanted = asks(2, tokens=200, prompt_tokens=250)
    urls = [engine.url for engine in whole.engines]
    expected = undisturbed(urls[0], wanted)
    close_the_ring(whole)
    for instance in range(3):
        undisturbed(urls[instance], asks(1, tokens=10, first=3))
        wait_all_kept(whole, instance)
    # The second instance would ask for the third as well once its stage is lost, and only one can have it.
    alone = tuple(donor for donor in plan_of(whole, 1).donors[0] if donor.id == FIRST)
    with published(whole, 1, donors=(alone,)):
        with killed(whole, 0, 0):
            wait_state(whole, 0, lambda state: state.stages[0].served_by == SECOND, "the donor")
            state = wait_all_kept(whole, 2)
            assert state.replication[0].kept_by == SECOND, "what the lost stage kept for others is kept elsewhere"
            state = wait_all_kept(whole, 0)
            assert state.replication[0].kept_by == THIRD, "what the guest has is kept by who is left"
            used = kv_usage(urls[0])
            assert used == pytest.approx(1 - POOL_FRACTION, abs=0.02), "the guest leaves out of use what the pool lacks"

            (streams,) = with_kill(urls[0], wanted, lambda: whole.kill_stage(1, 0), after_tokens=20)
            assert compared(expected, streams) == delivered(wanted)
            borrow = last_recovery(whole, 0, RecoveryKind.BORROW)
            assert (borrow.served_by, borrow.requests) == ((THIRD,), len(wanted))
            assert borrow.tokens_kept >= 2 * (250 - 32)
        whole.wait_ready(READY_SECONDS)
    assert kv_usage(urls[0]) == 0.0
    assert compared(expected, asyncio.run(stream_all(urls[0], wanted))) == delivered(wanted)


def test_tokens_are_right_where_blocks_are_reused_all_the_time_and_copies_come_late(whole: LocalCluster) -> None:
    """More requests than fit, at home and more so on the donor; every wave evicts what the one before left."""
    waves = [sharing(16, tokens=200, own_tokens=200, first=first) for first in (0, 40)]
    url = whole.engines[0].url
    expected = [undisturbed(url, wanted) for wanted in waves]
    assert metric(url, "num_preemptions_total") > 0
    with (
        Relay(whole.endpoints.stages[SECOND].address) as relay,
        published(whole, 0, donors=((StageRef(id=SECOND, address=relay.address),),)),
    ):
        before = recoveries(whole, 0)
        wait_state(whole, 0, lambda state: state.replication[0].healthy, "copies through the relay")
        relay.bytes_per_second = SLOW_BYTES_PER_SECOND
        for wanted, right in zip(waves, expected, strict=True):
            assert compared(right, asyncio.run(stream_all(url, wanted))) == delivered(wanted)
        state = wait_state(whole, 0, lambda state: state.requests_running == 0, "no request")
        assert state.replication[0].lag_tokens > 0
        assert state.replication[0].cancelled_blocks > 0, "no block was written again before it was sent"
        assert state.recoveries_total == before

        (streams,) = with_kill(url, waves[0], lambda: whole.kill_stage(0, 0), after_tokens=50)
        assert compared(expected[0], streams) == delivered(waves[0])
        borrow = last_recovery(whole, 0, RecoveryKind.BORROW)
        assert borrow.served_by == (SECOND,)
        whole.wait_ready(READY_SECONDS)
    assert kv_usage(url) == 0.0
    usages: list[float] = []
    (streams,) = with_kill(url, waves[1], lambda: usages.append(metric(url, "kv_cache_usage_perc")), after_tokens=100)
    assert compared(expected[1], streams) == delivered(waves[1])
    assert usages[0] > POOL_FRACTION, "the instance still has no more blocks than the pool had"


def test_nothing_is_left_of_requests_whose_clients_leave_during_a_recovery(whole: LocalCluster) -> None:
    wanted = sharing(12, tokens=200, own_tokens=200, first=80)
    aborted = (0, 3, 4, 7, 8, 11)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    streams = with_aborts(url, wanted, lambda: whole.kill_stage(0, 0), after_tokens=40, aborted=aborted)
    stay = [place for place in range(len(wanted)) if place not in aborted]
    assert compared([expected[place] for place in stay], streams) == delivered([wanted[place] for place in stay])
    assert recoveries(whole, 0) > 0
    whole.wait_ready(READY_SECONDS)
    assert [kv_usage(engine.url) for engine in whole.engines] == [0.0, 0.0, 0.0]
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == delivered(wanted)
