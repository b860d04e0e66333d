"""The client of the Kubernetes API, over real HTTP with a stand-in for the API server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from resilientllm_operator.kube import REQUESTS, KubeClient
from resilientllm_operator.permit import NotPermitted

POD = {"metadata": {"namespace": "n", "name": "a"}}
LEASE = {"metadata": {"namespace": "n", "name": "lease", "resourceVersion": "1"}}


class Stand:
    """Answers when it is told to, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = asyncio.Event()

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append(f"{request.method} {request.path.rpartition('/')[2]}")
        if "leases" not in request.path:
            await self.answers.wait()
        return web.json_response({"kind": "Pod", "metadata": {"resourceVersion": "2"}})


@asynccontextmanager
async def meeting() -> AsyncIterator[tuple[Stand, KubeClient]]:
    stand, app = Stand(), web.Application()
    app.router.add_route("*", "/{path:.*}", stand.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with KubeClient(f"http://127.0.0.1:{runner.addresses[0][1]}", None, dict[str, str]) as kube:
            yield stand, kube
    finally:
        await runner.cleanup()


async def until(what: Any) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.01)


def test_many_writes_take_turns_and_the_lease_does_not_wait_for_its() -> None:
    async def run() -> None:
        async with meeting() as (stand, kube), asyncio.TaskGroup() as tasks:
            for _ in range(3 * REQUESTS):
                tasks.create_task(kube.create("Pod", POD))
            await until(lambda: len(stand.asked) == REQUESTS)
            await kube.update("Lease", LEASE)
            assert stand.asked[REQUESTS:] == ["PUT lease"]
            stand.answers.set()
            await until(lambda: len(stand.asked) == 3 * REQUESTS + 1)

    asyncio.run(run())


def test_who_may_not_act_any_more_when_the_turn_comes_does_not_write() -> None:
    async def run() -> None:
        async with meeting() as (stand, kube):
            first = [asyncio.create_task(kube.create("Pod", POD)) for _ in range(REQUESTS)]
            await until(lambda: len(stand.asked) == REQUESTS)
            late = asyncio.create_task(kube.create("Pod", POD))
            await asyncio.sleep(0)
            kube.permit = lambda: "another replica has the lease"
            stand.answers.set()
            await asyncio.gather(*first)
            with pytest.raises(NotPermitted, match="another replica"):
                await late
            assert len(stand.asked) == REQUESTS
            await kube.get("Pod", "n", "a")
            await kube.update("Lease", LEASE)

    asyncio.run(run())


def test_a_list_comes_by_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with meeting() as (stand, kube):
            stand.answers.set()
            asked: list[Any] = []

            async def page(*_: Any, params: dict[str, str], **__: Any) -> dict[str, Any]:
                asked.append(dict(params))
                more = {"continue": "more"} if len(asked) < 3 else {}
                return {"items": [{"number": len(asked)}], "metadata": {"resourceVersion": "7", **more}}

            monkeypatch.setattr(kube, "_request", page)
            found = [items async for items in kube.pages("Pod", None, "a=b")]
            assert found == [([{"number": number}], 7) for number in (1, 2, 3)]
            assert [each.get("continue") for each in asked] == [None, "more", "more"]

    asyncio.run(run())
