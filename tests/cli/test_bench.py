"""The benchmark's reasoning: when it kills, what a run is judged to have cost, what is reported."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resilientllm_cli.bench import report
from resilientllm_cli.bench.kill_run import Disturbed, KillRun, disturb, judge
from resilientllm_cli.bench.settings import BYTES, PROMPT_TOKENS, Settings, prompt, victims
from resilientllm_cli.bench.throughput import tokens_per_second
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.main import run
from resilientllm_cli.streams import OnToken, Stream

RUN = KillRun(stage=0, stalls_seconds=(0.1, 0.2), tokens=Tokens(16), errors=(), phases_ms={"total": 30.0})


def stream(index: int, arrivals: list[float], error: str | None = None) -> Stream:
    return Stream(
        index, tokens=list(range(len(arrivals))), arrivals_seconds=arrivals, finish_reason="length", error=error
    )


def test_kills_hit_first_middle_and_last_stage_alike() -> None:
    assert list(victims(7, stages=3)) == [0, 1, 2, 0, 1, 2, 0]


def test_prompts_share_no_block() -> None:
    prompts = [prompt(index) for index in range(16)]
    assert all(len(tokens) == PROMPT_TOKENS and max(tokens) < BYTES for tokens in prompts)
    assert len({tokens[0] for tokens in prompts}) == 16


async def three_tokens_each(on_token: OnToken, streams: int = 2) -> list[Stream]:
    running = [stream(index, []) for index in range(streams)]
    for _ in range(3):
        for one in running:
            await asyncio.sleep(0.01)
            one.arrivals_seconds.append(time.monotonic())
            one.tokens.append(len(one.tokens))
            on_token(one)
    return running


def test_the_kill_comes_when_every_stream_decodes() -> None:
    killed: list[float] = []
    done = asyncio.run(disturb(three_tokens_each, 2, 2, lambda: killed.append(time.monotonic())))
    assert all(one.arrivals_seconds[1] <= done.killed_at_seconds < one.arrivals_seconds[2] for one in done.streams)
    assert done.killed_at_seconds <= killed[0]


def test_streams_that_end_too_soon_are_an_error_and_no_sample() -> None:
    with pytest.raises(RuntimeError, match="expected 2 streams of 5 tokens before the kill"):
        asyncio.run(disturb(three_tokens_each, 2, 5, lambda: None))


def test_a_run_is_judged_by_gaps_after_the_kill_and_by_every_token() -> None:
    streams = [stream(0, [0, 1, 2, 5, 6]), stream(1, [0, 9, 10, 11, 12, 13])]
    judged = judge(1, Disturbed(streams, 4.5, 20), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]], {})
    assert judged.stalls_seconds == (2, 8)
    assert judged.worst_stall_seconds == 8
    assert judged.tokens == Tokens(delivered=11, lost=1)
    assert judged.errors == ()


def test_a_stream_that_broke_was_stalled_until_the_end() -> None:
    broken = stream(0, [0, 1, 2, 3], error="it broke")
    judged = judge(1, Disturbed([broken], killed_at_seconds=3.5, ended_at_seconds=20), [[0, 1, 2, 3, 4]], {})
    assert judged.stalls_seconds == (16,)
    assert judged.errors == ("it broke",)


def test_throughput_counts_decoding_of_all_streams() -> None:
    assert tokens_per_second([stream(0, [0, 1, 2]), stream(1, [0, 2, 4])]) == 1.0


def test_a_failed_stream_gives_no_throughput() -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        tokens_per_second([stream(0, [0, 1], error="it broke")])


def result(**parts: Any) -> dict[str, Any]:
    measured = report.Measured(ours=[RUN], restart=[replace(RUN, stalls_seconds=(60.0,))], tokens_per_second={})
    return report.document(replace(measured, **parts), {"machine": {"cores": 2}})


def test_the_document_has_the_promised_fields() -> None:
    rates = {"ours": [90.0, 110.0, 100.0], "stock": [80.0, 100.0, 90.0]}
    found = json.loads(json.dumps(result(tokens_per_second=rates)))
    assert found["recovery"]["ours"]["stall_seconds"] == {"n": 1, "p50": 0.2, "p99": 0.2, "samples": [0.2]}
    assert found["recovery"]["restart"]["stall_seconds"]["p50"] == 60.0
    assert found["recovery"]["ratio_p50"] == pytest.approx(300)
    assert found["throughput"]["ours_tokens_per_second"] == 100.0
    assert found["throughput"]["stock_tokens_per_second"] == 90.0
    assert found["throughput"]["ratio"] == pytest.approx(100 / 90)
    assert found["machine"] == {"cores": 2}


def test_what_was_not_measured_is_null_and_not_a_zero() -> None:
    found = result(restart=[])
    assert found["recovery"]["restart"]["stall_seconds"] == {"n": 0, "p50": None, "p99": None, "samples": []}
    assert found["recovery"]["ratio_p50"] is None
    assert found["throughput"]["ratio"] is None
    report.table(found)


def test_a_bench_without_the_stock_programs_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "--model", str(tiny_model), "--stock-programs", str(tmp_path)]) == 2
    assert "folder of stock_serve.py" in capsys.readouterr().err
    assert run(["bench", "--model", str(tiny_model), "--kills", "-1"]) == 2
    assert Settings.kills >= 20
