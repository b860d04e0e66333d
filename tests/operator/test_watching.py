"""What kopf's requests say about its watches, over real HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from itertools import islice

import aiohttp
import pytest
from aiohttp import web
from resilientllm_operator import watching
from resilientllm_operator.freshness import Freshness

PODS = "/api/v1/pods"
PODS_OF_ONE_NAMESPACE = "/api/v1/namespaces/default/pods"


def after(
    trace: Callable[[Freshness], aiohttp.TraceConfig], *, status: int, ask: str, get: bool = True, long_ago: bool = True
) -> Freshness:
    """Pods were listed 40 seconds ago; then a request for ``ask`` was answered with ``status`` (0: nobody listens)."""

    async def run() -> Freshness:
        freshness = Freshness(("Pod",))
        freshness.listed("Pod", time.monotonic() - (40.0 if long_ago else 0.0))

        async def answer(_: web.Request) -> web.Response:
            return web.Response(status=status)

        async with (
            serving(answer if status else None) as server,
            aiohttp.ClientSession(trace_configs=[trace(freshness)]) as session,
        ):
            with contextlib.suppress(aiohttp.ClientError):
                await session.request("GET" if get else "POST", server + ask)
        return freshness

    return asyncio.run(run())


@contextlib.asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.Response]] | None):  # type: ignore[no-untyped-def]
    app = web.Application()
    if answer is not None:
        app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    address = f"http://127.0.0.1:{runner.addresses[0][1]}"
    if answer is None:
        await runner.cleanup()
    try:
        yield address
    finally:
        await runner.cleanup()


def age(freshness: Freshness) -> float:
    return freshness.age("Pod", time.monotonic())


@pytest.mark.parametrize("path", [PODS, PODS_OF_ONE_NAMESPACE])
def test_a_watch_that_is_opened_vouches_for_its_kind(path: str) -> None:
    assert age(after(watching.trace_of_kopf, status=200, ask=f"{path}?watch=true&resourceVersion=7")) < 30


@pytest.mark.parametrize("path", ["/api/v1/services?watch=true", "/api/v1/namespaces/default/pods/a"])
def test_nothing_else_does(path: str) -> None:
    assert 30 < age(after(watching.trace_of_kopf, status=200, ask=path)) < float("inf")


def test_a_list_of_kopfs_means_that_deletions_may_be_missing() -> None:
    assert age(after(watching.trace_of_kopf, status=200, ask=PODS)) == float("inf")
    assert age(after(watching.trace, status=200, ask=PODS)) < float("inf")


@pytest.mark.parametrize("status", [500, 503, 0])
def test_an_api_server_that_does_not_answer_makes_all_views_stale(status: int) -> None:
    freshness = after(watching.trace, status=status, ask="/apis/coordination.k8s.io/v1/leases")
    assert "the API server" in str(freshness.stale(time.monotonic()))


@pytest.mark.parametrize(("get", "status"), [(True, 404), (True, 410), (True, 429), (False, 403), (False, 500)])
def test_a_refusal_does_not(get: bool, status: int) -> None:
    """A webhook that fails is told as 500, too; the views are right all the same."""
    assert after(watching.trace, status=status, ask=PODS, get=get, long_ago=False).stale(time.monotonic()) is None


@pytest.mark.parametrize("others", [True, False])
def test_a_write_that_takes_too_long_tells_of_an_api_server_that_is_gone_only_if_nobody_else_is_answered(
    others: bool,
) -> None:
    async def run() -> str | None:
        freshness, hangs, asked = Freshness(("Pod",)), asyncio.Event(), asyncio.Event()
        freshness.listed("Pod", time.monotonic())

        async def answer(request: web.Request) -> web.Response:
            if request.method == "POST":
                asked.set()
                await hangs.wait()
            return web.Response()

        async with (
            serving(answer) as server,
            aiohttp.ClientSession(trace_configs=[watching.trace(freshness)]) as session,
        ):
            await session.get(f"{server}/readyz")
            slow = asyncio.create_task(session.post(server + PODS, timeout=aiohttp.ClientTimeout(total=1.0)))
            await asked.wait()
            if others:
                await session.get(f"{server}/readyz")
            with pytest.raises(TimeoutError):
                await slow
            hangs.set()
        return freshness.stale(time.monotonic())

    assert (asyncio.run(run()) is None) == others


def test_kopf_never_gives_up() -> None:
    assert len(list(islice(watching.Backoff(), 10_000))) == 10_000
    assert max(islice(watching.Backoff(), 10)) <= 2.0
