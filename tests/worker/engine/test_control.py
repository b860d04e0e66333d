"""Plans reach EngineCore and its state comes back, whoever of the two processes starts, dies or talks nonsense."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_worker.engine.control_link import ControlLink
from resilientllm_worker.engine.control_server import ControlSocket, PlanStore
from resilientllm_worker.seams.launch import BadConfiguration

PATIENCE_SECONDS = 30.0


class FakePipeline:
    def __init__(self) -> None:
        self.plans: queue.SimpleQueue[Plan] = queue.SimpleQueue()
        self.says = EngineState(instance=0, phase=EnginePhase.ATTACHING)

    def set_plan(self, plan: Plan) -> None:
        self.plans.put(plan)

    def state(self) -> EngineState:
        return self.says


def a_plan(version: int = 1, instance: int = 0, port: int = 1000) -> Plan:
    addresses = {StageId(instance=i, stage=0): f"127.0.0.1:{port + i}" for i in range(2)}
    return make_plans("test", version, 2, 1, addresses, Limits())[instance]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(0, tmp_path / "plan.json")


@pytest.fixture
def control(store: PlanStore) -> Iterator[ControlSocket]:
    control = ControlSocket(store)
    yield control
    control.close()


class TestPlans:
    def test_a_newer_plan_replaces_the_one_at_hand(self, store: PlanStore) -> None:
        assert store.put(a_plan(1)) is None
        assert store.put(a_plan(2, port=2000)) is None
        assert store.plan == a_plan(2, port=2000)

    def test_the_same_plan_again_is_taken(self, store: PlanStore) -> None:
        store.put(a_plan(1))
        assert store.put(a_plan(1)) is None

    @pytest.mark.parametrize(
        ("refused", "why"),
        [(a_plan(1), "older"), (a_plan(2, port=2000), "another content"), (a_plan(3, instance=1), "instance")],
    )
    def test_a_plan_that_cannot_be_meant_is_refused(self, store: PlanStore, refused: Plan, why: str) -> None:
        store.put(a_plan(2))
        assert why in str(store.put(refused))
        assert store.plan == a_plan(2)

    def test_it_is_there_again_after_a_restart(self, store: PlanStore, tmp_path: Path) -> None:
        store.put(a_plan(4))
        assert PlanStore(0, tmp_path / "plan.json").plan == a_plan(4)

    def test_it_counts_although_it_cannot_be_kept(self, tmp_path: Path) -> None:
        store = PlanStore(0, tmp_path / "no such folder" / "plan.json")
        assert store.put(a_plan(1)) is None
        assert store.plan == a_plan(1)

    def test_a_file_that_is_no_plan_is_a_configuration_error(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text("{}")
        with pytest.raises(BadConfiguration, match=r"plan\.json"):
            PlanStore(0, tmp_path / "plan.json")

    def test_the_plan_of_another_instance_is_a_configuration_error(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text(a_plan(instance=1).model_dump_json(by_alias=True))
        with pytest.raises(BadConfiguration, match="for instance 1, not 0"):
            PlanStore(0, tmp_path / "plan.json")


class TestEngineCore:
    def link(self, control: ControlSocket, pipeline: FakePipeline, on_orphaned: Any = lambda: None) -> ControlLink:
        return ControlLink(control.path, pipeline, on_orphaned)  # type: ignore[arg-type]

    def test_gets_the_plan_at_hand_and_every_later_one(self, store: PlanStore, control: ControlSocket) -> None:
        store.put(a_plan(1))
        pipeline = FakePipeline()
        link = self.link(control, pipeline)
        assert pipeline.plans.get(timeout=PATIENCE_SECONDS) == a_plan(1)
        store.put(a_plan(2))
        assert pipeline.plans.get(timeout=PATIENCE_SECONDS) == a_plan(2)
        link.close()

    def test_tells_its_state_when_it_changes(self, store: PlanStore, control: ControlSocket) -> None:
        pipeline = FakePipeline()
        link = self.link(control, pipeline)
        assert eventually(lambda: store.state.phase is EnginePhase.ATTACHING)
        pipeline.says = EngineState(instance=0, phase=EnginePhase.SERVING, serving=True)
        assert eventually(lambda: store.state.serving)
        link.close()

    def test_has_gone_when_its_connection_ends(self, store: PlanStore, control: ControlSocket) -> None:
        pipeline = FakePipeline()
        pipeline.says = EngineState(instance=0, phase=EnginePhase.SERVING, serving=True)
        link = self.link(control, pipeline)
        assert eventually(lambda: store.state.serving)
        link.close()
        assert eventually(lambda: store.state.phase is EnginePhase.STARTING)
        assert not store.state.serving

    def test_may_be_replaced_by_another_one(self, store: PlanStore, control: ControlSocket) -> None:
        store.put(a_plan(3))
        self.link(control, FakePipeline()).close()
        pipeline = FakePipeline()
        link = self.link(control, pipeline)
        assert pipeline.plans.get(timeout=PATIENCE_SECONDS) == a_plan(3)
        link.close()

    def test_may_die_in_the_middle_of_a_word(self, store: PlanStore, control: ControlSocket) -> None:
        store.put(a_plan(3))  # which it never reads, so that its end is a reset
        with socket.socket(socket.AF_UNIX) as dying:
            dying.connect(str(control.path))
            dying.sendall(b'{"instance": 0, "pha')
        pipeline = FakePipeline()
        link = self.link(control, pipeline)
        assert pipeline.plans.get(timeout=PATIENCE_SECONDS) == a_plan(3)
        assert eventually(lambda: store.state.phase is EnginePhase.ATTACHING)
        link.close()

    def test_that_fails_has_said_so_for_good(self, store: PlanStore, control: ControlSocket) -> None:
        link = self.link(control, FakePipeline())
        link.report_failure("stage 0.1 was started with other settings")
        assert eventually(lambda: store.state.phase is EnginePhase.FAILED)
        link.close()
        assert "other settings" in store.state.message
        assert store.state.phase is EnginePhase.FAILED

    def test_ends_when_the_api_server_has_gone(self, tmp_path: Path) -> None:
        """Else it would hold its stages, for nobody, against the engine that follows."""
        path, orphaned = tmp_path / "control", threading.Event()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(1)
            ControlLink(path, FakePipeline(), orphaned.set)  # type: ignore[arg-type]
            peer, _ = server.accept()
            peer.close()
        assert orphaned.wait(PATIENCE_SECONDS)

    def test_that_ends_itself_is_no_orphan(self, control: ControlSocket) -> None:
        orphaned = threading.Event()
        before = threading.active_count()
        link = self.link(control, FakePipeline(), orphaned.set)
        link.close()
        assert eventually(lambda: threading.active_count() <= before + 1)  # the other end waits for the next plan
        assert not orphaned.is_set()

    def test_ignores_what_is_no_plan(self, tmp_path: Path) -> None:
        path, pipeline = tmp_path / "control", FakePipeline()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(1)
            link = ControlLink(path, pipeline, lambda: None)  # type: ignore[arg-type]
            peer, _ = server.accept()
            peer.sendall(b"{}\nnonsense\n" + a_plan(5).model_dump_json(by_alias=True).encode() + b"\n")
            assert pipeline.plans.get(timeout=PATIENCE_SECONDS) == a_plan(5)
            link.close()
            peer.close()


def test_an_engine_whose_api_nobody_can_reach_does_not_serve(store: PlanStore) -> None:
    store.tell(state=EngineState(instance=0, phase=EnginePhase.SERVING, serving=True))
    assert not store.public_state().serving
    store.tell(api_listens=True)
    assert store.public_state() == store.state


def test_an_engine_that_was_told_to_end_serves_nothing_new(store: PlanStore) -> None:
    store.tell(state=EngineState(instance=0, phase=EnginePhase.DEGRADED, serving=True), api_listens=True, leaving=True)
    state = store.public_state()
    assert (state.phase, state.serving, state.leaving) == (EnginePhase.DEGRADED, False, True)


@pytest.mark.parametrize(
    ("taken", "running", "waiting", "told"), [(0, 0, 0, 0), (3, 0, 0, 3), (3, 2, 1, 1), (3, 1, 0, 2), (1, 0, 5, 5)]
)
def test_a_request_counts_before_the_scheduler_knows_of_it(
    store: PlanStore, taken: int, running: int, waiting: int, told: int
) -> None:
    state = EngineState(instance=0, phase=EnginePhase.SERVING, requests_running=running, requests_waiting=waiting)
    store.tell(state=state, requests=taken)
    assert store.public_state().requests_waiting == told
