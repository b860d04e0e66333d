"""Stages that die, stop or hang under vLLM's V1 runner: every stream goes on with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from resilientllm_api.engine_state import EnginePhase, EngineState, LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import Limits, StageId
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local import observe
from resilientllm_cli.local.cluster import LocalCluster, local_cluster
from resilientllm_cli.streams import Stream

from tests.recovery import stale_engine
from tests.recovery.load import READY_SECONDS, asks, compared, merged_steps, stream_all, undisturbed, with_kill
from tests.recovery.stuck_stage import stages_that_can_hang

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

WAIT_FOR_DONOR_SECONDS = 6.0
SICK_AFTER_SECONDS = 3.0
STAGES = 3
FLAGS = ("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-batched-tokens", "512", "--max-model-len", "2048")


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("v1")
    with local_cluster(
        tiny_model,
        instances=2,
        stages=STAGES,
        directory=directory,
        runner="v1",
        extra_flags=FLAGS,
        limits=Limits(wait_for_donor_seconds=WAIT_FOR_DONOR_SECONDS, sick_after_seconds=SICK_AFTER_SECONDS),
        executables=stages_that_can_hang(directory),
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


@pytest.fixture
def whole(cluster: LocalCluster) -> LocalCluster:
    """Every instance on its own stages, whatever the test before did."""
    cluster.wait_ready(READY_SECONDS)
    return cluster


def state_of(cluster: LocalCluster, instance: int) -> EngineState:
    state = cluster.engine_state(instance)
    assert state is not None
    return state


@pytest.mark.parametrize("stage", range(STAGES), ids=["first", "middle", "last"])
def test_streams_survive_a_stage_killed_in_decode(whole: LocalCluster, stage: int) -> None:
    wanted = asks(6, tokens=250)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    before = state_of(whole, 0).recoveries_total
    (streams,) = with_kill(url, wanted, lambda: whole.kill_stage(0, stage), after_tokens=60)
    assert compared(expected, streams) == Tokens(delivered=6 * 250)
    state = state_of(whole, 0)
    assert state.recoveries_total > before
    borrow = next(recovery for recovery in reversed(state.recoveries) if recovery.kind is RecoveryKind.BORROW)
    assert borrow.stages == (stage,)
    assert borrow.reason in (LossReason.RESET, LossReason.NEIGHBOUR)
    assert borrow.requests == 6
    assert borrow.tokens_recomputed > 0
    assert {"fence", "stitch", "rollBack", "resume", "total"} <= borrow.phases_ms.keys()


def test_both_tenants_of_the_donor_get_their_own_tokens(whole: LocalCluster) -> None:
    mine, theirs = asks(4, tokens=250, shorter=40), asks(4, tokens=230, first=20, shorter=30)
    urls = [engine.url for engine in whole.engines]
    expected = [undisturbed(urls[0], mine), undisturbed(urls[1], theirs)]
    streams, beside = with_kill(
        urls[0], mine, lambda: whole.kill_stage(0, 1), after_tokens=40, beside=[(urls[1], theirs)]
    )
    assert compared(expected[0], streams) == Tokens(delivered=250 + 210 + 170 + 130)
    assert compared(expected[1], beside) == Tokens(delivered=230 + 200 + 170 + 140)


def test_a_donor_runs_steps_of_both_tenants_in_one_forward(whole: LocalCluster) -> None:
    merged = merged_steps(whole, (1, 1), lambda: whole.kill_stage(0, 1), tokens=150, prompt_tokens=300)
    assert merged > 0


def test_prompts_survive_a_stage_killed_in_prefill(whole: LocalCluster) -> None:
    """Prompts of several chunks, so that most of them have no token yet when the stage dies."""
    wanted = asks(6, tokens=40, prompt_tokens=1400)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    (streams,) = with_kill(url, wanted, lambda: whole.kill_stage(0, 2), after_tokens=0)
    assert compared(expected, streams) == Tokens(delivered=6 * 40)


def test_an_idle_instance_recovers_before_it_is_asked(whole: LocalCluster) -> None:
    wanted = asks(2, tokens=60)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    whole.kill_stage(0, 0)
    deadline = time.monotonic() + 10
    while (state := state_of(whole, 0)).phase is not EnginePhase.DEGRADED:
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    assert state.serving
    assert not state.on_own_stages
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == Tokens(delivered=2 * 60)


def test_what_an_engine_that_was_replaced_commands_changes_nothing(whole: LocalCluster) -> None:
    wanted = asks(6, tokens=250)
    urls = [engine.url for engine in whole.engines]
    expected = [undisturbed(url, wanted) for url in urls]
    before = [state_of(whole, instance).recoveries_total for instance in range(2)]
    refusals: list[str] = []

    def meddle() -> None:
        for stage in whole.endpoints.stages.values():
            for instance in range(2):
                refusals.extend(stale_engine.command(stage.address, whole.token, instance))

    streams, beside = with_kill(urls[0], wanted, meddle, after_tokens=60, beside=[(urls[1], wanted)])
    assert compared(expected[0], streams) == compared(expected[1], beside) == Tokens(delivered=6 * 250)
    assert [state_of(whole, instance).recoveries_total for instance in range(2)] == before
    assert len(refusals) == 2 * STAGES * 2 * 3
    assert all("older" in refusal for refusal in refusals), refusals


def signalled(cluster: LocalCluster, stage: tuple[int, int], number: int) -> None:
    pid = cluster.stage(*stage).pid
    assert pid is not None
    os.kill(pid, number)


def loss_of(cluster: LocalCluster, after: int) -> Recovery:
    """The first recovery of instance 0 from a loss, after so many of any kind."""
    state = state_of(cluster, 0)
    new = state.recoveries[len(state.recoveries) - (state.recoveries_total - after) :]
    return next(recovery for recovery in new if recovery.reason is not None)


def test_a_stopped_stage_is_lost_and_comes_back_into_its_place_when_it_goes_on(whole: LocalCluster) -> None:
    wanted = asks(6, tokens=250)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    before = state_of(whole, 0).recoveries_total
    pid = whole.stage(0, 1).pid
    try:
        (streams,) = with_kill(url, wanted, lambda: signalled(whole, (0, 1), signal.SIGSTOP), after_tokens=60)
        assert compared(expected, streams) == Tokens(delivered=6 * 250)
        loss = loss_of(whole, before)
        assert (loss.reason, loss.stages) == (LossReason.SILENCE, (1,))
    finally:
        signalled(whole, (0, 1), signal.SIGCONT)
    whole.wait_ready(READY_SECONDS)
    assert whole.stage(0, 1).pid == pid
    assert state_of(whole, 0).recoveries[-1].kind is RecoveryKind.SWAP_BACK
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == Tokens(delivered=6 * 250)


def status(url: str) -> int | None:
    """Of an HTTP answer; None if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_health_tells_of_a_stage_that_is_stuck_where_nobody_can_stand_in(whole: LocalCluster) -> None:
    wanted = asks(3, tokens=400)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    health = f"{url}/health"
    ready = f"http://{whole.endpoints.stages[StageId(instance=0, stage=1)].health}/readyz"
    assert (status(health), status(ready)) == (200, 200)
    waiting = {health, ready}

    def hang() -> None:
        signalled(whole, (0, 1), signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while waiting:
            assert time.monotonic() < deadline, waiting
            waiting.difference_update([each for each in waiting if status(each) == 503])
            time.sleep(0.05)

    signalled(whole, (1, 1), signal.SIGSTOP)
    try:
        (streams,) = with_kill(url, wanted, hang, after_tokens=30)
        assert all(stream.error and "Send the request again" in stream.error for stream in streams)
    finally:
        signalled(whole, (1, 1), signal.SIGCONT)
    whole.wait_ready(READY_SECONDS)
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == Tokens(delivered=3 * 400)
    assert (status(health), status(ready)) == (200, 200)


def test_a_stage_that_is_stuck_within_a_step_is_lost_although_it_has_heartbeats(whole: LocalCluster) -> None:
    stage = 2
    wanted = asks(6, tokens=250)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)
    before = state_of(whole, 0).recoveries_total
    pid = whole.stage(0, stage).pid
    donor = f"http://{whole.endpoints.stages[StageId(instance=1, stage=stage)].health}"
    steps = observe.metric(donor, "resilientllm_stage_step_seconds_count")
    (streams,) = with_kill(url, wanted, lambda: signalled(whole, (0, stage), signal.SIGUSR1), after_tokens=60)
    assert compared(expected, streams) == Tokens(delivered=6 * 250)
    loss = loss_of(whole, before)
    assert (loss.reason, loss.stages) == (LossReason.HANG, (stage,))
    assert observe.metric(url, 'resilientllm_recoveries_total{kind="Borrow",reason="StepOverdue"}') >= 1
    assert observe.metric(url, 'resilientllm_requests_by_rung_total{rung="Kept"}') >= 6
    assert observe.metric(donor, "resilientllm_stage_step_seconds_count") > steps
    whole.wait_for(lambda now: whole.stage(0, stage).pid not in (pid, None), READY_SECONDS, "it to end by itself")
    assert "stuck: a step has been running for" in whole.log(f"stage-0.{stage}")
    whole.wait_ready(READY_SECONDS)
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == Tokens(delivered=6 * 250)


