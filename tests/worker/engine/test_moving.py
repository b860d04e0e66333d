"""Away from a stage that is to go while it still works: whoever says so, and no sooner than another one is ready."""

from __future__ import annotations

import pytest
from resilientllm_api.engine_state import EnginePhase, RecoveryKind
from resilientllm_worker.engine import pipeline
from resilientllm_worker.protocol.messages import Release, ReplicateTo, ReplicationReport, StageLeaving, Stitch

from tests.worker.engine.builders import PATIENCE_SECONDS, FakeStage, World

LONG_SECONDS = 3600.0


def copying(keeper: FakeStage, lag_blocks: int = 0) -> ReplicationReport:
    return ReplicationReport(keeper.address, True, 64, 500, 500, lag_blocks, 0.0, 500, 32000, 0, 0, 0)


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


class TestWithCopies:
    def world(self, instances: int = 2) -> World:
        world = World(instances=instances).attach()
        world.pipeline.set_cache(16, "")
        world.wait(lambda state: bool(state.replication) and all(each.kept_by for each in state.replication))
        return world

    def test_the_instance_moves_when_the_keeper_has_caught_up(self) -> None:
        with self.world() as world:
            world["0.1"].replication = copying(world["1.1"], lag_blocks=90)
            world.wait(lambda state: state.replication[1].lag_tokens == 90 * 16)
            world["0.1"].say(StageLeaving(LONG_SECONDS))
            world.wait(lambda state: state.stages[1].own_leaving)
            assert world.serving == ["0.0", "0.1"]
            world["0.1"].replication = copying(world["1.1"])
            world.wait_serving("0.0", "1.1")

    def test_a_stage_that_leaves_keeps_no_copies_if_another_can(self) -> None:
        with self.world(instances=3) as world:
            told = world["0.1"].count(ReplicateTo)
            world["1.1"].say(StageLeaving(LONG_SECONDS))
            assert world["0.1"].wait_told(ReplicateTo, told + 1).address == world["2.1"].address

    def test_it_is_left_in_time_whether_or_not_anybody_has_caught_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with self.world() as world:
            world["0.1"].replication = copying(world["1.1"], lag_blocks=90)
            world.wait(lambda state: state.replication[1].lag_tokens == 90 * 16)
            world["0.1"].say(StageLeaving(pipeline.MOVE_SECONDS))
            world.wait_serving("0.0", "1.1")
