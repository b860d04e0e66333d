"""What kopf's watches do, seen from their HTTP requests.

kopf hands us events and nothing else: neither bookmarks, nor that a watch was opened or broke, nor that it has given
one up and listed anew, which hides deletions. Its session is ours, though, and aiohttp lets a session be traced.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf

from resilientllm_operator.freshness import Freshness
from resilientllm_operator.kube import RESOURCES

REOPEN_SECONDS = 20
"""The API server ends a watch after this time, and kopf opens the next one where it ended: that confirms the view."""
SILENCE_SECONDS = 25.0
"""A watch without event, bookmark or end for so long is dead. kopf drops it, and opens another."""


class Backoff(Iterable[float]):
    """kopf's pauses between attempts, without an end: when it gives up on an API server, it ends the process."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.2, 0.5, 1.0)
        while True:
            yield 2.0


class NothingToCompare(kopf.DiffBaseStorage):  # type: ignore[misc]
    """kopf copies every object of every event, to tell handlers what has changed. We have none that ask."""

    def build(self, **_: Any) -> dict[str, Any]:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


def tune(settings: kopf.OperatorSettings) -> None:
    settings.persistence.diffbase_storage = NothingToCompare()
    settings.watching.server_timeout = REOPEN_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.reconnect_backoff = 0.5
    # kopf has a task for every object, which keeps it whole until it has been idle for so long. With short lives and
    # small pages a start among ten thousand pods does not take half a gigabyte.
    settings.watching.chunk_size = 100
    settings.queueing.idle_timeout = 0.1
    settings.networking.error_backoffs = Backoff()
    settings.networking.request_timeout = 15
    settings.networking.connect_timeout = 3


def trace(freshness: Freshness) -> aiohttp.TraceConfig:
    """Tells ``freshness`` what becomes of the requests of a session."""
    answered_at = -math.inf

    async def started(_: aiohttp.ClientSession, context: SimpleNamespace, __: aiohttp.TraceRequestStartParams) -> None:
        context.began = time.monotonic()

    async def ended(_: aiohttp.ClientSession, __: SimpleNamespace, it: aiohttp.TraceRequestEndParams) -> None:
        nonlocal answered_at
        if it.response.status < 500:
            answered_at = time.monotonic()
        if it.method != "GET":
            return
        if it.response.status >= 500:
            freshness.lost(f"the API server answered with {it.response.status}", time.monotonic())
        elif "watch" in it.url.query and (kind := kind_of(it.url.path)) is not None and it.response.status < 300:
            freshness.heard(kind, time.monotonic())

    async def failed(
        _: aiohttp.ClientSession, context: SimpleNamespace, it: aiohttp.TraceRequestExceptionParams
    ) -> None:
        if isinstance(it.exception, asyncio.CancelledError):
            return
        # One that had to wait too long while others were answered: slow, and there. To stand still for it, and to list
        # everything anew, would be no help to an API server that has too much to do.
        if isinstance(it.exception, TimeoutError) and context.began < answered_at:
            return
        words = str(it.exception) or type(it.exception).__name__
        freshness.lost(f"the API server does not answer: {words}", time.monotonic())

    config = aiohttp.TraceConfig()
    config.on_request_start.append(started)
    config.on_request_end.append(ended)
    config.on_request_exception.append(failed)
    return config


def trace_of_kopf(freshness: Freshness) -> aiohttp.TraceConfig:
    """The same for kopf's session, where a list means that a watch was given up."""

    async def ended(_: aiohttp.ClientSession, __: SimpleNamespace, it: aiohttp.TraceRequestEndParams) -> None:
        # Its first page: what happens after that, the watch tells.
        pages = {"watch", "continue"} & it.url.query.keys()
        if it.method == "GET" and not pages and (kind := kind_of(it.url.path)) is not None:
            freshness.lost(f"the watch of {kind} objects begins", time.monotonic(), kind)

    config = trace(freshness)
    config.on_request_end.append(ended)
    return config


def kind_of(path: str) -> str | None:
    """The kind whose objects a URL of this path lists or watches."""
    for kind, (root, plural) in RESOURCES.items():
        if path.startswith(f"/{root}/") and path.endswith(f"/{plural}"):
            return kind
    return None
