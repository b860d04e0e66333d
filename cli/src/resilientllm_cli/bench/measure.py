"""The order of measurements. Where ours and stock run both, they take turns; restarts of stock are measured alone.

The undisturbed run that tokens are checked against is each side's own first one: greedy decoding in one batch
composition or another may differ in the last bits, and a random model has no wide margins.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from resilientllm_api.engine_state import RecoveryKind

from resilientllm_cli.bench import throughput
from resilientllm_cli.bench.kill_run import KillRun, disturb, judge
from resilientllm_cli.bench.report import OURS, STOCK, Measured
from resilientllm_cli.bench.settings import Settings, victims
from resilientllm_cli.bench.stock import StockServer
from resilientllm_cli.local import environment, preflight
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.flags import with_defaults
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.streams import OnToken, Stream, connect, model_name, run_stream_with_retries, run_streams

Say = Callable[[str], None]

READY_SECONDS = 600.0
"""Only a bound: eight processes that import vLLM on few cores take minutes."""
RESTART_TIMEOUT_SECONDS = 600.0
SERVING = 0
"""The instance that serves the streams, and loses the stages."""


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
    if settings.kills or settings.throughput_runs:
        with LocalCluster(layout) as cluster:
            cluster.wait_ready(READY_SECONDS)
            _kill_ours(cluster, settings, measured.ours, say)
            if settings.throughput_runs:
                with stock() as server:
                    server.wait_ready(READY_SECONDS)
                    urls = {OURS: cluster.engines[SERVING].url, STOCK: server.url}
                    throughput.measure(urls, settings, measured.tokens_per_second, say)
    if settings.restarts:
        with stock() as server:
            server.wait_ready(READY_SECONDS)
            _restart_stock(server, settings, measured.restart, say)


def _undisturbed(url: str, settings: Settings) -> list[list[int]]:
    streams = asyncio.run(run_streams(url, settings.prompts(), settings.sampling))
    for stream in streams:
        if not stream.complete or len(stream.tokens) != settings.tokens:
            raise RuntimeError(
                f"expected {settings.tokens} tokens without a disturbance, found {len(stream.tokens)}: {stream.error}"
            )
    return [stream.tokens for stream in streams]


def _kill_ours(cluster: LocalCluster, settings: Settings, runs: list[KillRun], say: Say) -> None:
    url = cluster.engines[SERVING].url
    undisturbed = _undisturbed(url, settings)
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
        run = judge(stage, disturbed, undisturbed, _phases_ms(cluster))
        runs.append(run)
        say(f"kill {number}/{settings.kills} of stage {stage}: {_verdict(run)}")


def _phases_ms(cluster: LocalCluster) -> dict[str, float]:
    """Of the last time a donor stood in. Its stage may already be back, and that recovery is not the one asked for."""
    state = cluster.engine_state(SERVING)
    borrowed = [recovery for recovery in state.recoveries if recovery.kind is RecoveryKind.BORROW] if state else []
    return dict(borrowed[-1].phases_ms) if borrowed else {}


def _restart_stock(server: StockServer, settings: Settings, runs: list[KillRun], say: Say) -> None:
    undisturbed = _undisturbed(server.url, settings)
    for number, stage in enumerate(victims(settings.restarts, settings.stages), start=1):
        server.wait_ready(READY_SECONDS)
        disturbed = asyncio.run(
            disturb(
                partial(_stream_with_retries, server.url, settings),
                settings.streams,
                settings.kill_after_tokens,
                partial(server.kill_worker, stage),
            )
        )
        run = judge(stage, disturbed, undisturbed, {})
        if not run.stalls_seconds:
            say(f"restart {number}/{settings.restarts}: not counted, all streams were over before the kill")
            continue
        runs.append(run)
        say(f"restart {number}/{settings.restarts} after a kill of stage {stage}: {_verdict(run)}")


async def _stream_with_retries(url: str, settings: Settings, on_token: OnToken) -> list[Stream]:
    deadline = time.monotonic() + RESTART_TIMEOUT_SECONDS
    async with connect(url) as client:
        model = await model_name(client)
        return await asyncio.gather(
            *(
                run_stream_with_retries(client, model, prompt, settings.sampling, Stream(index), deadline, on_token)
                for index, prompt in enumerate(settings.prompts())
            )
        )


def _verdict(run: KillRun) -> str:
    harm = "all tokens as undisturbed" if run.tokens.unharmed else f"{run.tokens}"
    return f"worst stall {run.worst_stall_seconds:.3f} s, {harm}{f', errors {run.errors}' if run.errors else ''}"


def quick(settings: Settings) -> Settings:
    """Enough to see that all of it works; too few for a figure."""
    return replace(settings, kills=3, restarts=1, throughput_runs=1)
