"""Engines that serve nothing: they take plans and tell states, as the operator sees them.

One server listens on all addresses. Which engine is meant says the address that a connection came to: in the network
of :mod:`e2e.cluster.lone` every pod's address is the server's own.

As a process of its own, for measurements: ``python -m e2e.simulation.engines``. Every stage lives, but those whose
addresses the last line of JSON on stdin names. It answers with the time at which the engines tell it
(:func:`time.monotonic`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from aiohttp import web
from resilientllm_api.engine_state import (
    STATE_HEARTBEAT_SECONDS,
    EnginePhase,
    EngineState,
    LossReason,
    Recovery,
    RecoveryKind,
    ReplicationState,
    StageServing,
)
from resilientllm_api.plan import Plan, StageId
from resilientllm_api.ports import ENGINE_API_PORT, ENGINE_CONTROL_PORT, PLAN_PATH, STATE_PATH

Do = Callable[[], Awaitable[web.StreamResponse]]
Gate = Callable[[str, Do], Awaitable[web.StreamResponse]]
"""Lets a write happen, or not: :mod:`e2e.simulation.gate`."""


@dataclass
class Engine:
    """One engine. ``instance`` is known from its pod, and until a plan comes from nowhere else."""

    instance: int = 0
    plan: Plan | None = None
    hosts: Set[str] = frozenset()
    """The stages' that the plan names."""
    state: EngineState = field(default_factory=lambda: EngineState(instance=0, phase=EnginePhase.STARTING))
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def line(self) -> bytes:
        """The state as it is told. There may be thousands of engines, each with a heartbeat."""
        if self._told is not self.state:
            self._told, self._line = self.state, self.state.model_dump_json(by_alias=True).encode() + b"\n"
        return self._line

    _told: EngineState | None = None
    _line: bytes = b""

    def look(self, stage_lives: Callable[[str], bool]) -> None:
        """Does what an engine does when a stage comes or goes, in no time."""
        if self.plan is None:
            return
        stages = tuple(_serving(self.plan, place, stage_lives) for place in range(len(self.plan.stages)))
        now = self._next_state(self.plan, stages)
        if now != self.state:
            self.state = now
            self.news.set()
            self.news = asyncio.Event()

    def _next_state(self, plan: Plan, stages: tuple[StageServing, ...]) -> EngineState:
        before = self.state
        lost = any(each.served_by is None for each in stages)
        at_home = all(each.served_by == own.id for each, own in zip(stages, plan.stages, strict=True))
        recoveries, total = before.recoveries, before.recoveries_total
        if before.stages and [each.served_by for each in before.stages] != [each.served_by for each in stages]:
            recoveries, total = (*recoveries, _recovery(before, stages, at_home))[-10:], total + 1
        return EngineState(
            instance=plan.instance,
            phase=EnginePhase.WAITING if lost else EnginePhase.SERVING if at_home else EnginePhase.DEGRADED,
            term=1,
            epoch=total,
            plan_version=plan.version,
            serving=not lost,
            on_own_stages=at_home,
            stages=stages,
            replication=tuple(
                ReplicationState(stage=place, kept_by=donors[0].id if donors else None, healthy=bool(donors))
                for place, donors in enumerate(plan.donors)
            ),
            block_tokens=16,
            recoveries=recoveries,
            recoveries_total=total,
        )


