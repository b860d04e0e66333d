"""Planned moves under load: what clients notice when a stage is left that still works, and when it is taken back."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise

from resilientllm_api.engine_state import EngineState, Recovery, RecoveryKind
from resilientllm_api.plan import StageId

from resilientllm_cli.bench import clients
from resilientllm_cli.bench.kill_run import disturb
from resilientllm_cli.bench.plan_switch import publish
from resilientllm_cli.bench.settings import READY_SECONDS, SERVING, SPARE, MoveSettings, fresh_prompt, victims
from resilientllm_cli.comparison import Tokens, compare, total
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.streams import Stream, run_streams

AFTER_SECONDS = 0.25
"""What a move does to streams shows until so long after the first token that follows it."""
POLL_SECONDS = 0.02
SALT = 1 << 20
"""Apart from other parts of the benchmark, whose prompts may still be in a prefix cache."""


@dataclass(frozen=True)
class MoveSample:
    """One move, as clients and the engine saw it."""

    kind: RecoveryKind
    stage: int
    worst_interval_seconds: float
    """Between two tokens of a stream, over all streams, while the move went on."""
    phases_ms: dict[str, float]
    tokens_recomputed: int
    tokens_kept: int
    requests: int


@dataclass(frozen=True)
class MoveRun:
    samples: tuple[MoveSample, ...]
    undisturbed_intervals_seconds: tuple[float, ...]
    """Between tokens of the same streams at all other times; none where a process was started meanwhile."""
    seconds_to_end: float | None
    """From SIGTERM to the end of the process, where one was sent."""
    tokens: Tokens
    errors: tuple[str, ...]

    @property
    def verdict(self) -> str:
        moves = ", ".join(f"{sample.kind} {1e3 * sample.worst_interval_seconds:.0f} ms" for sample in self.samples)
        recomputed = sum(sample.tokens_recomputed for sample in self.samples)
        harm = (
            "all tokens as undisturbed" if self.tokens.unharmed and not self.errors else f"{self.tokens} {self.errors}"
        )
        return f"worst interval: {moves}; {recomputed} tokens recomputed, {harm}"


def measure(
    cluster: LocalCluster, settings: MoveSettings, stages: int, runs: list[MoveRun], say: Callable[[str], None]
) -> None:
    for number, stage in enumerate(victims(settings.moves, stages), start=1):
        runs.append(_run(cluster, settings, stage, len(runs), partial(_there_and_back, cluster, stage)))
        say(f"move {number}/{settings.moves} of stage {stage}: {runs[-1].verdict}")
    for number, stage in enumerate(victims(settings.sigterms, stages), start=1):
        runs.append(_run(cluster, settings, stage, len(runs), partial(_terminate, cluster, stage)))
        say(
            f"SIGTERM {number}/{settings.sigterms} of stage {stage}: ends after {runs[-1].seconds_to_end:.3f} s, "
            f"{runs[-1].verdict}"
        )


@dataclass(frozen=True)
class _Done:
    moves: tuple[Recovery, ...]
    seconds_to_end: float | None = None


def _run(cluster: LocalCluster, settings: MoveSettings, stage: int, number: int, act: Callable[[], _Done]) -> MoveRun:
    salt = SALT + number * settings.streams
    prompts = [fresh_prompt(settings.prompt_tokens, salt + index) for index in range(settings.streams)]
    cluster.wait_ready(READY_SECONDS)
    expected = clients.undisturbed(cluster.engines[SPARE].url, prompts, settings.sampling)
    done: list[_Done] = []
    disturbed = asyncio.run(
        disturb(
            lambda on_token: run_streams(cluster.engines[SERVING].url, prompts, settings.sampling, on_token),
            settings.streams,
            settings.after_tokens,
            lambda: done.append(act()),
        )
    )
    [what] = done
    windows = [window(move, time.time() - time.monotonic()) for move in what.moves]
    streams = disturbed.streams
    if any(stream.arrivals_seconds[-1] < end for stream in streams for _, end in windows if stream.complete):
        raise RuntimeError("a stream was over before the move: give streams more tokens")
    return MoveRun(
        samples=tuple(
            MoveSample(
                kind=move.kind,
                stage=stage,
                worst_interval_seconds=max(intervals_within(streams, [seen])),
                phases_ms=dict(move.phases_ms),
                tokens_recomputed=move.tokens_recomputed,
                tokens_kept=move.tokens_kept,
                requests=move.requests,
            )
            for move, seen in zip(what.moves, windows, strict=True)
        ),
        undisturbed_intervals_seconds=() if what.seconds_to_end else tuple(intervals_without(streams, windows)),
        seconds_to_end=what.seconds_to_end,
        tokens=total(compare(want, got.tokens) for want, got in zip(expected, streams, strict=True)),
        errors=tuple(stream.error for stream in streams if stream.error),
    )


# --- what is done to the cluster -----------------------------------------------------------------------------------


def _there_and_back(cluster: LocalCluster, stage: int) -> _Done:
    own, donor = (StageId(instance=instance, stage=stage) for instance in (SERVING, SPARE))
    publish(cluster, SERVING, leaving=(own,))
    there = _wait_moved(cluster, donor, RecoveryKind.MOVE)
    publish(cluster, SERVING, leaving=())
    return _Done((there, _wait_moved(cluster, own, RecoveryKind.SWAP_BACK)))


def _terminate(cluster: LocalCluster, stage: int) -> _Done:
    pid = cluster.stage(SERVING, stage).pid
    if pid is None:
        raise RuntimeError(f"stage {SERVING}.{stage} is not running")
    pidfd = os.pidfd_open(pid)
    try:
        started = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(1e3 * READY_SECONDS):
            raise TimeoutError(f"stage {SERVING}.{stage} did not end in {READY_SECONDS:g} s after SIGTERM")
        seconds = time.monotonic() - started
    finally:
        os.close(pidfd)
    return _Done((_wait_moved(cluster, StageId(instance=SPARE, stage=stage), RecoveryKind.MOVE),), seconds)


def _wait_moved(cluster: LocalCluster, to: StageId, kind: RecoveryKind) -> Recovery:
    """The record of the move to this stage, when it is over and its traces have gone."""

    def found(state: EngineState | None) -> Recovery | None:
        if state is None or state.stages[to.stage].served_by != to or not state.recoveries:
            return None
        last = state.recoveries[-1]
        return last if last.kind is kind and last.served_by[to.stage] == to else None

    deadline = time.monotonic() + READY_SECONDS
    while (move := found(cluster.engine_state(SERVING))) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected a move to stage {to}, found {cluster.engine_state(SERVING)}")
        time.sleep(POLL_SECONDS)
    time.sleep(AFTER_SECONDS)
    return move


# --- what clients saw ----------------------------------------------------------------------------------------------

Window = tuple[float, float]
"""Of the clients' clock."""


def window(move: Recovery, clock_difference_seconds: float) -> Window:
    """``clock_difference_seconds``: of the wall clock, in which an engine tells its times, less that of arrivals."""

    def seconds(at: datetime) -> float:
        return at.timestamp() - clock_difference_seconds

    if move.resumed_at is None:
        raise ValueError(f"move {move.id} is not over")
    return seconds(move.detected_at), seconds(move.resumed_at) + AFTER_SECONDS


def intervals_within(streams: Iterable[Stream], windows: Sequence[Window]) -> list[float]:
    """Between tokens that came one after the other, of which at least a part lies within."""
    return [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream.arrivals_seconds)
        if any(earlier < end and later > start for start, end in windows)
    ]


def intervals_without(streams: Iterable[Stream], windows: Sequence[Window]) -> list[float]:
    """All others."""
    return [
        later - earlier
        for stream in streams
        for earlier, later in pairwise(stream.arrivals_seconds)
        if not any(earlier < end and later > start for start, end in windows)
    ]
