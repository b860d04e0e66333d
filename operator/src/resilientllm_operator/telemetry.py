"""The operator's own metrics and health, on one port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest

ROUNDS = Counter(
    "resilientllm_operator_rounds", "Rounds of observe, decide and dispatch.", ["result"]
)  # prometheus_client adds _total.
ROUND_SECONDS = Histogram("resilientllm_operator_round_seconds", "Duration of a round.")
TRANSITIONS = Counter("resilientllm_operator_transitions", "Transitions that were announced.", ["reason"])
SERVING = Gauge("resilientllm_instances_serving", "Instances that requests are sent to.", ["namespace", "name"])
WANTED = Gauge("resilientllm_instances", "Instances asked for.", ["namespace", "name"])


@asynccontextmanager
async def serve(port: int) -> AsyncIterator[None]:
    """``/healthz`` (the event loop turns) and ``/metrics``, as long as the block runs."""
    app = web.Application()
    app.add_routes([web.get("/healthz", _healthz), web.get("/metrics", _metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "0.0.0.0", port).start()
        yield
    finally:
        await runner.cleanup()


async def _healthz(_: web.Request) -> web.Response:
    return web.Response(text="ok\n")


async def _metrics(_: web.Request) -> web.Response:
    return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})
