"""Caretakers take turns, so that a thousand objects do not all have their manifests made at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from resilientllm_api.crd import API_VERSION, KIND
from resilientllm_operator import caretaker
from resilientllm_operator.actions import Action, Manifest
from resilientllm_operator.controller import ROUNDS, Controller
from resilientllm_operator.decide import decide
from resilientllm_operator.freshness import Freshness
from resilientllm_operator.world import World

from tests.operator.builders import spec

PATIENCE_SECONDS = 30.0
OBJECTS = 3 * ROUNDS


class Api:
    """Nobody else is there; what is made is made when ``answers`` is set."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.waiting = 0

    async def pages(self, kind: str, *_: Any) -> Any:
        yield ([obj(number) for number in range(OBJECTS)] if kind == KIND else []), 1

    async def get(self, *_: Any) -> None:
        return None

    async def create(self, kind: str, manifest: Manifest) -> Manifest:
        self.waiting += 1
        await self.answers.wait()
        return {**manifest, "metadata": {"uid": "made", **manifest["metadata"], "resourceVersion": "2"}, "status": {}}

    async def apply(self, kind: str, manifest: Manifest, subresource: str = "") -> Manifest:
        return await self.create(kind, manifest)


def obj(number: int) -> Manifest:
    name = f"model-{number}"
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": "n", "uid": name, "generation": 1, "resourceVersion": "1"},
        "spec": spec().model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def test_who_waits_has_decided_nothing_and_sees_the_world_as_it_is_when_the_turn_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decided: list[str] = []

    def noted(world: World, now: Any) -> list[Action]:
        decided.append(world.object.name)
        return decide(world, now)

    async def run() -> None:
        api = Api()
        controller = Controller(api, None, Freshness([]))  # type: ignore[arg-type]
        task = asyncio.create_task(controller.run())
        try:
            for number in range(OBJECTS):
                controller.seen(KIND, "ADDED", obj(number))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while api.waiting < ROUNDS:
                    await asyncio.sleep(0.01)
            assert len(decided) == ROUNDS
            late = next(number for number in range(OBJECTS) if f"model-{number}" not in decided)
            controller.seen(KIND, "DELETED", obj(late))
            api.answers.set()
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(set(decided)) < OBJECTS - 1:
                    await asyncio.sleep(0.01)
            assert f"model-{late}" not in decided
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    monkeypatch.setattr(caretaker, "decide", noted)
    asyncio.run(run())
