"""Seam: how vLLM's API server ends. An engine that is told to end (SIGTERM) first finishes the requests that it has.

vLLM has a drain of its own (``--shutdown-timeout``; vllm/entrypoints/launchers/launcher.py, ``serve_http``). While it
lasts, new requests are answered with status 200 and nothing in it, and when EngineCore has no more to do its sockets
are closed at once, whether or not the last tokens have been passed on. So we take the flag's value and drain ourselves,
around the API: until the last byte of each answer is out. Only then vLLM is asked to end.

Made for vLLM 0.32; relies on ``--middleware``, on the middleware seeing the ASGI lifespan, which starts after vLLM has
set its signal handlers, and on SIGINT meaning the same to vLLM as SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from argparse import Namespace
from typing import TYPE_CHECKING

from resilientllm_worker.engine.control_server import PlanStore

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

LINGER_SECONDS = 3.0
"""Requests that still come in this time are served: nodes learn only now that they should go elsewhere."""
REFUSAL = "This instance is about to end. Send the request again: another one takes it."
_READS = {"GET", "HEAD", "OPTIONS"}


class Departure:
    """Whether the engine is to end, and what it still has to do. Lives in the API server's event loop."""

    def __init__(self, store: PlanStore, drain_seconds: float) -> None:
        self._store = store
        self._drain_seconds = drain_seconds
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving: asyncio.Task[None] | None = None
        self.refuses = False
        """No more requests are taken."""

    def listen(self) -> None:
        """From now on SIGTERM begins the drain. Without one, vLLM ends as it always does: at once."""
        if self._drain_seconds > 0:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._begin)

    @property
    def closes(self) -> bool:
        """Connections end with their answer, so that clients which keep some come back elsewhere."""
        plan = self._store.plan
        return self._leaving is not None or (plan is not None and plan.draining)

    def enter(self) -> None:
        """A request has come."""
        self._count(+1)

    def leave(self) -> None:
        """Its answer is out, or its client has gone."""
        self._count(-1)

    def _count(self, change: int) -> None:
        self._requests += change
        self._store.requests = self._requests
        self._idle.clear() if self._requests else self._idle.set()

    def _begin(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().create_task(self._drain())
            self._store.tell(leaving=True)

    async def _drain(self) -> None:
        logger.info("told to end: finishes %d requests, in at most %.0f s", self._requests, self._drain_seconds)
        try:
            async with asyncio.timeout(self._drain_seconds):
                await asyncio.sleep(LINGER_SECONDS)
                self.refuses = True
                await self._idle.wait()
        except TimeoutError:
            self.refuses = True
            logger.warning("the time to end in is over: %d requests are cut off", self._requests)
        signal.raise_signal(signal.SIGINT)


_departure: Departure | None = None


def drain_before_the_end(args: Namespace, store: PlanStore) -> None:
    """Make ``--shutdown-timeout`` of parsed ``serve`` arguments a drain around the API; before the server runs."""
    global _departure
    _departure = Departure(store, args.shutdown_timeout)
    args.shutdown_timeout = 0
    args.middleware = [*args.middleware, f"{__name__}.{Middleware.__name__}"]


class Middleware:
    """What stands around vLLM's API: counts requests, and refuses them when it is time."""

    def __init__(self, app: ASGIApp) -> None:
        assert _departure is not None, "drain_before_the_end comes first"
        self._app = app
        self._departure = _departure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        departure = self._departure
        if scope["type"] == "lifespan":
            departure.listen()
        if scope["type"] != "http" or scope["method"] in _READS:
            await self._app(scope, receive, send)
            return
        if departure.refuses:
            await _refuse(send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start" and departure.closes:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        departure.enter()
        try:
            await self._app(scope, receive, send_on)
        finally:
            departure.leave()


async def _refuse(send: Send) -> None:
    body = json.dumps(
        {"error": {"message": REFUSAL, "type": "ServiceUnavailable", "param": None, "code": 503}}
    ).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (b"retry-after", b"1"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
