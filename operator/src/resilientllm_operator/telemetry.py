"""The operator's own metrics and health, on one port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import get_args

from aiohttp import web
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from resilientllm_api.reasons import EventReason, Reason

from resilientllm_operator.actions import Action
from resilientllm_operator.object_metrics import ObjectMetrics
from resilientllm_operator.permit import NotPermitted
from resilientllm_operator.recovery_metrics import RecoveryMetrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # A series more for each count, which nobody asks for.
ROUNDS = Counter(
    "resilientllm_operator_rounds", "Rounds of observe, decide and dispatch.", ["result"]
)  # prometheus_client adds _total.
ROUND_SECONDS = Histogram("resilientllm_operator_round_seconds", "Duration of a round.")
TRANSITIONS = Counter("resilientllm_operator_transitions", "Transitions that were announced.", ["reason"])
DECISIONS = Counter("resilientllm_operator_decisions", "Actions that were decided.", ["action"])
ACTIONS = Counter(
    "resilientllm_operator_actions", "Actions that were tried, by what came of them.", ["action", "result"]
)
LEADER = Gauge("resilientllm_operator_leader", "1 while this replica holds the lease, and may act.")
HELD = Gauge("resilientllm_operator_held", "1 while this replica leads and does nothing, because its view is too old.")
VIEW_AGE = Gauge("resilientllm_operator_view_age_seconds", "Since when a kind is known as it is.", ["kind"])
# What has not happened yet is counted as nothing: an increase from no series to 1 is none to Prometheus.
for _action in get_args(Action):
    DECISIONS.labels(_action.__name__)
    for _result in ("ok", "held", "error"):
        ACTIONS.labels(_action.__name__, _result)
for _result in ("ok", "held", "error", "defect"):
    ROUNDS.labels(_result)
for _reason in (*EventReason, *Reason):
    TRANSITIONS.labels(_reason)
OBJECTS = ObjectMetrics()
REGISTRY.register(OBJECTS)
RECOVERIES = RecoveryMetrics()


@contextmanager
def acting(action: Action) -> Iterator[None]:
    """Counts what comes of the action that is tried in the block."""
    result, kind = "error", type(action).__name__
    try:
        yield
        result = "ok"
    except NotPermitted:
        result = "held"
        raise
    finally:
        ACTIONS.labels(kind, result).inc()


@asynccontextmanager
async def serve(port: int, describe: Callable[[], str]) -> AsyncIterator[None]:
    """``/healthz`` (the event loop turns; who leads) and ``/metrics``, as long as the block runs."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text=f"ok: {describe()}\n")

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", _metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "0.0.0.0", port).start()
        yield
    finally:
        await runner.cleanup()


async def _metrics(_: web.Request) -> web.Response:
    # Of a thousand objects it takes half a second, in which events must not wait.
    text = await asyncio.to_thread(generate_latest)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})