def test_a_returning_stage_is_swapped_in_while_requests_run(whole: LocalCluster) -> None:
    url = whole.engines[0].url
    wanted = asks(2, tokens=1500)
    expected = undisturbed(url, wanted)
    streams: list[Stream] = []
    deadline = time.monotonic() + READY_SECONDS
    whole.kill_stage(0, 1)
    while state_of(whole, 0).on_own_stages:
        assert time.monotonic() < deadline  # the state is told ten times a second
    while not state_of(whole, 0).on_own_stages:
        assert time.monotonic() < deadline
        streams = asyncio.run(stream_all(url, wanted))
        assert compared(expected, streams) == Tokens(delivered=2 * 1500)
    last = state_of(whole, 0).recoveries[-1]
    assert last.kind is RecoveryKind.SWAP_BACK
    assert streams, "the stage was back before any request ran"


def test_without_a_donor_requests_fail_explicitly_and_service_returns(whole: LocalCluster) -> None:
    wanted = asks(3, tokens=400)
    url = whole.engines[0].url
    expected = undisturbed(url, wanted)

    def kill_both() -> None:
        whole.kill_stage(0, 1)
        whole.kill_stage(1, 1)

    started = time.monotonic()
    (streams,) = with_kill(url, wanted, kill_both, after_tokens=30)
    waited = time.monotonic() - started
    for stream, tokens in zip(streams, expected, strict=True):
        assert stream.error is not None
        assert "Send the request again" in stream.error
        assert stream.tokens == tokens[: len(stream.tokens)], "what came before the error is right"
    assert waited >= WAIT_FOR_DONOR_SECONDS
    waiting = state_of(whole, 0)
    assert waiting.phase in (EnginePhase.WAITING, EnginePhase.DEGRADED, EnginePhase.SERVING)
    whole.wait_ready(READY_SECONDS)
    assert compared(expected, asyncio.run(stream_all(url, wanted))) == Tokens(delivered=3 * 400)
