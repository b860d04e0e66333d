"""A stage gives its weights on the port that it serves on, while it serves, and never in the way of a step."""

from __future__ import annotations

import threading

import pytest
from resilientllm_worker.protocol.messages import StepResult, WeightsHello
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.weights.giver import give
from resilientllm_worker.weights.runs import Run
from resilientllm_worker.weights.taker import NotTaken, take

from tests.worker.stage.builders import PATIENCE_SECONDS, TOKEN, Engine, Stage, closing
from tests.worker.transport.builders import InThread
from tests.worker.weights.builders import HELLO, ByteWeights

SIZES = (300, 5)


def test_steps_run_while_a_twin_takes_the_weights() -> None:
    within, go_on = threading.Event(), threading.Event()

    class Held(ByteWeights):
        def read(self, run: Run) -> memoryview:
            within.set()
            assert go_on.wait(PATIENCE_SECONDS)
            return super().read(run)

    source, target = Held(SIZES, content_seed=1), ByteWeights(SIZES)

    def giver(connection: Connection, hello: WeightsHello) -> None:
        give(connection, hello, HELLO.digest, source)

    with Stage(stage=0, give=giver) as stage, closing(engine := Engine(stage.address)):
        taking = InThread(lambda: take([stage.address], TOKEN, HELLO, target))
        assert within.wait(PATIENCE_SECONDS)
        engine.stitch(epoch=1)
        for number in range(3):
            engine.step(number, epoch=1)
            engine.expect(StepResult)
        assert taking.running
        go_on.set()
        taking.result()
    assert target.content == source.content


def test_a_stage_that_gives_nothing_away_closes_the_connection() -> None:
    with Stage() as stage, pytest.raises(NotTaken, match="closed"):
        take([stage.address], TOKEN, HELLO, ByteWeights(SIZES))
