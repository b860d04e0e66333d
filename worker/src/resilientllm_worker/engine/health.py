"""Seam: ``/health`` of vLLM's API server, which is 200 while EngineCore's process lives. Here it means that work moves.

Judged in the API server's process, so that it holds whatever has happened to EngineCore. Made for vLLM 0.32; relies on
``--middleware``.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from resilientllm_api.engine_state import EnginePhase
from resilientllm_api.plan import Limits

from resilientllm_worker.engine.control_link import STATE_AT_LEAST_SECONDS
from resilientllm_worker.engine.control_server import PlanStore
from resilientllm_worker.engine.metrics import Metrics
from resilientllm_worker.engine.spans import RecoverySpans
from resilientllm_worker.engine.stall import Stall, sickness

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
STARTS = {EnginePhase.STARTING, EnginePhase.ATTACHING, EnginePhase.FAILED}
"""Phases in which nobody expects anything of it yet, or any more."""
HEALTH_PATH = "/health"
"""vLLM's."""

_store: PlanStore | None = None


def tell_the_truth(args: Namespace, store: PlanStore) -> None:
    """Have ``/health`` say what `watch` finds; before the server runs."""
    global _store
    _store = store
    args.middleware = [*args.middleware, f"{__name__}.{Middleware.__name__}"]
    threading.Thread(target=watch, args=(store, Metrics()), name="health", daemon=True).start()


def watch(store: PlanStore, metrics: Metrics, stopped: threading.Event | None = None) -> None:
    """Look whether work moves, for as long as the process lives or until ``stopped``."""
    stopped = stopped or threading.Event()
    stall, spans = Stall(time.monotonic()), RecoverySpans()
    while not stopped.wait(LOOK_SECONDS):
        now, state = time.monotonic(), store.state
        busy = bool(store.requests or state.requests_running or state.requests_waiting)
        # An EngineCore that is stopped says nothing, not even that it serves.
        heard = now - store.heard_at < 5 * STATE_AT_LEAST_SECONDS
        if state.phase in STARTS:
            stall = Stall(now, state.steps_total)
        else:
            stall = stall.after(now, state.steps_total, busy, state.serving and heard, LOOK_SECONDS)
        limits = store.plan.limits if store.plan is not None else Limits()
        message = state.message if heard else "EngineCore says nothing"
        sick = sickness(stall, limits.sick_after_seconds, state.step_allowed_seconds, busy, message)
        if bool(sick) != bool(store.sick):
            logger.warning("is sick: %s", sick) if sick else logger.info("is well again")
        if sick != store.sick:
            store.tell(sick=sick)
        told = store.public_state()
        metrics.note(told, now)
        spans.note(told)


class Middleware:
    """What stands before vLLM's own ``/health``."""

    def __init__(self, app: ASGIApp) -> None:
        assert _store is not None, "tell_the_truth comes first"
        self._app = app
        self._store = _store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == HEALTH_PATH and self._store.sick:
            body = json.dumps({"error": self._store.sick}).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})
            return
        await self._app(scope, receive, send)
