"""The engine's pipeline over stage servers: what one tells is what the other judges. Only the model is a fake."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, EngineState, LossReason
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, StageId
from resilientllm_worker.engine.pipeline import LOST_STEP, Pipeline
from resilientllm_worker.protocol.messages import Stamp, Step
from resilientllm_worker.stage.deadline import FEW

from tests.worker.stage.builders import DIGEST, GROUPS, HOME_BLOCKS, PATIENCE_SECONDS, TOKEN, Stage, a_step

LIMITS = Limits(heartbeat_interval_seconds=0.05, heartbeat_timeout_seconds=2.0, step_floor_seconds=0.5)


class Whole:
    """Two instances of two stages, and the pipeline of the first."""

    def __init__(self, stack: ExitStack) -> None:
        self.stages = {
            StageId(instance=instance, stage=stage): stack.enter_context(Stage(stage, has_kv=True, instance=instance))
            for instance in range(2)
            for stage in range(2)
        }
        self.pipeline = Pipeline(0, DIGEST, TOKEN)
        stack.callback(self.pipeline.close)
        addresses = {name: stage.address for name, stage in self.stages.items()}
        self.pipeline.set_plan(make_plans("test", 1, 2, 2, addresses, LIMITS)[0])
        self.pipeline.wait_connected()
        self.pipeline.allocate_kv("LBHNC", HOME_BLOCKS, dict.fromkeys(range(2), GROUPS))
        self.pipeline.open()

    def __getitem__(self, name: str) -> Stage:
        return self.stages[StageId.parse(name)]

    def submit(self) -> Future[Any]:
        def make(stamp: Stamp, number: int) -> tuple[Step, Step]:
            step = a_step(number, stamp.epoch, stamp.term)
            return step, step

        return self.pipeline.submit(self.pipeline.boundary(PATIENCE_SECONDS).stamp, make)

    def run(self, steps: int) -> None:
        """Several in flight, as an engine has them."""
        flying: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        for number in range(steps + 2):
            if number < steps:
                flying.put(self.submit())
            if number >= 2:
                assert flying.get().result(PATIENCE_SECONDS) is not LOST_STEP

    def wait(self, holds: Any) -> EngineState:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(state := self.pipeline.state()):
            assert time.monotonic() < deadline, state
            time.sleep(0.01)
        return state


@pytest.fixture
def whole() -> Iterator[Whole]:
    with ExitStack() as stack:
        yield Whole(stack)


def test_steps_that_flow_are_not_suspected_nor_is_an_idle_pipeline(whole: Whole) -> None:
    before = whole.pipeline.boundary().stamp
    for _ in range(4):
        whole.run(200)
        threading.Event().wait(2 * LIMITS.heartbeat_interval_seconds)
    assert whole.pipeline.boundary().stamp == before
    assert whole.pipeline.state().steps_total == 800


def test_a_long_step_is_awaited(whole: Whole) -> None:
    """The first ones of their size, so they may compile something."""
    before = whole.pipeline.boundary().stamp
    whole["0.1"].model.go.clear()
    future = whole.submit()
    assert whole["0.1"].model.within.wait(PATIENCE_SECONDS)
    threading.Event().wait(2 * LIMITS.step_floor_seconds)
    whole["0.1"].model.go.set()
    assert future.result(PATIENCE_SECONDS) is not LOST_STEP
    assert whole.pipeline.boundary().stamp == before


@pytest.mark.parametrize("place", [0, 1])
def test_a_stage_that_stays_in_a_step_is_replaced_and_used_again_when_it_comes_out(whole: Whole, place: int) -> None:
    whole.run(FEW + 1)
    stuck = whole[f"0.{place}"].model
    stuck.go.clear()
    flying = [whole.submit() for _ in range(3)]
    assert all(future.result(PATIENCE_SECONDS) is LOST_STEP for future in flying)
    state = whole.wait(lambda state: bool(state.recoveries))
    assert (state.recoveries[0].reason, state.recoveries[0].stages) == (LossReason.HANG, (place,))
    assert str(state.stages[place].served_by) == f"1.{place}"
    whole.run(5)
    stuck.go.set()
    whole.wait(lambda state: state.phase is EnginePhase.SERVING)
    whole.run(5)
