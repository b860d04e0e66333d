"""A caretaker's object is in the operator's metrics as long as it is taken care of, and no longer."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from prometheus_client import REGISTRY
from resilientllm_api.crd import API_VERSION, KIND
from resilientllm_operator.actions import Manifest
from resilientllm_operator.caretaker import Caretaker
from resilientllm_operator.store import Store

from tests.operator.builders import UID, spec

PATIENCE_SECONDS = 30.0
OF = {"namespace": "default", "name": "seen"}


class Api:
    """Has what it was given, and does all that is asked of it."""

    def __init__(self, obj: Manifest) -> None:
        self._versions = itertools.count(2)
        self._obj = obj

    async def get(self, kind: str, namespace: str, name: str) -> None:
        return None

    async def create(self, kind: str, manifest: Manifest) -> Manifest:
        return self._stored(manifest)

    async def apply(self, kind: str, manifest: Manifest, subresource: str = "") -> Manifest:
        return self._stored(self._obj | {"status": manifest["status"]} if subresource else manifest)

    def _stored(self, manifest: Manifest) -> Manifest:
        number = next(self._versions)
        metadata = {"uid": f"uid-{number}", **manifest["metadata"], "resourceVersion": str(number)}
        return {"status": {}, **manifest, "metadata": metadata}


def told(metric: str, /, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(metric, labels)


async def until(holds: Any) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not holds():
            await asyncio.sleep(0.01)


def test_from_the_first_round_until_the_object_is_gone() -> None:
    obj: Manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "seen", "namespace": "default", "uid": UID, "generation": 1, "resourceVersion": "1"},
        "spec": spec().model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    written = {"action": "WriteStatus", "result": "ok"}

    async def live() -> None:
        before = told("resilientllm_operator_actions_total", **written) or 0.0
        store = Store(lambda kind, changed: None)
        store.put(KIND, obj)
        caretaker = Caretaker(Api(obj), store, "default", "seen", UID, {})  # type: ignore[arg-type]
        task = asyncio.create_task(caretaker.run())
        try:
            await until(lambda: told("resilientllm_condition", **OF, type="Available", status="False") == 1)
            assert (told("resilientllm_instances", **OF), told("resilientllm_instances_serving", **OF)) == (2, 0)
            assert told("resilientllm_operator_recoveries_total", **OF, kind="Borrow", reason="StepOverdue") == 0
            assert told("resilientllm_operator_decisions_total", action="WriteStatus") is not None
            assert (told("resilientllm_operator_actions_total", **written) or 0.0) > before
            store.keep_only(KIND, (), 10_000)
            caretaker.wake()
            await asyncio.wait_for(task, PATIENCE_SECONDS)
        finally:
            task.cancel()

    asyncio.run(live())
    assert told("resilientllm_instances", **OF) is None
    assert told("resilientllm_operator_recoveries_total", **OF, kind="Borrow", reason="StepOverdue") is None
