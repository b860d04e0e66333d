"""Away from a stage that is to go while it still works: whoever says so, and no sooner than another one is ready."""

from __future__ import annotations

import time

import pytest
from resilientllm_api.engine_state import EnginePhase, LossReason, RecoveryKind
from resilientllm_worker.engine.copies import MOVE_SECONDS
from resilientllm_worker.engine.pipeline import LOST_STEP, Boundary
from resilientllm_worker.protocol.messages import (
    Flush,
    Release,
    ReplicateTo,
    ReplicationReport,
    StageLeaving,
    Stamp,
    Stitch,
)

from tests.worker.engine.builders import PATIENCE_SECONDS, World

LONG_SECONDS = 3600.0


class TestWithoutCopies:
    def test_the_instance_moves_to_the_donor_and_lets_the_stage_go(self) -> None:
        with World().attach() as world:
            world["0.1"].say(StageLeaving(LONG_SECONDS))
            state = world.wait_serving("0.0", "1.1")
            assert world["0.1"].wait_told(Release).stamp == world.pipeline.boundary().stamp
            assert state.phase is EnginePhase.DEGRADED
            assert state.stages[1].own_leaving and state.stages[1].own_connected
            assert not state.stages[0].own_leaving
            (move,) = state.recoveries
            assert (move.kind, move.stages, move.reason) == (RecoveryKind.MOVE, (1,), None)

    def test_a_plan_that_names_the_stage_does_the_same(self) -> None:
        with World().attach() as world:
            world.pipeline.set_plan(world.plan().model_copy(update={"leaving": (world["0.1"].id,)}))
            state = world.wait_serving("0.0", "1.1")
            assert not state.stages[1].own_leaving, "only the stage itself can say that"
            assert state.recoveries[-1].kind is RecoveryKind.MOVE
            world.pipeline.set_plan(world.plan())
            state = world.wait_serving("0.0", "0.1")
            assert state.recoveries[-1].kind is RecoveryKind.SWAP_BACK

    def test_a_stage_that_must_not_be_used_is_borrowed_for_although_it_answers(self) -> None:
        with World().attach() as world:
            world.pipeline.set_plan(world.plan().model_copy(update={"lost": (world["0.1"].id,)}))
            state = world.wait_serving("0.0", "1.1")
            assert state.recoveries[-1].kind is RecoveryKind.BORROW
            assert state.stages[1].own_connected

    def test_where_nobody_else_can_serve_it_serves_until_it_is_gone(self) -> None:
        with World(instances=1).attach() as world:
            world["0.1"].say(StageLeaving(LONG_SECONDS))
            world.wait(lambda state: state.stages[1].own_leaving)
            step, future = world.submit()
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).step == step.step
            assert world["0.1"].count(Stitch) == 1
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)

    def test_the_end_of_a_stage_that_was_left_changes_nothing(self) -> None:
        with World().attach() as world:
            world["0.1"].say(StageLeaving(LONG_SECONDS))
            world.wait_serving("0.0", "1.1")
            step, future = world.submit()
            world["0.1"].die()
            state = world.wait(lambda state: not state.stages[1].own_connected)
            assert not state.stages[1].own_leaving, "what comes back is another process"
            world["1.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).stamp == step.stamp

    def test_a_stage_that_leaves_is_let_go_even_if_it_was_left_in_an_attempt_that_failed(self) -> None:
        """Else it would wait for its time to be over."""
        with World(instances=1, stages=2).attach() as world:
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            world["0.0"].say(StageLeaving(LONG_SECONDS))
            world.wait(lambda state: state.stages[0].own_leaving)
            assert world["0.0"].count(Release) == 0, "it is wanted as soon as the other one is back"


class Moving(World):
    """Blocks are kept, and requests run; the engine thread is the test."""

    def __init__(self, instances: int = 2) -> None:
        super().__init__(instances=instances)
        self.attach()
        self.pipeline.set_cache(16, "")
        self.pipeline.note_load(3, 0)
        self.wait(lambda state: bool(state.replication) and all(each.kept_by for each in state.replication))
        self.copies(lag_blocks=0)

    def copies(self, lag_blocks: int, of: str = "0.1", to: str = "1.1") -> None:
        self[of].replication = ReplicationReport(self[to].address, True, 64, 500, 500, lag_blocks, 0.0, 9, 9, 0, 0, 0)
        self.wait(lambda state: state.replication[1].healthy and state.replication[1].lag_tokens == lag_blocks * 16)

    def leave(self, *names: str) -> None:
        self.pipeline.set_plan(self.plan().model_copy(update={"leaving": tuple(self[name].id for name in names)}))

    def wait_hold(self, holds: bool = True) -> Boundary:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (boundary := self.pipeline.boundary(0.01)).hold is not holds:
            assert time.monotonic() < deadline, boundary
        return boundary


class TestWithCopies:
    def test_the_steps_in_flight_come_back_before_anything_changes(self) -> None:
        with Moving() as world:
            flying = [world.submit() for _ in range(2)]
            world.leave("0.1")
            stamp = world.wait_hold().stamp
            for step, future in flying:
                world["0.1"].answer(step)
                assert future.result(PATIENCE_SECONDS).step == step.step
            assert world["0.1"].count(Flush) == 0
            world.pipeline.held(stamp)
            assert world["0.1"].wait_told(Flush).stamp == stamp
            state = world.wait_serving("0.0", "1.1")
            assert world["0.0"].count(Flush) == 0, "it stays, and so does what it has"
            assert world.pipeline.boundary().stamp == Stamp(stamp.term, stamp.epoch + 1)
            assert not world.pipeline.boundary().hold
            assert state.stages[1].own_connected

    def test_it_is_recorded_with_its_phases(self) -> None:
        with Moving() as world:
            world.leave("0.1")
            stamp = world.wait_hold().stamp
            assert world.state.message == "moves to 0.0, 1.1"
            world.pipeline.held(stamp)
            assert world.wait_serving("0.0", "1.1").message == ""
            world.pipeline.rolled_back(world.pipeline.boundary(), 3, 0.001)
            world.pipeline.resumed([0, 0, 0], [40, 40, 40])
            step, _ = world.submit()
            world["1.1"].answer(step)
            (move,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
        assert (move.kind, move.stages, move.reason, move.requests) == (RecoveryKind.MOVE, (1,), None, 3)
        assert (move.tokens_recomputed, move.tokens_kept) == (0, 120)
        phases = dict(move.phases_ms)
        assert set(phases) == {"hold", "flush", "fence", "stitch", "rollBack", "resume", "total"}
        del phases["rollBack"]  # lies within another one
        assert phases.pop("total") == pytest.approx(sum(phases.values()), abs=0.01)

    def test_nothing_begins_before_the_keeper_has_caught_up(self) -> None:
        with Moving() as world:
            world.copies(lag_blocks=90)
            world.leave("0.1")
            world.wait(lambda state: state.plan_version == 2)
            assert not world.pipeline.boundary().hold
            world.copies(lag_blocks=0)
            world.wait_hold()

    def test_what_lags_while_it_goes_on_does_not_call_it_off(self) -> None:
        """The open blocks of many requests are sent within the move."""
        with Moving() as world:
            world["0.1"].flushes = False
            world.leave("0.1")
            world.pipeline.held(world.wait_hold().stamp)
            world["0.1"].wait_told(Flush)
            world.copies(lag_blocks=90)
            world.wait_serving("0.0", "1.1")
            assert world["0.1"].count(Flush) == 1

    def test_an_engine_that_does_not_hold_still_is_not_waited_for_long(self) -> None:
        with Moving() as world:
            _, future = world.submit()
            world.leave("0.1")
            world.wait_hold()
            world.wait_serving("0.0", "1.1")
            assert future.result(PATIENCE_SECONDS) is LOST_STEP
            assert world["0.1"].count(Flush) == 0

    def test_nobody_holds_still_where_nothing_runs(self) -> None:
        with Moving() as world:
            world.pipeline.note_load(0, 0)
            world.leave("0.1")
            state = world.wait_serving("0.0", "1.1")
            assert "hold" not in state.recoveries[-1].phases_ms

    def test_a_swap_back_goes_the_same_way(self) -> None:
        with Moving() as world:
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")
            world.restart("0.1")
            world.wait(lambda state: str(state.replication[1].kept_by) == "0.1")
            world.copies(lag_blocks=0, of="1.1", to="0.1")
            stamp = world.wait_hold().stamp
            world.pipeline.held(stamp)
            assert world["1.1"].wait_told(Flush).stamp == stamp
            world.wait_serving("0.0", "0.1")

    def test_it_is_called_off_if_the_stage_is_to_stay_after_all(self) -> None:
        with Moving() as world:
            world.leave("0.1")
            stamp = world.wait_hold().stamp
            world.leave()
            assert world.wait_hold(False).stamp == stamp
            step, future = world.submit()
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).stamp == stamp
            world.pipeline.held(stamp)  # too late
            assert not world.pipeline.boundary().hold
            assert world.state.recoveries_total == 0

    def test_it_is_called_off_if_the_newcomer_dies(self) -> None:
        with Moving() as world:
            world["0.1"].flushes = False
            world.leave("0.1")
            stamp = world.wait_hold().stamp
            world.pipeline.held(stamp)
            world["0.1"].wait_told(Flush)
            world["1.1"].die()
            assert world.wait_hold(False).stamp == stamp
            assert world.serving == ["0.0", "0.1"]

    @pytest.mark.parametrize("victim", ["0.0", "0.1"], ids=["one that stays", "the one that is left"])
    def test_a_loss_meanwhile_is_a_loss_like_any_other(self, victim: str) -> None:
        with Moving() as world:
            world["0.1"].flushes = False
            world.leave("0.1")
            world.pipeline.held(world.wait_hold().stamp)
            world["0.1"].wait_told(Flush)
            world[victim].die()
            world.wait_serving("1.0" if victim == "0.0" else "0.0", "1.1")
            world.pipeline.note_load(0, 0)
            recovery = world.wait(lambda state: state.recoveries_total == 1).recoveries[-1]
            assert (recovery.kind, recovery.reason) == (RecoveryKind.BORROW, LossReason.RESET)
            assert "hold" not in recovery.phases_ms

    def test_two_places_move_at_once(self) -> None:
        with Moving() as world:
            world.copies(lag_blocks=0, of="0.0", to="1.0")
            world.leave("0.0", "0.1")
            world.pipeline.held(world.wait_hold().stamp)
            world.wait_serving("1.0", "1.1")
            assert world["0.0"].count(Flush) + world["0.1"].count(Flush) >= 1

    def test_a_stage_that_leaves_keeps_no_copies_if_another_can(self) -> None:
        with Moving(instances=3) as world:
            world["1.1"].say(StageLeaving(LONG_SECONDS))
            world["0.1"].wait_told_last(ReplicateTo, lambda message: message.address == world["2.1"].address)

    def test_a_stage_that_ends_soon_is_left_whether_or_not_anybody_has_caught_up(self) -> None:
        """What is not copied is computed again, and nobody waits for it to be copied."""
        with Moving() as world:
            world.copies(lag_blocks=90)
            world["0.1"].say(StageLeaving(MOVE_SECONDS))
            world.wait_serving("0.0", "1.1")
            assert world["0.1"].count(Flush) == 0
