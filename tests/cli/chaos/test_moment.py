"""When a fault comes: while there are streams for it to meet."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from resilientllm_api.plan import StageId
from resilientllm_cli.chaos import load as loads
from resilientllm_cli.chaos.load import STREAMS, Phase
from resilientllm_cli.chaos.run import Moment, under_load
from resilientllm_cli.chaos.scene import Kind, Scene
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.chaos.world import World
from resilientllm_cli.streams import OnToken, Sampling, Stream

BOUND_SECONDS = 30.0


async def answers_late(*_: Any) -> str:
    for _turn in range(10_000):
        await asyncio.sleep(0)
    return "model"


def strike(moment: Moment, inject: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch, run_stream: Any) -> None:
    monkeypatch.setattr(loads, "connect", lambda url, reuse: contextlib.nullcontext())
    monkeypatch.setattr(loads, "model_name", answers_late)
    monkeypatch.setattr(loads, "run_stream", run_stream)
    world = SimpleNamespace(shape=Shape(2, 2), url=str)
    scene = Scene(cast("World", world), Random(1), StageId(instance=0, stage=0))
    asyncio.run(under_load(scene, Kind("any", inject), moment, "salt"))


def test_no_fault_comes_before_the_requests_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ends_at_once(*_: Any) -> None:
        await asyncio.sleep(0)

    sent: list[int] = []
    moment = Moment(Phase.PREFILL, 1, delay_seconds=0.0)
    strike(moment, lambda scene: sent.append(len(scene.load.sent)), monkeypatch, ends_at_once)
    assert sent == [2 * STREAMS]


@pytest.mark.parametrize("phase", Phase)
def test_a_fault_does_not_wait_until_streams_that_are_faster_than_ever_are_over(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck = threading.Event()
    met: list[bool] = []

    async def lasts_until_the_fault(
        client: object, model: str, prompt: object, sampling: Sampling, stream: Stream, on_token: OnToken, pause: float
    ) -> None:
        stream.tokens += [1, 2, 3]
        on_token(stream)
        deadline = time.monotonic() + BOUND_SECONDS
        while not struck.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        met.append(struck.is_set())

    moment = Moment(phase, 3, delay_seconds=2 * BOUND_SECONDS)
    strike(moment, lambda scene: struck.set(), monkeypatch, lasts_until_the_fault)
    assert met == [True] * 2 * STREAMS
