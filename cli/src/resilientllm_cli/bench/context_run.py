"""Kills at several lengths of context, with copies of the KV blocks and without: does the stall grow with context?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from resilientllm_api.engine_state import EngineState, Recovery, RecoveryKind
from resilientllm_api.plan import ReplicationMode

from resilientllm_cli.bench import clients
from resilientllm_cli.bench.kill_run import Disturbed, KillRun, disturb, judge
from resilientllm_cli.bench.lag import LagSampler
from resilientllm_cli.bench.plan_switch import switch
from resilientllm_cli.bench.settings import READY_SECONDS, SERVING, SPARE, ReplicationSettings, fresh_prompt
from resilientllm_cli.bench.stock import StockServer
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.streams import run_streams

RESTART_TRIES = 3
RESTART_AFTER_TOKENS = 8
MODES = (ReplicationMode.RING, ReplicationMode.NONE)


@dataclass(frozen=True)
class ContextRun:
    context_tokens: int
    """Of every stream's prompt."""
    run: KillRun
    tokens_recomputed_max: int
    """Of one request."""
    tokens_kept: int = 0
    lag_tokens: tuple[int, ...] = ()
    """Samples before the kill, of all places of the pipeline."""
    lag_tokens_at_kill: int = 0
    """Of the place that is worst, as it was last reported."""


def measure(
    cluster: LocalCluster,
    settings: ReplicationSettings,
    stages: int,
    samples: dict[ReplicationMode, list[ContextRun]],
    say: Callable[[str], None],
) -> None:
    """Both modes take turns; every kill has prompts of its own, so that nothing of them is cached anywhere."""
    for kill in range(settings.kills):
        for place, context in enumerate(settings.contexts):
            stage = (kill + place) % stages
            for turn, mode in enumerate(MODES if (kill + place) % 2 == 0 else MODES[::-1]):
                salt = (kill * len(settings.contexts) + place) * len(MODES) + turn
                run = _kill(cluster, settings, context, stage, mode, salt)
                samples[mode].append(run)
                say(
                    f"context {context}, replication {mode}, kill {kill + 1}/{settings.kills} of stage {stage}: "
                    f"{run.run.verdict}, at most {run.tokens_recomputed_max} tokens recomputed"
                )


def _kill(
    cluster: LocalCluster, settings: ReplicationSettings, context: int, stage: int, mode: ReplicationMode, salt: int
) -> ContextRun:
    prompts = [fresh_prompt(context, salt * settings.streams + index) for index in range(settings.streams)]
    cluster.wait_ready(READY_SECONDS)
    for instance in (SERVING, SPARE):
        switch(cluster, instance, mode)
    # The spare instance tells what the tokens are: the one that is hit must see these prompts for the first time.
    expected = clients.undisturbed(cluster.engines[SPARE].url, prompts, settings.sampling)
    switch(cluster, SPARE, mode)  # what the comparison has sealed is not to be copied beside the kill
    at_kill: list[EngineState | None] = []

    def kill() -> None:
        lag.stop()
        at_kill.append(cluster.engine_state(SERVING))
        cluster.kill_stage(SERVING, stage)

    with LagSampler(partial(cluster.engine_state, SERVING)) as lag:
        disturbed = asyncio.run(
            disturb(
                lambda on_token: run_streams(cluster.engines[SERVING].url, prompts, settings.sampling, on_token),
                settings.streams,
                settings.kill_after(salt),
                kill,
            )
        )
    recovery = last_borrowed(cluster.engine_state(SERVING))
    if recovery is None:
        raise RuntimeError(f"expected a recovery of instance {SERVING}, found none")
    [before] = at_kill
    return ContextRun(
        context_tokens=context,
        run=judge(stage, disturbed, expected, dict(recovery.phases_ms)),
        tokens_recomputed_max=recovery.tokens_recomputed_max,
        tokens_kept=recovery.tokens_kept,
        lag_tokens=tuple(lag.tokens),
        lag_tokens_at_kill=max((place.lag_tokens for place in before.replication), default=0) if before else 0,
    )


def last_borrowed(state: EngineState | None) -> Recovery | None:
    """The last time a donor stood in. Its stage may already be back, and that recovery is not the one asked for."""
    borrowed = [recovery for recovery in state.recoveries if recovery.kind is RecoveryKind.BORROW] if state else []
    return borrowed[-1] if borrowed else None


def measure_restarts(
    server: StockServer,
    settings: ReplicationSettings,
    stages: int,
    samples: list[ContextRun],
    say: Callable[[str], None],
) -> None:
    """Of stock vLLM, at the shortest and the longest context only: a restart takes most of a minute.

    Where its workers leave its API server no time, all tokens of a stream may come at once. Then the kill came too
    late, and says nothing.
    """
    for number in range(settings.restarts):
        for place, context in enumerate(sorted({min(settings.contexts), max(settings.contexts)})):
            for attempt in range(RESTART_TRIES):
                salt = -(settings.streams * (attempt + 1))
                prompts = [fresh_prompt(context, salt - index) for index in range(settings.streams)]
                if (found := _restart(server, settings, context, (number + place) % stages, prompts)) is not None:
                    samples.append(found)
                    say(f"context {context}, restart {number + 1}/{settings.restarts}: {found.run.verdict}")
                    break
                say(f"context {context}: restart not counted, all tokens were computed before the kill")


def _restart(
    server: StockServer, settings: ReplicationSettings, context: int, stage: int, prompts: list[list[int]]
) -> ContextRun | None:
    server.wait_ready(READY_SECONDS)
    expected = clients.undisturbed(server.url, prompts, settings.sampling)
    disturbed = asyncio.run(
        disturb(
            partial(clients.stream_with_retries, server.url, prompts, settings.sampling),
            settings.streams,
            RESTART_AFTER_TOKENS,
            partial(server.kill_worker, stage),
        )
    )
    run = judge(stage, disturbed, expected, {})
    return ContextRun(context, run, context + delivered_at_kill(disturbed)) if disturbed.cut else None


def delivered_at_kill(disturbed: Disturbed) -> int:
    """Tokens of the stream that had most of them."""
    return max(
        sum(arrival <= disturbed.killed_at_seconds for arrival in stream.arrivals_seconds)
        for stream in disturbed.streams
    )
