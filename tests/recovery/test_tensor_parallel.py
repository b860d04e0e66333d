"""kill -9 of one of a stage's tensor-parallel ranks: the stage ends as one, and every stream goes on all the same."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.crd import WeightsSource
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import Limits
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster, local_cluster
from resilientllm_cli.supervise import warden

from tests.recovery.load import READY_SECONDS, asks, compared, stream_all, undisturbed, with_kill

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

INSTANCES, STAGES, RANKS = 2, 2, 2
"""Two stages, since only a later one shares hidden states among its ranks, and only an earlier one sends them once."""
FLAGS = (
    *("--kv-cache-memory-bytes", str(32 * 2**20), "--max-num-seqs", "8"),
    *("--max-num-batched-tokens", "512", "--max-model-len", "1024"),
)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(
        tiny_model,
        instances=INSTANCES,
        stages=STAGES,
        tensor_parallel_size=RANKS,
        directory=tmp_path_factory.mktemp("tp"),
        runner="v1",
        extra_flags=FLAGS,
        weights=WeightsSource.TWIN,
        limits=Limits(heartbeat_timeout_seconds=20.0),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, whatever the test before did."""
    cluster.wait_ready(READY_SECONDS)
    return cluster


def command_line(pid: int | None) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_the_state_file_lists_every_rank_with_its_process(whole: LocalCluster) -> None:
    entries = json.loads(whole.files.state.read_text())["stages"]
    assert [(entry["instance"], entry["stage"], entry["rank"]) for entry in entries] == [
        (instance, stage, rank) for instance in range(INSTANCES) for stage in range(STAGES) for rank in range(RANKS)
    ]
    assert len({entry["pid"] for entry in entries}) == len(entries)
    assert len({entry["address"] for entry in entries}) == INSTANCES * STAGES, "one address for all ranks of a stage"
    for entry in entries:
        follows = [word for word in command_line(entry["pid"]) if word.startswith("--follow=")]
        assert [word.split(":")[0] for word in follows] == ([f"--follow={entry['rank']}"] if entry["rank"] else [])


def test_what_ranks_share_has_no_name_that_could_outlive_them(whole: LocalCluster) -> None:
    """They are killed, not stopped, when one of them ends: nobody would be left to remove it from memory."""
    for rank in range(RANKS):
        maps = Path(f"/proc/{whole.stage(0, 0, rank).pid}/maps").read_text()
        shared = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/dev/shm/" in line}
        assert len(shared) >= RANKS + 1, "a part for each rank, and a queue"
        assert all(path.endswith(" (deleted)") for path in shared), shared


@pytest.mark.parametrize("stage", range(STAGES), ids=["first", "last"])
def test_a_killed_rank_ends_its_stage_and_no_stream(whole: LocalCluster, stage: int) -> None:
    mine, theirs = asks(4, tokens=140, shorter=15), asks(2, tokens=130, first=20, shorter=30)
    urls = [engine.url for engine in whole.engines]
    expected = [undisturbed(urls[0], mine), undisturbed(urls[1], theirs)]
    before = [whole.stage(0, stage, rank) for rank in range(RANKS)]
    recoveries = whole.engine_state(0)
    assert recoveries is not None
    came_from = f"weights came from twin {whole.stage(1, stage).address}"
    came_before = whole.log(f"stage-0.{stage}").count(came_from)  # its twin may have been the first to start, too

    streams, beside = with_kill(
        urls[0], mine, lambda: whole.kill_stage(0, stage, rank=1), after_tokens=30, beside=[(urls[1], theirs)]
    )

    assert compared(expected[0], streams) == Tokens(delivered=140 + 125 + 110 + 95)
    assert compared(expected[1], beside) == Tokens(delivered=130 + 100)
    state = whole.engine_state(0)
    assert state is not None
    borrow = next(recovery for recovery in reversed(state.recoveries) if recovery.kind is RecoveryKind.BORROW)
    assert state.recoveries_total > recoveries.recoveries_total
    assert borrow.stages == (stage,)
    assert borrow.requests == len(mine)
    assert before[0].pid is not None
    assert warden.members({before[0].pid}) == [], "no rank is left of the stage that ended"

    whole.wait_ready(READY_SECONDS)
    after = [whole.stage(0, stage, rank) for rank in range(RANKS)]
    assert {entry.pid for entry in after}.isdisjoint({None, *(entry.pid for entry in before)})
    assert [entry.restarts for entry in after] == [entry.restarts + 1 for entry in before]
    assert compared(expected[0], asyncio.run(stream_all(urls[0], mine))) == Tokens(delivered=140 + 125 + 110 + 95)
    came = whole.log(f"stage-0.{stage}").count(came_from) - came_before
    assert came == RANKS, "each rank has its own, from the rank of its number"


def test_a_stage_that_gets_sigterm_is_left_before_it_ends_with_all_its_ranks(whole: LocalCluster) -> None:
    """Without copies requests are computed again, but no token is late for want of a stage."""
    wanted = asks(3, tokens=140, first=40)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    pids = {whole.stage(0, 1, rank).pid for rank in range(RANKS)}
    leader = whole.stage(0, 1).pid
    assert leader is not None

    def terminate() -> None:
        os.kill(leader, signal.SIGTERM)
        whole.wait_for(
            lambda now: pids.isdisjoint(entry.pid for entry in now.stages), READY_SECONDS, "all its ranks to have ended"
        )

    (streams,) = with_kill(url, wanted, terminate, after_tokens=30)
    assert compared(expected, streams) == Tokens(delivered=3 * 140)
    state = whole.engine_state(0)
    assert state is not None
    move = next(recovery for recovery in reversed(state.recoveries) if recovery.kind is not RecoveryKind.SWAP_BACK)
    assert (move.kind, move.reason, move.stages) == (RecoveryKind.MOVE, None, (1,))
    assert move.tokens_recomputed > 0
    assert warden.members({leader}) == []