@dataclass
class Engines:
    """``async with`` it. ``stage_lives`` says whether a stage at an address (host:port) answers engines."""

    stage_lives: Callable[[str], bool] = lambda address: True
    gate: Gate | None = None
    engines: dict[str, Engine] = field(default_factory=dict)
    """By the address of their pod."""
    violations: list[str] = field(default_factory=list)
    """What no operator may ever do."""
    _contents: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """What every plan said, by object, instance and version."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.add_routes(
            [
                web.get(STATE_PATH, self._get_state),
                web.put(PLAN_PATH, self._put_plan),
                web.post("/v1/completions", self._complete),
            ]
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        for port in (ENGINE_CONTROL_PORT, ENGINE_API_PORT):
            await web.TCPSite(runner, "0.0.0.0", port, backlog=4096).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def look(self, addresses: Collection[str] | None = None) -> None:
        """Stages have come or gone, those at these addresses; None: perhaps anywhere."""
        for engine in self.engines.values():
            if addresses is None or not engine.hosts.isdisjoint(addresses):
                engine.look(self.stage_lives)

    def _engine(self, request: web.Request) -> Engine:
        assert request.transport is not None
        return self.engines.setdefault(request.transport.get_extra_info("sockname")[0], Engine())

    async def _get_state(self, request: web.Request) -> web.StreamResponse:
        engine = self._engine(request)
        if "watch" not in request.query:
            return web.Response(body=engine.line, content_type="application/json")
        answer = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                news = engine.news
                await answer.write(engine.line)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), STATE_HEARTBEAT_SECONDS)
        return answer

    async def _put_plan(self, request: web.Request) -> web.StreamResponse:
        plan = Plan.model_validate_json(await request.read())
        engine = self._engine(request)
        what = f"PUT plan {plan.version} to instance {plan.instance}"
        return await self._through(what, lambda: self._take(engine, plan))

    async def _take(self, engine: Engine, plan: Plan) -> web.StreamResponse:
        content = plan.model_dump_json()
        known = self._contents.setdefault((plan.name, plan.instance, plan.version), content)
        if known != content:
            self.violations.append(f"version {plan.version} names two plans: {known} and {content}")
        if engine.plan is not None and plan.version < engine.plan.version:
            return web.Response(status=409, text=f"version {plan.version} is older than {engine.plan.version}")
        engine.plan = plan
        engine.hosts = {ref.address.partition(":")[0] for refs in (plan.stages, *plan.donors) for ref in refs}
        engine.look(self.stage_lives)
        return web.Response(status=204)

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        async def answer() -> web.StreamResponse:
            return web.json_response({"usage": {"completion_tokens": 1}})

        return await self._through("POST completions", answer)

    async def _through(self, what: str, do: Do) -> web.StreamResponse:
        return await do() if self.gate is None else await self.gate(what, do)


def _serving(plan: Plan, place: int, stage_lives: Callable[[str], bool]) -> StageServing:
    own = plan.stages[place]
    living = [donor.id for donor in plan.donors[place] if stage_lives(donor.address)]
    connected = stage_lives(own.address)
    avoid = {*plan.leaving, *plan.lost}
    able = [own.id] if connected and own.id not in plan.lost else []
    # The own stage if it is to stay, a donor that is, and in need whoever is there.
    order = [each for each in (*able, *living) if each not in avoid] + able + living
    served_by: StageId | None = next(iter(order), None)
    return StageServing(stage=place, served_by=served_by, own_connected=connected, donors_connected=len(living))


def _recovery(before: EngineState, stages: tuple[StageServing, ...], at_home: bool) -> Recovery:
    changed = [new for old, new in zip(before.stages, stages, strict=True) if old.served_by != new.served_by]
    now = datetime.now(UTC)
    return Recovery(
        id=f"1-{before.epoch + 1}",
        kind=RecoveryKind.SWAP_BACK if at_home else RecoveryKind.BORROW,
        stages=tuple(each.stage for each in changed),
        reason=None if at_home else LossReason.RESET,
        served_by=tuple(each.served_by for each in changed if each.served_by is not None),
        detected_at=now,
        resumed_at=now,
        phases_ms={"total": 12.0},
    )


async def _serve() -> None:
    lost: set[str] = set()
    async with Engines(stage_lives=lambda address: address.partition(":")[0] not in lost) as engines:
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            before, now = set(lost), set(json.loads(line))
            lost.clear()
            lost.update(now)
            engines.look(before ^ now)
            print(time.monotonic(), flush=True)


if __name__ == "__main__":
    asyncio.run(_serve())
