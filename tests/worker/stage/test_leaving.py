"""A stage that is asked to end tells its engines, and serves on until none of them needs it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from resilientllm_worker.protocol.messages import StageLeaving, StepResult
from resilientllm_worker.stage.main import leave_on_sigterm
from resilientllm_worker.stage.server import StageServer

from tests.worker.stage.builders import GUEST, HOME, PATIENCE_SECONDS, Engine, Stage, closing

LONG_SECONDS = 3600.0


def leaving(stage: Stage) -> threading.Thread:
    thread = threading.Thread(target=stage.server.leave, args=(LONG_SECONDS,), daemon=True)
    thread.start()
    return thread


def test_a_stage_that_nobody_uses_ends_at_once() -> None:
    with Stage() as stage, closing(engine := Engine(stage.address)):
        stage.server.leave(LONG_SECONDS)
        stage.wait_ended()
        assert 0 < engine.expect(StageLeaving).seconds <= LONG_SECONDS  # less, if it was told as one that comes later


def test_every_engine_is_told_also_one_that_comes_later() -> None:
    with Stage(stage=0) as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
        home.stitch(epoch=1)
        leaving(stage)
        home.expect(StageLeaving)
        guest.expect(StageLeaving)
        with closing(late := Engine(stage.address, GUEST)):
            assert 0 < late.expect(StageLeaving).seconds <= LONG_SECONDS


@pytest.mark.parametrize("instance", [HOME, GUEST], ids=["home", "guest"])
def test_it_serves_on_until_it_is_released(instance: int) -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address, instance)):
        engine.stitch(epoch=1)
        thread = leaving(stage)
        engine.expect(StageLeaving)
        engine.step(0, epoch=1)
        assert engine.expect(StepResult).step == 0
        assert thread.is_alive()
        engine.release(epoch=2)
        thread.join(PATIENCE_SECONDS)
        stage.wait_ended()


def test_a_fence_is_no_release_since_a_stitch_may_follow() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        thread = leaving(stage)
        engine.expect(StageLeaving)
        engine.fence(epoch=2)
        engine.stitch(epoch=2)
        engine.step(0, epoch=2)
        assert engine.expect(StepResult).step == 0
        assert thread.is_alive()


def test_it_waits_for_all_that_need_it() -> None:
    with Stage(stage=0) as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        thread = leaving(stage)
        home.expect(StageLeaving)
        guest.expect(StageLeaving)
        home.release(epoch=2)
        guest.step(0, epoch=1)
        assert guest.expect(StepResult).step == 0
        assert thread.is_alive()
        guest.close()  # an engine that goes needs nobody any more
        thread.join(PATIENCE_SECONDS)
        stage.wait_ended()


def test_its_time_is_limited() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        started = time.monotonic()
        stage.server.leave(0.05)
        assert time.monotonic() - started >= 0.05
        stage.wait_ended()


def test_the_first_sigterm_asks_and_the_second_ends() -> None:
    asked: list[float] = []
    told = threading.Event()

    class Server(StageServer):
        def __init__(self) -> None:
            pass

        def leave(self, timeout_seconds: float) -> None:
            asked.append(timeout_seconds)
            told.set()

    before = signal.getsignal(signal.SIGTERM)
    try:
        leave_on_sigterm(Server(), 7.0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.wait(PATIENCE_SECONDS)
        assert asked == [7.0]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            told.wait(PATIENCE_SECONDS)  # a signal is handled between two instructions
            threading.Event().wait(PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGTERM, before)
