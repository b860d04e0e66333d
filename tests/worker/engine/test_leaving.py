"""An engine that is told to end, around a real HTTP server in place of vLLM's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, StageId
from resilientllm_worker.engine import leaving
from resilientllm_worker.engine.control_server import PlanStore

PATIENCE_SECONDS = 30.0
NO_LINGER = 0.0


class Api:
    """What stands for vLLM: a stream goes on until the test says so, and SIGINT is taken as the word to end."""

    def __init__(self, store: PlanStore, url: str) -> None:
        self.store = store
        self.url = url
        self.goes_on = asyncio.Event()
        self.ended = asyncio.Event()

    async def told_to_end(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not self.store.leaving:
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@asynccontextmanager
async def running(store: PlanStore, drain_seconds: float) -> AsyncIterator[Api]:
    args = Namespace(shutdown_timeout=drain_seconds, middleware=[])
    leaving.drain_before_the_end(args, store)
    assert args.shutdown_timeout == 0
    assert args.middleware == ["resilientllm_worker.engine.leaving.Middleware"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        api = Api(store, f"http://127.0.0.1:{listening.getsockname()[1]}")
        app = FastAPI()
        app.add_middleware(leaving.Middleware)

        async def words() -> AsyncIterator[str]:
            yield "first "
            await api.goes_on.wait()
            yield "last"

        @app.post("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(words())

        @app.post("/answer")
        async def answer() -> str:
            return "answer"

        @app.get("/health")
        async def health() -> str:
            return "well"

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: pytest.fail("not ours"))
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, api.ended.set)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        serving = asyncio.create_task(server._serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield api
        finally:
            api.goes_on.set()
            server.should_exit = True
            await serving


def run(
    tmp_path: Path,
    test: Callable[[Api, aiohttp.ClientSession], Awaitable[None]],
    drain_seconds: float = PATIENCE_SECONDS,
) -> None:
    async def all_of_it() -> None:
        async with (
            running(PlanStore(0, tmp_path / "plan.json"), drain_seconds) as api,
            aiohttp.ClientSession() as client,
        ):
            await asyncio.wait_for(test(api, client), PATIENCE_SECONDS)

    asyncio.run(all_of_it())


@pytest.fixture
def no_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaving, "LINGER_SECONDS", NO_LINGER)


@pytest.mark.usefixtures("no_linger")
def test_ends_when_its_last_answer_is_out(tmp_path: Path) -> None:
    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        async with client.post(f"{api.url}/stream") as response:
            assert await response.content.readany() == b"first "
            await api.told_to_end()
            state = api.store.public_state()
            assert (state.leaving, state.serving, state.requests_waiting) == (True, False, 1)
            assert not api.ended.is_set()
            api.goes_on.set()
            assert await response.content.read() == b"last"
        await api.ended.wait()
        assert api.store.public_state().requests_waiting == 0

    run(tmp_path, test)


@pytest.mark.usefixtures("no_linger")
def test_refuses_what_is_new_and_says_that_it_may_be_sent_again(tmp_path: Path) -> None:
    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        async with client.post(f"{api.url}/stream") as running_on:
            await api.told_to_end()
            while (response := await client.post(f"{api.url}/answer")).status == 200:
                assert response.headers["connection"] == "close"
            assert (response.status, response.headers["connection"]) == (503, "close")
            assert json.loads(await response.text())["error"]["message"] == leaving.REFUSAL
            assert (await client.get(f"{api.url}/health")).status == 200
            api.goes_on.set()
            assert (await running_on.text()).endswith("last")

    run(tmp_path, test)


def test_serves_what_still_comes_until_the_nodes_have_learnt_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaving, "LINGER_SECONDS", 2 * PATIENCE_SECONDS)

    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        await api.told_to_end()
        response = await client.post(f"{api.url}/answer")
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert not api.ended.is_set()

    run(tmp_path, test, drain_seconds=3 * PATIENCE_SECONDS)


@pytest.mark.usefixtures("no_linger")
def test_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        async with client.post(f"{api.url}/stream") as response:
            assert await response.content.readany() == b"first "
            await api.told_to_end()
            await api.ended.wait()
            assert not api.goes_on.is_set()

    run(tmp_path, test, drain_seconds=0.05)


@pytest.mark.usefixtures("no_linger")
def test_does_not_wait_for_a_client_that_has_gone(tmp_path: Path) -> None:
    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        response = await client.post(f"{api.url}/stream")
        assert await response.content.readany() == b"first "
        await api.told_to_end()
        response.close()
        await api.ended.wait()

    run(tmp_path, test)


def test_ends_connections_while_its_instance_gives_way(tmp_path: Path) -> None:
    address = {StageId(instance=0, stage=0): "127.0.0.1:1000"}
    plan = make_plans("test", 1, 1, 1, address, Limits())[0]

    async def test(api: Api, client: aiohttp.ClientSession) -> None:
        async def connection() -> str | None:
            async with client.post(f"{api.url}/answer") as response:
                assert await response.text() == '"answer"'
                return response.headers.get("connection")

        assert api.store.put(plan) is None
        assert await connection() is None
        assert api.store.put(plan.model_copy(update={"version": 2, "draining": True})) is None
        assert await connection() == "close"

    run(tmp_path, test)
