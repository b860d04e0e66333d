"""What the controller watches, and whom an event wakes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from resilientllm_api.crd import KIND
from resilientllm_operator.caretaker import Caretaker
from resilientllm_operator.controller import WATCHED, Controller
from resilientllm_operator.engines import EngineHttp
from resilientllm_operator.freshness import Freshness
from resilientllm_operator.kube import ApiError, KubeClient


class Cluster(KubeClient):
    """Stands in for an API server without objects."""

    def __init__(self, may_list_nodes: bool) -> None:
        self._may_list_nodes = may_list_nodes
        self.refusal: ApiError | None = None

    async def pages(
        self, kind: str, namespace: str | None, selector: str = ""
    ) -> AsyncIterator[tuple[list[dict[str, Any]], int]]:
        if self.refusal is not None:
            raise self.refusal
        yield [], 1

    async def may_list(self, kind: str) -> bool:
        return self._may_list_nodes


def test_everything_is_watched_where_nodes_may_be_seen(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller(Cluster(may_list_nodes=True), None)
    asyncio.run(controller.wait_for_crd())
    assert controller.watched == WATCHED
    assert caplog.records == []


def test_an_operator_of_one_namespace_works_without_nodes_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    controller = Controller(Cluster(may_list_nodes=False), "default")
    asyncio.run(controller.wait_for_crd())
    assert set(WATCHED) - set(controller.watched) == {"Node"}
    (record,) = caplog.records
    assert "may not list nodes" in record.message and "resilientllm-operator-nodes" in record.message


def test_a_node_wakes_the_objects_with_pods_there_and_a_heartbeat_wakes_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    controller = Controller(Cluster(may_list_nodes=True), None)
    woken: list[tuple[str, str]] = []
    monkeypatch.setattr(controller, "_object_changed", woken.append)

    def node(version: int, name: str, heartbeat: str = "2026-11-21T12:00:00Z", **spec: Any) -> dict[str, Any]:
        condition = {"type": "Ready", "status": "True", "lastHeartbeatTime": heartbeat}
        metadata = {"name": name, "resourceVersion": str(version)}
        return {"metadata": metadata, "spec": spec, "status": {"conditions": [condition]}}

    def pod(name: str, on: str) -> dict[str, Any]:
        labels = {"resilientllm.dev/name": name}
        metadata = {"namespace": "n", "name": f"{name}-0", "resourceVersion": "1", "labels": labels}
        return {"metadata": metadata, "spec": {"nodeName": on}}

    controller.seen("Node", "ADDED", node(1, "node-1"))
    for name, on in (("here", "node-1"), ("there", "node-2")):
        controller.seen("Pod", "ADDED", pod(name, on))
    woken.clear()
    controller.seen("Node", "MODIFIED", node(2, "node-1", heartbeat="2026-11-21T12:00:10Z"))
    assert woken == []
    controller.seen("Node", "MODIFIED", node(3, "node-1", unschedulable=True))
    assert woken == [("n", "here")]
    controller.seen("Node", "DELETED", node(4, "node-1"))
    assert woken == [("n", "here")] * 2


def test_a_leader_that_stands_still_says_why_and_says_it_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever is woken by it reads the last lines of the log, which others fill meanwhile."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("resilientllm_operator.freshness.START_SECONDS", 0.0)
    monkeypatch.setattr("resilientllm_operator.freshness.DUE_SECONDS", -1.0)
    monkeypatch.setattr("resilientllm_operator.controller.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("resilientllm_operator.controller.REMIND_SECONDS", 0.0)
    cluster, freshness = Cluster(may_list_nodes=True), Freshness(WATCHED)
    refused = "does nothing until the view of the cluster is right again: "

    def said(*parts: str) -> int:
        return sum(all(part in record.message for part in parts) for record in caplog.records)

    async def until(reached: Callable[[], bool]) -> None:
        while not reached():
            await asyncio.sleep(0)

    async def rights_are_taken_and_given_back() -> None:
        async with asyncio.timeout(30):
            running = asyncio.create_task(Controller(cluster, None, freshness).run())
            await until(lambda: freshness.stale(time.monotonic()) is None)
            cluster.refusal = ApiError(403, "Forbidden", "pods is forbidden")
            with monkeypatch.context() as impatient:
                impatient.setattr("resilientllm_operator.freshness.MAX_AGE_SECONDS", 0.0)
                await until(lambda: said(refused, "; could not list: 403 Forbidden: pods is forbidden") >= 2)
                cluster.refusal = None
            await until(lambda: said("the view of the cluster is right again") > said(refused))
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(rights_are_taken_and_given_back())


def test_all_objects_share_one_http_session_with_their_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand connection pools would be a good part of the operator's memory."""
    sessions: list[EngineHttp | None] = []

    class Idle(Caretaker):
        async def run(self) -> None:
            sessions.append(self._http)
            await asyncio.Event().wait()

    monkeypatch.setattr("resilientllm_operator.controller.Caretaker", Idle)
    monkeypatch.setattr("resilientllm_operator.freshness.START_SECONDS", 0.0)

    async def two_objects_come() -> None:
        controller = Controller(Cluster(may_list_nodes=True), None)
        async with asyncio.timeout(30):
            running = asyncio.create_task(controller.run())
            for name in ("a", "b"):
                metadata = {"namespace": "n", "name": name, "uid": name, "resourceVersion": "2"}
                controller.seen(KIND, "ADDED", {"metadata": metadata})
            while len(sessions) < 2:
                await asyncio.sleep(0.01)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(two_objects_come())
    assert sessions[0] is not None and sessions[0] is sessions[1]
