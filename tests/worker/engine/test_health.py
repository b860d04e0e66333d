"""``/health`` and the engine's state say that work does not move, whatever of the engine still answers."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client import CollectorRegistry
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, StageId
from resilientllm_worker.engine import health
from resilientllm_worker.engine.control_server import PlanStore
from resilientllm_worker.engine.metrics import Metrics

PATIENCE_SECONDS = 30.0


def a_store(tmp_path: Path) -> PlanStore:
    store = PlanStore(0, tmp_path / "plan.json")
    addresses = {StageId(instance=i, stage=0): f"127.0.0.1:{1000 + i}" for i in range(2)}
    plan = make_plans("test", 1, 2, 1, addresses, Limits(sick_after_seconds=0.2))[0]
    assert store.put(plan) is None
    store.api_listens = True
    return store


@contextmanager
def watched(store: PlanStore) -> Iterator[None]:
    stopped = threading.Event()
    thread = threading.Thread(target=health.watch, args=(store, Metrics(CollectorRegistry()), stopped))
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def says(store: PlanStore, **changes: Any) -> None:
    state = EngineState(instance=0, phase=EnginePhase.SERVING, serving=True).model_copy(update=changes)
    store.tell(state=state, heard_at=time.monotonic())


def wait(store: PlanStore, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, store.public_state()
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_SECONDS", 0.02)


def test_requests_of_which_nothing_comes_make_it_sick_and_a_step_makes_it_well(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    says(store, requests_running=3)
    with watched(store):
        wait(store, lambda: bool(store.sick))
        state = store.public_state()
        assert not state.serving and state.sick.startswith("there are requests, and no step has been done")
        says(store, requests_running=3, steps_total=1)
        wait(store, lambda: not store.sick)
        assert store.public_state().serving


def test_requests_that_engine_core_never_heard_of_count(tmp_path: Path) -> None:
    """It may be stopped itself."""
    store = a_store(tmp_path)
    says(store)
    store.requests = 1
    with watched(store):
        wait(store, lambda: bool(store.sick))


def test_an_engine_core_that_says_nothing_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STATE_AT_LEAST_SECONDS", 0.02)
    store = a_store(tmp_path)
    says(store)
    with watched(store):
        wait(store, lambda: "EngineCore says nothing" in store.sick)


def test_a_pipeline_that_waits_for_a_stage_is_sick_after_a_while_although_nobody_asks(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    says(store, phase=EnginePhase.WAITING, serving=False, message="waits for stage 0.0")
    with watched(store):
        wait(store, lambda: store.sick.endswith("waits for stage 0.0"))
        says(store)
        wait(store, lambda: not store.sick)


def test_an_engine_that_starts_is_not_sick_however_long_that_takes(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    store.requests = 1
    with watched(store):
        says(store, phase=EnginePhase.ATTACHING, serving=False)
        looks = Mock(wraps=store.public_state)
        store.public_state = looks  # type: ignore[method-assign]
        wait(store, lambda: looks.call_count > 50)
        assert not store.sick
        says(store, phase=EnginePhase.WAITING, serving=False)
        wait(store, lambda: bool(store.sick))


def asked(store: PlanStore, path: str) -> tuple[int, bytes]:
    """What a client gets: 200 if it is left to vLLM."""

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    health._store = store
    middleware = health.Middleware(vllm)
    asyncio.run(middleware({"type": "http", "method": "GET", "path": path}, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], sent[1]["body"]


def test_health_is_503_with_the_reason_while_it_is_sick_and_all_else_is_left_alone(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    assert asked(store, "/health")[0] == 200
    store.sick = "no step has been done for 31 s"
    status, body = asked(store, "/health")
    assert (status, json.loads(body)) == (503, {"error": store.sick})
    assert asked(store, "/v1/models")[0] == 200


def test_it_is_put_in_front_of_the_api(tmp_path: Path) -> None:
    args = Namespace(middleware=["other.Middleware"])
    health.tell_the_truth(args, a_store(tmp_path))
    assert args.middleware == ["other.Middleware", "resilientllm_worker.engine.health.Middleware"]
