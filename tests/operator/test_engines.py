"""The operator's conversation with an engine, over real HTTP with a stand-in for the engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_operator.engines import EngineAddress, EngineError, Engines
from resilientllm_operator.world import Contact, EngineView
from resilientllm_worker.engine.control_server import PlanStore, make_app

from tests.operator.builders import engine_state

TOKEN = "a" * 64
PATIENCE_SECONDS = 30.0
PLAN: Plan = make_plans("default/tiny", 3, 1, 1, {StageId(instance=0, stage=0): "10.0.0.1:7000"}, Limits())[0]


@dataclass
class Stand:
    """What the stand-in answers, and what it was told. It tells its state once an answer, as older engines do."""

    state: EngineState = field(default_factory=lambda: engine_state(0))
    status: int = 200
    tokens: int = 1
    answers: int = 0
    plans: list[Plan] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def guarded(self, handler: Callable[[web.Request], Awaitable[web.Response]]) -> Any:
        async def check(request: web.Request) -> web.Response:
            self.answers += 1
            if request.headers.get("Authorization") != f"Bearer {TOKEN}":
                return web.Response(status=401, text="no token")
            return web.Response(status=self.status) if self.status != 200 else await handler(request)

        return check

    async def get_state(self, _: web.Request) -> web.Response:
        return web.Response(text=self.state.model_dump_json(by_alias=True))

    async def put_plan(self, request: web.Request) -> web.Response:
        self.plans.append(Plan.model_validate_json(await request.text()))
        return web.Response(status=204)

    async def complete(self, request: web.Request) -> web.Response:
        assert "Authorization" not in request.headers, "the API server of an engine has no business with the token"
        self.asked.append(await request.json())
        if self.status != 200:
            return web.Response(status=self.status, text="no")
        return web.json_response({"usage": {"completion_tokens": self.tokens}})


@asynccontextmanager
async def meeting(stand: Stand, token: str = TOKEN) -> AsyncIterator[tuple[Engines, EngineAddress]]:
    app = web.Application()
    app.add_routes(
        [
            web.get("/v1/state", stand.guarded(stand.get_state)),
            web.put("/v1/plan", stand.guarded(stand.put_plan)),
            web.post("/v1/completions", stand.complete),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with Engines(token) as engines:
            address = EngineAddress("uid", "127.0.0.1", api_port=port, control_port=port)
            engines.keep([address], {})
            yield engines, address
    finally:
        await runner.cleanup()


def view_after(stand: Stand, *steps: Callable[[Engines, EngineAddress], Awaitable[None]], token: str = TOKEN) -> Any:
    async def run() -> EngineView:
        async with meeting(stand, token) as (engines, address):
            for step in steps:
                await step(engines, address)
            return engines.views["uid"]

    return asyncio.run(run())


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


def heard(contact: Contact = Contact.ANSWERS) -> Callable[[Engines, EngineAddress], Awaitable[None]]:
    async def step(engines: Engines, _: EngineAddress) -> None:
        await until(lambda: engines.views["uid"].contact is contact)

    return step


def answered(stand: Stand, times: int) -> Callable[[Engines, EngineAddress], Awaitable[None]]:
    """So many more answers."""

    async def step(_: Engines, __: EngineAddress) -> None:
        before = stand.answers
        await until(lambda: stand.answers >= before + times)

    return step


async def verify(engines: Engines, address: EngineAddress) -> None:
    await engines.verify(address, "uid/0/1", "tiny")


def becomes(stand: Stand, **changes: Any) -> Callable[[Engines, EngineAddress], Awaitable[None]]:
    async def change(_: Engines, __: EngineAddress) -> None:
        for name, value in changes.items():
            setattr(stand, name, value)

    return change


def test_an_engine_tells_its_state() -> None:
    stand = Stand()
    view = view_after(stand, heard())
    assert (view.contact, view.state) == (Contact.ANSWERS, stand.state)


def test_a_wrong_token_is_no_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilientllm_operator.engines.SILENCE_SECONDS", 0.1)
    assert view_after(Stand(), heard(Contact.SILENT), token="wrong").contact is Contact.SILENT


def test_missed_answers_are_no_silence_yet() -> None:
    stand = Stand()
    view = view_after(stand, heard(), becomes(stand, status=500), answered(stand, 3))
    assert (view.contact, view.state) == (Contact.ANSWERS, stand.state)


def test_too_many_of_them_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilientllm_operator.engines.SILENCE_SECONDS", 0.5)
    stand = Stand()
    view = view_after(stand, heard(), becomes(stand, status=500), heard(Contact.SILENT))
    assert (view.contact, view.state) == (Contact.SILENT, None)


def test_nobody_listening_is_silence_at_once() -> None:
    async def run() -> EngineView:
        async with Engines(TOKEN) as engines:
            engines.keep([EngineAddress("uid", "127.0.0.1", control_port=9)], {"uid": "uid/0/1"})
            assert engines.views["uid"].contact is Contact.UNKNOWN
            await until(lambda: engines.views["uid"].contact is Contact.SILENT)
            return engines.views["uid"]

    view = asyncio.run(run())
    assert (view.contact, view.verified) == (Contact.SILENT, None)


class TestAnEngineThatIsWatched:
    """The worker's own control server."""

    @asynccontextmanager
    async def watched(self, folder: Path) -> AsyncIterator[tuple[PlanStore, Engines, list[Contact]]]:
        store = PlanStore(0, folder / "plan.json")
        store.tell(state=engine_state(0), api_listens=True)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            config = uvicorn.Config(make_app(store, TOKEN.encode()), log_level="warning", lifespan="off")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server._serve(sockets=[listening]))
            changes: list[Contact] = []
            async with Engines(TOKEN, lambda: changes.append(engines.views["uid"].contact)) as engines:
                port = listening.getsockname()[1]
                engines.keep([EngineAddress("uid", "127.0.0.1", control_port=port)], {})
                await until(lambda: engines.views["uid"].contact is Contact.ANSWERS)
                yield store, engines, changes
            server.should_exit = True
            await serving

    def test_is_heard_when_something_matters(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long before its next heartbeat."""
        monkeypatch.setattr("resilientllm_worker.engine.control_server.STATE_HEARTBEAT_SECONDS", 10 * PATIENCE_SECONDS)
        monkeypatch.setattr("resilientllm_operator.engines._WATCH_TIMEOUT", aiohttp.ClientTimeout(total=None))

        async def run() -> None:
            async with self.watched(tmp_path) as (store, engines, changes):
                waits = engine_state(0, phase=EnginePhase.WAITING, serving=False)
                await asyncio.to_thread(store.tell, state=waits)
                await until(lambda: engines.views["uid"].state == waits)
                assert len(changes) == 2
                store.tell(leaving=True)
                await until(lambda: bool((state := engines.views["uid"].state) and state.leaving))

        asyncio.run(run())

    def test_tells_the_rest_from_time_to_time(self, tmp_path: Path) -> None:
        async def run() -> None:
            async with self.watched(tmp_path) as (store, engines, changes):
                loaded = engine_state(0, tokens_recomputed_total=7)
                store.tell(state=loaded)
                await until(lambda: engines.views["uid"].state == loaded)
                assert len(changes) == 1, "nothing that asks for a decision"

        asyncio.run(run())

    def test_tells_that_it_has_no_requests_any_more(self, tmp_path: Path) -> None:
        async def run() -> None:
            async with self.watched(tmp_path) as (store, engines, changes):
                for requests in (7, 0):
                    store.tell(state=engine_state(0, requests_running=requests))

                    def heard_so(requests: int = requests) -> bool:
                        state = engines.views["uid"].state
                        return state is not None and state.requests_running == requests

                    await until(heard_so)
                assert len(changes) == 3

        asyncio.run(run())

    def test_is_silent_when_it_says_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("resilientllm_worker.engine.control_server.STATE_HEARTBEAT_SECONDS", 10 * PATIENCE_SECONDS)
        monkeypatch.setattr("resilientllm_operator.engines.SILENCE_SECONDS", 0.2)
        monkeypatch.setattr("resilientllm_operator.engines._WATCH_TIMEOUT", aiohttp.ClientTimeout(sock_read=0.2))

        async def run() -> None:
            async with self.watched(tmp_path) as (_, __, changes):
                await until(lambda: Contact.SILENT in changes)

        asyncio.run(run())


def test_a_plan_is_told() -> None:
    stand = Stand()

    async def publish(engines: Engines, address: EngineAddress) -> None:
        await engines.publish(address, PLAN)

    view_after(stand, publish)
    assert stand.plans == [PLAN]


def test_a_refused_plan_is_an_error() -> None:
    stand = Stand(status=409)

    async def publish(engines: Engines, address: EngineAddress) -> None:
        with pytest.raises(EngineError, match=r"refused plan 3: 409"):
            await engines.publish(address, PLAN)

    view_after(stand, publish)


def test_a_real_token_is_proof() -> None:
    stand = Stand()
    view = view_after(stand, heard(), verify)
    assert (view.verified, view.verify_error) == ("uid/0/1", None)
    assert stand.asked[0]["max_tokens"] == 1 and stand.asked[0]["model"] == "tiny"


def test_no_token_is_no_proof() -> None:
    view = view_after(Stand(tokens=0), heard(), *5 * [verify])
    assert view.verified is None
    assert "gave 0 tokens" in view.verify_error


def test_an_error_is_no_proof() -> None:
    stand = Stand()
    view = view_after(stand, heard(), becomes(stand, status=500), *5 * [verify])
    assert "500 no" in view.verify_error


def test_an_api_that_does_not_listen_yet_is_no_trouble() -> None:
    stand = Stand()
    view = view_after(stand, heard(), becomes(stand, status=500), verify)
    assert (view.verified, view.verify_error) == (None, None)


@pytest.mark.parametrize(
    ("phase", "kept"),
    [(EnginePhase.RECOVERING, True), (EnginePhase.DEGRADED, True), (EnginePhase.WAITING, False)],
)
def test_the_proof_holds_as_long_as_it_serves(phase: EnginePhase, kept: bool) -> None:
    stand = Stand()
    view = view_after(stand, heard(), verify, becomes(stand, state=engine_state(0, phase=phase)), answered(stand, 2))
    assert (view.verified is not None) is kept


def test_engines_that_are_gone_are_forgotten() -> None:
    async def run() -> None:
        async with Engines(TOKEN) as engines:
            here = {uid: EngineAddress(uid, "127.0.0.1", control_port=9) for uid in ("a", "b")}
            engines.keep(here.values(), {"a": "a/0/1"})
            engines.keep([here["b"]], {})
            assert set(engines.views) == {"b"}

    asyncio.run(run())
