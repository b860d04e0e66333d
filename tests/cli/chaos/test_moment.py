"""When a fault comes: while there are streams for it to meet."""

from __future__ import annotations

import asyncio
import contextlib
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


def test_no_fault_comes_before_the_requests_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers_late(*_: Any) -> str:
        for _turn in range(10_000):
            await asyncio.sleep(0)
        return "model"

    async def streams(*_: Any) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(loads, "connect", lambda url: contextlib.nullcontext())
    monkeypatch.setattr(loads, "model_name", answers_late)
    monkeypatch.setattr(loads, "run_stream", streams)
    world = SimpleNamespace(shape=Shape(2, 2), url=str)
    scene = Scene(cast("World", world), Random(1), StageId(instance=0, stage=0))
    sent: list[int] = []
    kind = Kind("any", lambda scene: sent.append(len(scene.load.sent)))
    asyncio.run(under_load(scene, kind, Moment(Phase.PREFILL, 1, delay_seconds=0.0), "salt"))
    assert sent == [2 * STREAMS]
