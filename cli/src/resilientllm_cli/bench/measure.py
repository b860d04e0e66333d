"""The order of measurements. Where ours and stock run both, they take turns; restarts of stock are measured alone.

The undisturbed run that tokens are checked against is each side's own first one: greedy decoding in one batch
composition or another may differ in the last bits, and a random model has no wide margins.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from resilientllm_cli.bench import clients, context_run, move_run, overhead_run, throughput, weights_run
from resilientllm_cli.bench.kill_run import KillRun, disturb, judge
from resilientllm_cli.bench.replication_report import ReplicationMeasured
from resilientllm_cli.bench.report import OURS, STOCK, Measured
from resilientllm_cli.bench.settings import READY_SECONDS, SERVING, Settings, victims
from resilientllm_cli.bench.stock import StockServer
from resilientllm_cli.local import environment, preflight
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.flags import with_defaults
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.streams import run_streams

Say = Callable[[str], None]


def measure(settings: Settings, measured: Measured, say: Say) -> None:
    """Adds every sample to ``measured``, then says so: a run that is broken off keeps what it has."""
    layout = Layout(
        model=settings.model,
        instances=settings.instances,
        stages=settings.stages,
        port=0,
        directory=settings.directory,
    )
    shape = preflight.read_shape(settings.model)
    preflight.check_layout(layout, shape)
    stock = partial(
        StockServer,
        settings.stock_programs,
        settings.model,
        settings.stages,
        with_defaults([], environment.default_flags(shape)),
        environment.of_children(os.environ, layout),
        settings.directory.absolute() / "logs" / "stock.log",
    )
    replication = settings.replication
    moves = settings.moves
    if settings.kills or settings.throughput_runs or replication.needs_cluster or moves.moves or moves.sigterms:
        with LocalCluster(layout) as cluster:
            cluster.wait_ready(READY_SECONDS)
            if settings.kills:
                _kill_ours(cluster, settings, measured.ours, say)
            if settings.throughput_runs:
                with stock() as server:
                    server.wait_ready(READY_SECONDS)
                    urls = {OURS: cluster.engines[SERVING].url, STOCK: server.url}
                    throughput.measure(urls, settings, measured.tokens_per_second, say)
            _measure_replication(cluster, settings, measured.replication, say)
            move_run.measure(cluster, moves, settings.stages, measured.moves, say)
    if settings.restarts or (replication.contexts and replication.restarts):
        with stock() as server:
            server.wait_ready(READY_SECONDS)
            if settings.restarts:
                _restart_stock(server, settings, measured.restart, say)
            if replication.contexts:
                context_run.measure_restarts(server, replication, settings.stages, measured.replication.restart, say)
    weights_run.measure(settings.weights, settings.directory, measured.starts, measured.giving, say)


def _measure_replication(cluster: LocalCluster, settings: Settings, measured: ReplicationMeasured, say: Say) -> None:
    state = cluster.engine_state(SERVING)
    measured.block_tokens = state.block_tokens if state is not None else 0
    # First what nothing is killed in: a stage that has just come back still warms up.
    overhead_run.measure(cluster, settings.replication, measured.pairs, say)
    overhead_run.measure_lag(cluster, settings.replication, measured.lags, say)
    context_run.measure(cluster, settings.replication, settings.stages, measured.runs, say)


def _kill_ours(cluster: LocalCluster, settings: Settings, runs: list[KillRun], say: Say) -> None:
    url = cluster.engines[SERVING].url
    undisturbed = clients.undisturbed(url, settings.prompts(), settings.sampling)
    for number, stage in enumerate(victims(settings.kills, settings.stages), start=1):
        cluster.wait_ready(READY_SECONDS)
        disturbed = asyncio.run(
            disturb(
                lambda on_token: run_streams(url, settings.prompts(), settings.sampling, on_token),
                settings.streams,
                settings.kill_after_tokens,
                partial(cluster.kill_stage, SERVING, stage),
            )
        )
        recovery = context_run.last_borrowed(cluster.engine_state(SERVING))
        run = judge(stage, disturbed, undisturbed, dict(recovery.phases_ms) if recovery is not None else {})
        runs.append(run)
        say(f"kill {number}/{settings.kills} of stage {stage}: {run.verdict}")


def _restart_stock(server: StockServer, settings: Settings, runs: list[KillRun], say: Say) -> None:
    undisturbed = clients.undisturbed(server.url, settings.prompts(), settings.sampling)
    for number, stage in enumerate(victims(settings.restarts, settings.stages), start=1):
        server.wait_ready(READY_SECONDS)
        disturbed = asyncio.run(
            disturb(
                partial(clients.stream_with_retries, server.url, settings.prompts(), settings.sampling),
                settings.streams,
                settings.kill_after_tokens,
                partial(server.kill_worker, stage),
            )
        )
        run = judge(stage, disturbed, undisturbed, {})
        if not disturbed.cut:
            say(f"restart {number}/{settings.restarts}: not counted, all tokens were computed before the kill")
            continue
        runs.append(run)
        say(f"restart {number}/{settings.restarts} after a kill of stage {stage}: {run.verdict}")


def quick(settings: Settings) -> Settings:
    """Enough to see that all of it works; too few for a figure."""
    fewer = replace(settings.replication, contexts=settings.replication.contexts[::4], kills=1, pairs=2, lag_runs=1)
    return replace(
        settings,
        kills=min(settings.kills, 3),
        restarts=min(settings.restarts, 1),
        throughput_runs=min(settings.throughput_runs, 1),
        replication=fewer if settings.replication.needs_cluster else settings.replication,
        weights=replace(
            settings.weights, starts=min(settings.weights.starts, 1), bursts=min(settings.weights.bursts, 2)
        ),
        moves=replace(settings.moves, moves=min(settings.moves.moves, 2), sigterms=min(settings.moves.sigterms, 1)),
    )
