"""What the pipeline makes of stages that live and do not move: it goes on without them."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, LossReason
from resilientllm_worker.engine import stitching
from resilientllm_worker.engine.pipeline import LOST_STEP
from resilientllm_worker.protocol.messages import Progress, Stamp, Step, Stitch

from tests.worker.engine.builders import PATIENCE_SECONDS, World

TIMEOUT_SECONDS = 1.5


def lost(future: Future[Any]) -> bool:
    return future.result(PATIENCE_SECONDS) is LOST_STEP


def a_world(**shape: int) -> World:
    return World(heartbeat_timeout_seconds=TIMEOUT_SECONDS, **shape)


def says(world: World, name: str, received: int = 0, landed: int = 0, done: int = 0) -> None:
    stamp = world.pipeline.boundary().stamp
    world[name].progress = Progress(stamp, received, landed, done, command_bytes=0, landed_bytes=0)


class TestCommandsThatDoNotArrive:
    def test_cost_the_stage_its_place_although_its_heartbeats_come(self) -> None:
        with a_world() as world:
            world.attach()
            says(world, "0.0", received=-1, done=-1)
            says(world, "0.1", received=-1, landed=-1, done=-1)
            _, future = world.submit()
            says(world, "0.1", received=0, landed=-1, done=-1)
            assert lost(future)
            state = world.wait(lambda state: bool(state.recoveries))
            assert state.recoveries[0].reason is LossReason.UNREACHABLE
            assert state.recoveries[0].stages == (0,)

    def test_nothing_is_missing_while_nothing_is_sent(self) -> None:
        with a_world() as world:
            world.attach()
            before = world.pipeline.boundary().stamp
            says(world, "0.0", received=-1, done=-1)
            says(world, "0.1", received=-1, landed=-1, done=-1)
            beats = world["0.1"].beat_count
            world.wait(lambda state: world["0.1"].beat_count > beats + 2 * TIMEOUT_SECONDS / 0.02)
            assert world.pipeline.boundary().stamp == before


class TestASilentLink:
    def starve(self, world: World, sender: str, receiver: str) -> Stamp:
        """The sender has done a step of which the receiver gets nothing."""
        stamp = world.pipeline.boundary().stamp
        world.submit()
        says(world, sender)
        says(world, receiver, landed=-1, done=-1)
        return stamp

    def test_costs_the_sender_its_place_first(self) -> None:
        with a_world() as world:
            world.attach()
            self.starve(world, "0.0", "0.1")
            world.wait_serving("1.0", "0.1")
            (loss,) = world.wait(lambda state: bool(state.recoveries)).recoveries[:1]
            assert (loss.reason, loss.stages) == (LossReason.NEIGHBOUR, (0,))

    def test_costs_the_receiver_its_place_when_another_sender_does_not_get_through(self) -> None:
        with a_world() as world:
            world.attach()
            self.starve(world, "0.0", "0.1")
            world.wait_serving("1.0", "0.1")
            world["0.0"].die()  # else it would be tried again first
            self.starve(world, "1.0", "0.1")
            world.wait(lambda state: str(state.stages[1].served_by) == "1.1")

    def test_that_brings_something_is_slow_and_keeps_its_stages(self) -> None:
        with a_world() as world:
            world.attach()
            world["0.1"].trickles = True
            stamp = self.starve(world, "0.0", "0.1")
            beats = world["0.1"].beat_count
            world.wait(lambda state: world["0.1"].beat_count > beats + 2 * TIMEOUT_SECONDS / 0.02)
            assert world.pipeline.boundary().stamp == stamp


def test_a_stage_that_stops_within_a_stitch_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stitching, "STITCH_SECONDS", 10 * PATIENCE_SECONDS)
    with a_world(instances=3) as world:
        world.attach()
        world["1.1"].stops_at = Stitch
        world["0.1"].die()
        world.wait_serving("0.0", "2.1")
        assert world["1.1"].count(Stitch) == 1


class TestAStageThatIsStuckInAStep:
    def test_is_replaced_and_its_connection_stays(self) -> None:
        with a_world() as world:
            world.attach()
            _, future = world.submit()
            world["0.1"].overdue = True
            assert lost(future)
            state = world.wait_serving("0.0", "1.1")
            assert state.stages[1].own_connected
            (loss,) = world.wait(lambda state: bool(state.recoveries)).recoveries[:1]
            assert (loss.reason, loss.stages) == (LossReason.HANG, (1,))

    def test_is_not_used_as_long_as_that_lasts_and_again_when_it_is_over(self) -> None:
        with a_world() as world:
            world.attach()
            world["0.1"].overdue = True
            world.wait_serving("0.0", "1.1")
            stitches, beats = world["0.1"].count(Stitch), world["0.1"].beat_count
            # Longer than it is barred for having held up the pipeline.
            world.wait(lambda state: world["0.1"].beat_count > beats + 1.5 / 0.02)
            assert world["0.1"].count(Stitch) == stitches
            world["0.1"].overdue = False
            world.wait_serving("0.0", "0.1")

    def test_is_no_donor(self) -> None:
        with a_world(instances=3) as world:
            world.attach()
            world["1.1"].overdue = True
            beats = world["1.1"].beat_count
            world.wait(lambda state: world["1.1"].beat_count > beats + 20)
            world["0.1"].die()
            world.wait_serving("0.0", "2.1")
            assert world["1.1"].count(Step) == 0

    def test_makes_requests_wait_where_nobody_can_stand_in(self) -> None:
        with a_world(instances=1) as world:
            world.attach()
            _, future = world.submit()
            world["0.1"].overdue = True
            assert lost(future)
            world.wait_phase(EnginePhase.WAITING)
            world["0.1"].overdue = False
            world.wait_phase(EnginePhase.SERVING)
