"""Stands between the operator and all that it writes to, and ends it between two of its actions, or cuts it off.

A proxy before the API server, and the same before the engines: the operator's code knows nothing of it. After so many
writes the process that makes them is killed, before it gets an answer. That is every gap that there is: what it did
not write, nobody else can see.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Self

import aiohttp
from aiohttp import web

from .api import AdminApi

_HOP_BY_HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive"}


class CutOff(Exception):
    """There is nobody to answer any more, or nobody who may."""


class Gate:
    """``async with`` it: the proxy listens meanwhile."""

    def __init__(self, api: AdminApi, kill: Callable[[], None]) -> None:
        """``kill`` ends the operator when it has done its last write."""
        self.writes: list[str] = []
        """All that was written, in order."""
        self.left: int | None = None
        """How many more writes there may be before the operator is killed; None: as many as it likes."""
        self.lists: list[str] = []
        """The kinds of objects that were listed, in order."""
        self.lists_before: list[int] = []
        """For every write: how many lists there had been."""
        self.address = ""
        self._open = True
        self._requests: set[asyncio.Task[object]] = set()
        self._forgotten: set[asyncio.Task[object]] = set()
        self._api = api
        self._kill = kill
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        connector = aiohttp.TCPConnector(ssl=self._api.trust, limit=0)
        self._session = await self._stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def close(self) -> None:
        """The API server is away, for the operator alone: connections break, and new ones are not answered."""
        self._open = False
        for task in self._requests:
            task.cancel()

    def open(self) -> None:
        self._open = True

    def forget(self) -> None:
        """Connections that are open now carry nothing any more, and stay: what a middlebox does that has lost them."""
        self._forgotten |= self._requests

    async def write(self, what: str, do: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """Does a write, unless the operator has had its last one. What is refused was no write."""
        if self.left == 0:
            raise CutOff(what)
        lists = len(self.lists)
        answer = await do()
        if answer.status >= 300:
            return answer
        self.writes.append(what)
        self.lists_before.append(lists)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self._kill()
                raise CutOff(what)
        return answer

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # From the start: a request whose connection is gone has none any more.
        transport, task = request.transport, asyncio.current_task()
        assert transport is not None and task is not None
        self._requests.add(task)
        try:
            if not self._open:
                raise CutOff(request.path)
            body = await request.read()
            if request.method == "GET":
                if "watch" not in request.query:
                    self.lists.append(request.path.rpartition("/")[2])
                return await self._forward(request, body)
            return await self.write(_name(request, body), lambda: self._forward(request, body))
        except (CutOff, asyncio.CancelledError):
            transport.abort()
            raise asyncio.CancelledError from None  # What aiohttp knows of as a client that is gone.
        finally:
            self._requests.discard(task)
            self._forgotten.discard(task)

    async def _forward(self, request: web.Request, body: bytes) -> web.StreamResponse:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
        async with self._session.request(
            request.method,
            self._api.server + request.path_qs,
            data=body or None,
            headers=headers | {"Accept-Encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None),
        ) as upstream:
            kept = {key: value for key, value in upstream.headers.items() if key.lower() not in _HOP_BY_HOP}
            if "watch" not in request.query:
                # As a whole: a write must be known to be done before anybody is killed for it.
                return web.Response(status=upstream.status, headers=kept, body=await upstream.read())
            answer = web.StreamResponse(status=upstream.status, headers=kept)
            await answer.prepare(request)
            task = asyncio.current_task()
            with suppress(ConnectionError):
                async for chunk in upstream.content.iter_any():
                    if task not in self._forgotten:
                        await answer.write(chunk)
                while task in self._forgotten:  # Not even the end is told.
                    await asyncio.sleep(0.1)
                await answer.write_eof()
            return answer


def _name(request: web.Request, body: bytes) -> str:
    """For people: what is written."""
    with suppress(ValueError, KeyError, TypeError):
        if request.method == "POST":
            return f"POST {request.path.rsplit('/', 1)[1]} {json.loads(body)['metadata']['name']}"
    return f"{request.method} {request.path.partition('/namespaces/')[2].partition('/')[2]}"
