"""What a stage's heartbeats say of its steps: facts, under the stamp that it obeys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from resilientllm_worker.protocol.messages import Heartbeat, Progress, Stamp, StepResult
from resilientllm_worker.stage.deadline import UNKNOWN_SECONDS
from resilientllm_worker.stage.progress import Counts
from resilientllm_worker.stage.step_clock import StepClock
from resilientllm_worker.stage.step_loop import Sent

from tests.worker.stage.builders import GUEST, PATIENCE_SECONDS, Engine, Neighbour, Stage, closing

BEAT_SECONDS = 0.01


def an_engine(stage: Stage, instance: int = 0) -> Engine:
    return Engine(stage.address, instance, heartbeat=BEAT_SECONDS)


def heard(engine: Engine, holds: Callable[[Heartbeat], bool]) -> Heartbeat:
    """The first heartbeat that says so."""
    for _ in range(int(PATIENCE_SECONDS / BEAT_SECONDS)):
        beat = engine.heartbeats.get(timeout=PATIENCE_SECONDS)
        if holds(beat):
            return beat
    pytest.fail("no heartbeat said so")


def at(engine: Engine, epoch: int, received: int, landed: int, done: int) -> Progress:
    def holds(beat: Heartbeat) -> bool:
        told = beat.progress
        wanted = (Stamp(1, epoch), received, landed, done)
        return told is not None and (told.stamp, told.received, told.landed, told.done) == wanted

    progress = heard(engine, holds).progress
    assert progress is not None
    return progress


class TestProgress:
    def test_there_is_none_before_the_stage_serves(self) -> None:
        with Stage() as stage, closing(engine := an_engine(stage)):
            assert engine.heartbeats.get(timeout=PATIENCE_SECONDS).progress is None
            engine.stitch(epoch=1)
            at(engine, 1, -1, -1, -1)
            engine.release(epoch=2)
            heard(engine, lambda beat: beat.progress is None)

    def test_commands_hidden_states_and_steps_are_counted_apart(self) -> None:
        with Stage() as stage, closing(engine := an_engine(stage)):
            engine.stitch(epoch=1)
            with closing(link := Neighbour(stage.address, epoch=1)):
                first = at(engine, 1, -1, -1, -1)
                engine.step(0, epoch=1)
                engine.step(1, epoch=1)
                second = at(engine, 1, 1, -1, -1)
                assert second.command_bytes > first.command_bytes
                link.send(0)
                assert at(engine, 1, 1, 0, 0).landed_bytes > second.landed_bytes
                link.send(1)
                link.send(2)
                at(engine, 1, 1, 2, 1)

    def test_a_new_topology_begins_anew_but_for_hidden_states_that_were_faster(self) -> None:
        with Stage() as stage, closing(engine := an_engine(stage)):
            engine.stitch(epoch=1)
            engine.step(0, epoch=1)
            at(engine, 1, 0, -1, -1)
            with closing(link := Neighbour(stage.address, epoch=2)):
                link.send(0)
                stage.wait_arrived(0, 0)
                engine.stitch(epoch=2)
                at(engine, 2, -1, 0, -1)

    def test_a_step_that_ends_after_its_topology_counts_for_nobody(self) -> None:
        with Stage(stage=0) as stage, closing(engine := an_engine(stage)):
            engine.stitch(epoch=1)
            stage.model.go.clear()
            engine.step(0, epoch=1)
            assert stage.model.within.wait(PATIENCE_SECONDS)
            engine.stitch(epoch=2)
            stage.model.go.set()
            heard(engine, lambda beat: beat.steps_done == 1)
            at(engine, 2, -1, -1, -1)

    def test_tenants_have_theirs_each(self) -> None:
        with Stage(stage=0) as stage, closing(own := an_engine(stage)), closing(guest := an_engine(stage, GUEST)):
            own.stitch(epoch=1)
            guest.stitch(epoch=1)
            own.step(0, epoch=1)
            own.expect(StepResult)
            at(own, 1, 0, -1, 0)
            at(guest, 1, -1, -1, -1)


def test_only_hidden_states_of_the_new_stamp_count_as_here() -> None:
    old, new, newer = Stamp(1, 1), Stamp(1, 2), Stamp(2, 1)
    assert Counts.after_fence(new, [(old, 7), (new, 1), (new, 0), (newer, 9)]) == Counts(new, -1, 1, -1)


def test_a_step_says_how_long_it_may_take() -> None:
    with Stage(stage=0) as stage, closing(engine := an_engine(stage)):
        engine.stitch(epoch=1)
        assert engine.heartbeats.get(timeout=PATIENCE_SECONDS).step_allowed_seconds == 0.0
        stage.model.go.clear()
        engine.step(0, epoch=1)
        beat = heard(engine, lambda beat: beat.step_seconds > 0.0)
        assert beat.step_allowed_seconds == UNKNOWN_SECONDS
        stage.model.go.set()
        heard(engine, lambda beat: beat.steps_done == 1 and beat.step_allowed_seconds == 0.0)


def test_waiting_for_a_link_is_no_part_of_a_step() -> None:
    now = [100.0]
    clock = StepClock(lambda: now[0])

    class SlowLink:
        def wait(self) -> None:
            now[0] += 30.0

    clock.begin(2.0)
    now[0] += 0.5
    Sent([SlowLink(), SlowLink()], clock).wait()  # type: ignore[list-item]
    assert clock.read() == (0.5, 2.0)
