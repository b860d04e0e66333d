"""What replication costs while nothing fails: short runs with it on and off, in turn, on the same processes.

On, off, off, on: a drift of the machine's speed hits both alike. A pair is two runs beside each other.

With several steps in flight, streams that arrive a moment apart may be batched in two or three groups that take turns
from then on. That makes twice or three times the steps, costs far more than what is looked for, and is a matter of luck
in either mode. So such a run is made again, and a pair counts if both of its runs took as many steps.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import ReplicationMode

from resilientllm_cli.bench import cpu_time, plan_switch
from resilientllm_cli.bench.lag import LagSampler
from resilientllm_cli.bench.settings import READY_SECONDS, SERVING, SPARE, ReplicationSettings, fresh_prompt
from resilientllm_cli.bench.throughput import tokens_per_second
from resilientllm_cli.comparison import gaps, percentile
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.streams import Stream, run_streams

FIRST_SALT = 1_000_000
"""Prompts that no kill used."""
STEPS_TOLERANCE = 0.05
TRIES = 4
STEPS_METRIC = re.compile(r"^vllm:iteration_tokens_total_count\S* (\S+)", re.MULTILINE)
METRICS_SECONDS = 10.0


@dataclass(frozen=True)
class SteadyRun:
    """One run, with copies or without."""

    inter_token_latency_mean: float
    inter_token_latency_p99: float
    """Seconds, of all gaps between the tokens of a stream."""
    throughput: float
    """Tokens per second."""
    steps: int
    """Of the engine: more of them if streams were batched in groups."""
    tokens: int
    """That have KV at the end, prompts included."""
    sent_blocks: int
    sent_bytes: int
    """Of all places of the pipeline."""
    cpu_seconds: dict[str, float]
    """By process, without the threads that replicate."""
    replication_seconds: dict[str, float]
    """By task of these threads."""
    seconds: float
    """That the CPU times are of."""


@dataclass(frozen=True)
class Pair:
    on: SteadyRun
    off: SteadyRun

    @property
    def alike(self) -> bool:
        return abs(self.on.steps - self.off.steps) <= STEPS_TOLERANCE * self.off.steps


@dataclass(frozen=True)
class LagSamples:
    tokens: list[int]
    seconds: list[float]


def order(pairs: int) -> Iterator[tuple[ReplicationMode, ReplicationMode]]:
    on, off = ReplicationMode.RING, ReplicationMode.NONE
    return itertools.islice(itertools.cycle([(on, off), (off, on)]), pairs)


def measure(
    cluster: LocalCluster, settings: ReplicationSettings, pairs: list[Pair], say: Callable[[str], None]
) -> None:
    """The other instance does not replicate meanwhile, so that every thread that does is known. One run of each mode
    comes first and is not counted."""
    if not settings.pairs:
        return
    cluster.wait_ready(READY_SECONDS)
    plan_switch.switch(cluster, SPARE, ReplicationMode.NONE)
    salts = itertools.count(FIRST_SALT, settings.steady_streams)
    for number, modes in enumerate([*order(1), *order(settings.pairs)]):
        runs = {mode: _run_in_one_batch(cluster, settings, mode, salts) for mode in modes}
        if number == 0:
            continue
        pair = Pair(on=runs[ReplicationMode.RING], off=runs[ReplicationMode.NONE])
        pairs.append(pair)
        say(
            f"overhead {number}/{settings.pairs}: {pair.on.throughput:.0f} tokens/s with copies, "
            f"{pair.off.throughput:.0f} without, {pair.on.steps} and {pair.off.steps} steps"
        )


def _run_in_one_batch(
    cluster: LocalCluster, settings: ReplicationSettings, mode: ReplicationMode, salts: Iterator[int]
) -> SteadyRun:
    """The first that was, of a few tries; else the one with the fewest steps."""
    runs: list[SteadyRun] = []
    while len(runs) < TRIES:
        runs.append(_run(cluster, settings, mode, next(salts)))
        if runs[-1].steps <= (1 + STEPS_TOLERANCE) * settings.steady_tokens:
            break
    return min(runs, key=lambda run: run.steps)


def _run(cluster: LocalCluster, settings: ReplicationSettings, mode: ReplicationMode, salt: int) -> SteadyRun:
    plan_switch.switch(cluster, SERVING, mode)
    before, url = cluster.engine_state(SERVING), cluster.engines[SERVING].url
    steps = engine_steps(url)
    threads, began = cpu_time.of_cluster(cluster), time.monotonic()
    streams = _stream(cluster, settings, settings.steady_prompt_tokens, salt)
    # The same wait in both modes; nothing is left to be sent after it.
    time.sleep(plan_switch.REPORT_SECONDS)
    after = plan_switch.settle(cluster, SERVING, lambda state: plan_switch.settled(state, mode))
    used, seconds = cpu_time.spent(threads, cpu_time.of_cluster(cluster)), time.monotonic() - began
    return SteadyRun(
        *latency(streams),
        throughput=tokens_per_second(streams),
        steps=engine_steps(url) - steps,
        tokens=_tokens(streams, settings.steady_prompt_tokens),
        sent_blocks=_sent(after)[0] - _sent(before)[0],
        sent_bytes=_sent(after)[1] - _sent(before)[1],
        cpu_seconds=cpu_time.by_process(used),
        replication_seconds=cpu_time.by_task(used, SERVING, SPARE),
        seconds=seconds,
    )


def measure_lag(
    cluster: LocalCluster, settings: ReplicationSettings, lags: list[LagSamples], say: Callable[[str], None]
) -> None:
    """Under a load that prefills as well: a long prompt seals many blocks at once. Not part of the pairs, since asking
    for the state costs something, too."""
    salts = itertools.count(2 * FIRST_SALT, settings.steady_streams)
    for number in range(settings.lag_runs):
        cluster.wait_ready(READY_SECONDS)
        plan_switch.switch(cluster, SERVING, ReplicationMode.RING)
        with LagSampler(lambda: cluster.engine_state(SERVING)) as lag:
            _stream(cluster, settings, settings.lag_prompt_tokens, next(salts))
        lags.append(LagSamples(lag.tokens, lag.seconds))
        say(f"lag {number + 1}/{settings.lag_runs}: at most {max(lag.tokens, default=0)} tokens")


def _stream(cluster: LocalCluster, settings: ReplicationSettings, prompt_tokens: int, salt: int) -> list[Stream]:
    prompts = [fresh_prompt(prompt_tokens, salt + index) for index in range(settings.steady_streams)]
    streams = asyncio.run(run_streams(cluster.engines[SERVING].url, prompts, settings.steady_sampling))
    failed = [stream.error for stream in streams if stream.error]
    if failed:
        raise RuntimeError(f"expected complete streams, found {failed[0]}")
    return streams


def engine_steps(url: str) -> int:
    """Since its start, as vLLM counts them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=METRICS_SECONDS) as response:
        return int(sum(float(count) for count in STEPS_METRIC.findall(response.read().decode())))


def latency(streams: Sequence[Stream]) -> tuple[float, float]:
    """Seconds between two tokens of a stream: mean and 99th percentile."""
    found = [gap for stream in streams for gap in gaps(stream.arrivals_seconds)]
    return mean(found), percentile(found, 99)


def _tokens(streams: Sequence[Stream], prompt_tokens: int) -> int:
    """The last token of a stream is never computed on."""
    return sum(prompt_tokens + len(stream.tokens) - 1 for stream in streams)


def _sent(state: EngineState | None) -> tuple[int, int]:
    places = state.replication if state is not None else ()
    return sum(place.sent_blocks for place in places), sum(place.sent_bytes for place in places)
