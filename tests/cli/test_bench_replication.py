"""The benchmark of replication: what is estimated from samples, and what is reported of them."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState
from resilientllm_api.plan import ReplicationMode, StageId
from resilientllm_cli.bench import cpu_time, overhead_run, replication_report
from resilientllm_cli.bench.context_run import ContextRun, delivered_at_kill
from resilientllm_cli.bench.cpu_time import ThreadTime
from resilientllm_cli.bench.estimates import mean_ratio, slope
from resilientllm_cli.bench.kill_run import Disturbed, KillRun
from resilientllm_cli.bench.measure import quick
from resilientllm_cli.bench.overhead_run import LagSamples, Pair, SteadyRun, latency, order
from resilientllm_cli.bench.plan_switch import settled
from resilientllm_cli.bench.replication_report import ReplicationMeasured
from resilientllm_cli.bench.settings import NO_REPLICATION, ReplicationSettings, Settings, fresh_prompt
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.main import run
from resilientllm_cli.streams import Stream
from resilientllm_cli.tiny_model import TinyModel

RATIOS = st.floats(0.2, 5.0)
ON = SteadyRun(
    inter_token_latency_mean=0.011,
    inter_token_latency_p99=0.030,
    throughput=990.0,
    steps=300,
    tokens=1000,
    sent_blocks=60,
    sent_bytes=60 * 3200,
    cpu_seconds={"stage 0.0": 1.0, "stage 0.1": 1.0, "stage 1.0": 0.1, "engine core 0": 0.5},
    replication_seconds={"sender": 0.02, "answers": 0.005, "keeper": 0.01},
    seconds=2.0,
)
OFF = replace(
    ON, inter_token_latency_mean=0.010, throughput=1000.0, sent_blocks=0, sent_bytes=0, replication_seconds={}
)


def context_run(context: int, stall: float, recomputed: int, lag: tuple[int, ...] = ()) -> ContextRun:
    run = KillRun(0, (stall / 2, stall), Tokens(640), (), {"total": 1000 * stall})
    return ContextRun(context, run, recomputed, lag_tokens=lag, lag_tokens_at_kill=max(lag, default=0))


def document(**parts: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(replication_report.document(ReplicationMeasured(**parts))))
    return found


# Estimates.


def test_a_ratio_that_is_always_the_same_is_certain() -> None:
    found = mean_ratio([(2.0, 1.0), (6.0, 3.0), (0.2, 0.1)])
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.0, 2.0, 2.0, 3))


@given(st.lists(st.tuples(RATIOS, RATIOS), min_size=1, max_size=20))
def test_an_interval_lies_around_its_ratio_and_turns_over_with_it(pairs: list[tuple[float, float]]) -> None:
    found, turned = mean_ratio(pairs), mean_ratio([(second, first) for first, second in pairs])
    assert found is not None and turned is not None
    assert found.low <= found.value * (1 + 1e-9)
    assert found.value <= found.high * (1 + 1e-9)
    assert (1 / turned.value, 1 / turned.high, 1 / turned.low) == pytest.approx((found.value, found.low, found.high))


def test_more_pairs_make_an_interval_narrower() -> None:
    pairs = [(1.0 + noise, 1.0) for noise in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    few, many = mean_ratio(pairs), mean_ratio(pairs * 10)
    assert few is not None and many is not None
    assert many.high - many.low < (few.high - few.low) / 2


def test_nothing_is_estimated_from_nothing() -> None:
    assert mean_ratio([]) is None
    assert slope([]) is None
    assert slope([(1.0, 0.1), (1.0, 0.2), (1.0, 0.3)]) is None
    assert slope([(1.0, 0.1), (2.0, 0.2)]) is None, "its interval would be a point"


@given(st.floats(-3, 3), st.floats(-3, 3), st.sets(st.integers(0, 50), min_size=3, max_size=8))
def test_the_slope_of_a_line_is_its_own(rise: float, start: float, places: set[int]) -> None:
    found = slope([(place, start + rise * place) for place in places])
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((rise, rise, rise), abs=1e-6)


def test_noise_that_does_not_grow_has_a_slope_around_zero() -> None:
    found = slope([(x, 0.1 + noise) for x in (128, 512, 1024, 4096) for noise in (-0.02, 0.0, 0.02)])
    assert found is not None
    assert found.low < 0 < found.high


# Runs.


def test_prompts_are_fresh_and_can_be_had_again() -> None:
    assert fresh_prompt(100, 7) == fresh_prompt(100, 7)
    assert len({tuple(fresh_prompt(8, salt)) for salt in range(1000)}) == 1000


def test_the_longest_context_and_its_output_fit_the_tiny_model() -> None:
    settings = ReplicationSettings()
    assert max(settings.contexts) + settings.tokens == TinyModel().max_model_len
    assert max(settings.kill_after(kill) for kill in range(100)) < settings.tokens


def test_kills_come_at_every_place_in_a_block() -> None:
    settings = ReplicationSettings()
    assert {settings.kill_after(kill) % 32 for kill in range(32)} == set(range(32))


def test_on_and_off_take_turns_at_coming_first() -> None:
    on, off = ReplicationMode.RING, ReplicationMode.NONE
    assert list(order(3)) == [(on, off), (off, on), (on, off)]


def test_a_quick_run_has_few_of_each_and_of_no_part_that_was_not_asked_for(tmp_path: Path) -> None:
    settings = Settings(tmp_path, tmp_path, tmp_path, tmp_path)
    assert quick(settings).replication.contexts == (128, 3936)
    assert quick(replace(settings, kills=0, replication=NO_REPLICATION)).replication == NO_REPLICATION
    assert not NO_REPLICATION.needs_cluster
    assert quick(replace(settings, kills=0)).kills == 0


@pytest.mark.parametrize(("steps", "made"), [([301], 301), ([602, 301], 301), ([602, 903, 604, 606], 602)])
def test_a_run_in_groups_is_made_again_a_few_times(
    monkeypatch: pytest.MonkeyPatch, steps: list[int], made: int
) -> None:
    coming = iter(steps)
    monkeypatch.setattr(overhead_run, "_run", lambda *_: replace(ON, steps=next(coming)))
    cluster: Any = None
    found = overhead_run._run_in_one_batch(cluster, ReplicationSettings(), ReplicationMode.RING, itertools.count())
    assert found.steps == made
    assert next(coming, None) is None


def test_latency_is_of_all_gaps_of_all_streams() -> None:
    streams = [Stream(0, [1, 2, 3], [0.0, 1.0, 2.0]), Stream(1, [1, 2], [0.0, 7.0])]
    assert latency(streams) == (3.0, 7.0)


def test_what_a_restart_computes_again_is_what_was_delivered_before_the_kill() -> None:
    streams = [Stream(0, [1, 2], [0.0, 9.0]), Stream(1, [1, 2, 3], [0.0, 1.0, 9.0])]
    assert delivered_at_kill(Disturbed(streams, killed_at_seconds=5.0, ended_at_seconds=9.0)) == 2


def test_a_restart_counts_only_if_a_client_had_to_ask_again() -> None:
    late = Stream(0, [1, 2], [0.0, 9.0], finish_reason="length")
    assert not Disturbed([late], killed_at_seconds=5.0, ended_at_seconds=9.0).cut
    assert Disturbed([late, replace(late, attempts=2)], killed_at_seconds=5.0, ended_at_seconds=9.0).cut


def engine_state(*places: ReplicationState) -> EngineState:
    return EngineState(instance=0, phase=EnginePhase.SERVING, replication=places)


def test_copies_are_complete_when_every_place_keeps_them_and_none_lags() -> None:
    place = ReplicationState(stage=0, kept_by=StageId(instance=1, stage=0), healthy=True)
    ring, none = ReplicationMode.RING, ReplicationMode.NONE
    assert settled(engine_state(place, place), ring)
    assert not settled(engine_state(place, place.model_copy(update={"lag_tokens": 32})), ring)
    assert not settled(engine_state(place.model_copy(update={"healthy": False})), ring)
    assert not settled(engine_state(), ring)
    assert settled(engine_state(), none)
    assert not settled(engine_state(place), none)


# CPU time.


def test_a_thread_that_became_nice_is_told_by_its_niceness_and_its_time() -> None:
    """As the kernel says it, of a thread of this process."""
    looked, done = threading.Event(), threading.Event()
    nice: list[int] = []

    def replicate() -> None:
        nice.append(threading.get_native_id())
        os.setpriority(os.PRIO_PROCESS, nice[0], cpu_time.REPLICATION_NICENESS)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        done.set()
        looked.wait()

    thread = threading.Thread(target=replicate)
    thread.start()
    assert done.wait(60)
    found = cpu_time.threads("stage 0.0", os.getpid())
    looked.set()
    thread.join()
    [replicating] = [each for each in found if each.replicates]
    assert replicating.thread == nice[0]
    assert replicating.seconds >= 0.01
    assert len(found) > 1


def test_niceness_matches_that_of_the_worker() -> None:
    from resilientllm_worker.replication.priority import NICENESS

    assert cpu_time.REPLICATION_NICENESS == NICENESS


def thread(process: str, number: int, niceness: int, seconds: float) -> ThreadTime:
    return ThreadTime(process, 100, number, niceness, seconds)


def test_a_thread_counts_from_its_start_or_from_the_look_before() -> None:
    before = [thread("stage 0.0", 1, 0, 5.0), thread("stage 0.0", 2, 0, 1.0)]
    after = [thread("stage 0.0", 1, 0, 7.0), thread("stage 0.0", 3, 10, 0.5)]
    assert [each.seconds for each in cpu_time.spent(before, after)] == [2.0, 0.5]
    assert cpu_time.by_process(cpu_time.spent(before, after)) == {"stage 0.0": 2.0}


def test_the_elder_of_two_sending_threads_is_the_sender() -> None:
    times = [
        thread("stage 0.0", 9, 10, 0.1),
        thread("stage 0.0", 8, 10, 0.7),
        thread("stage 0.0", 1, 0, 9.0),
        thread("stage 0.1", 18, 10, 0.2),
        thread("stage 1.0", 7, 10, 0.4),
    ]
    assert cpu_time.by_task(times, sending=0, keeping=1) == pytest.approx(
        {"sender": 0.9, "answers": 0.1, "keeper": 0.4}
    )


# The document.


def test_the_document_has_the_promised_fields() -> None:
    found = document(
        block_tokens=32,
        runs={
            ReplicationMode.RING: [context_run(128, 0.10, 30, (0, 32, 0)), context_run(4000, 0.12, 40, (0, 0, 64))],
            ReplicationMode.NONE: [
                context_run(128, 0.2, 180),
                context_run(4000, 2.0, 4050),
                context_run(4000, 3.0, 4060),
            ],
        },
        restart=[context_run(128, 40.0, 190)],
        pairs=[Pair(ON, OFF), Pair(ON, OFF)],
        lags=[LagSamples([0, 0, 32, 64], [0.0, 0.0, 0.01, 0.02])],
    )
    assert found["block_size"] == 32
    promised = {
        "context_tokens": 4000,
        "stall_seconds_p50": 2.5,
        "stall_seconds_p99": 3.0,
        "tokens_recomputed_per_request_max": 4060,
        "lag_tokens_p99": None,
        "n": 2,
    }
    assert {name: found["without"][1][name] for name in promised} == promised
    assert [each["context_tokens"] for each in found["with_replicas"]] == [128, 4000]
    assert found["with_replicas"][1]["lag_tokens_p99"] == 64
    assert found["restart"][0]["tokens_recomputed_per_request_max"] == 190
    slopes = found["stall_slope_seconds_per_1000_tokens"]
    assert slopes["without"]["value"] == pytest.approx((2.5 - 0.2) / 3.872)
    assert slopes["with_replicas"] is slopes["restart"] is None
    overhead = found["overhead"]
    assert overhead["inter_token_latency_mean"]["value"] == pytest.approx(1.1)
    assert overhead["throughput"]["value"] == pytest.approx(0.99)
    assert {"low", "high", "n", "on", "off"} <= overhead["inter_token_latency_p99"].keys()
    replication_report.table(found)


def test_a_pair_whose_streams_were_batched_otherwise_gives_samples_and_no_ratio() -> None:
    grouped = replace(ON, steps=600, throughput=500.0)
    found = document(block_tokens=32, pairs=[Pair(ON, OFF), Pair(grouped, OFF), Pair(grouped, replace(OFF, steps=601))])
    throughput = found["overhead"]["throughput"]
    assert throughput["n"] == 2
    assert throughput["value"] == pytest.approx((0.99 * 0.5) ** 0.5)
    assert throughput["all_pairs"]["n"] == 3
    assert throughput["on"] == [990.0, 500.0, 500.0]
    assert found["overhead"]["steps"] == {"on": [300, 600, 600], "off": [300, 300, 601]}


def test_cpu_time_and_bytes_are_of_the_runs_with_copies() -> None:
    found = document(block_tokens=32, pairs=[Pair(ON, OFF), Pair(ON, OFF)])
    sender = found["cpu"]["replication"]["sender"]
    assert sender["per_block"] == pytest.approx(0.02 / 60)
    assert sender["per_token"] == pytest.approx(0.02 / 1000)
    assert sender["share_of_a_core"] == pytest.approx(0.01)
    assert found["cpu"]["replication"]["all"]["per_block"] == pytest.approx(0.035 / 60)
    assert found["cpu"]["others_on_over_off"]["engine core 0"]["value"] == pytest.approx(1.0)
    assert found["cpu"]["all_on_over_off"]["value"] == pytest.approx((2.6 + 0.035) / 2.6)
    # Two places of 100 bytes a token.
    assert found["bytes"]["kv_bytes_per_token"] == 200
    assert found["bytes"]["replicated_over_made"] == pytest.approx(60 * 3200 / (200 * 1000))


def test_lag_is_told_with_its_tail() -> None:
    lag = document(lags=[LagSamples([0, 0, 32], [0.0, 0.0, 0.01]), LagSamples([96], [0.04])])["lag"]
    assert lag["tokens"] == {"n": 4, "p50": 16, "p90": 96, "p99": 96, "max": 96, "share_without_lag": 0.5}
    assert lag["seconds"]["max"] == 0.04


def test_what_was_not_measured_is_empty_or_null() -> None:
    found = document()
    assert found["with_replicas"] == found["without"] == found["restart"] == []
    assert found["overhead"]["throughput"]["value"] is None
    assert found["cpu"] == found["bytes"] == {}
    assert found["lag"]["tokens"]["p99"] is None
    replication_report.table(found)


# The picture.


@pytest.fixture
def result(tmp_path: Path) -> Path:
    runs = {
        ReplicationMode.RING: [context_run(context, 0.1, 30, (0,)) for context in (128, 4000)],
        ReplicationMode.NONE: [context_run(context, context / 1000, context) for context in (128, 4000)],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"replication": document(runs=runs, restart=[context_run(128, 40.0, 190)])}))
    return path


def test_a_result_is_drawn_and_drawn_alike_again(result: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "folder" / "first.svg", tmp_path / "second.svg"
    for picture in (first, second):
        assert run(["bench", "plot", str(result), "-o", str(picture)]) == 0
    assert first.read_text().startswith("<?xml")
    assert first.read_bytes() == second.read_bytes()


def test_a_file_without_the_figures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text("{}")
    assert run(["bench", "plot", str(path)]) == 2
    assert "must be a result of the benchmark" in capsys.readouterr().err
