"""The pipeline is whole again in milliseconds, and what was in flight is void, whoever dies and however it shows."""

import threading
from concurrent.futures import Future
from typing import Any

import pytest
from resilientllm_api.engine_state import EnginePhase, LossReason, RecoveryKind, Rung
from resilientllm_worker.engine.channel import Channel, Event, Lost
from resilientllm_worker.engine.pipeline import LOST_STEP
from resilientllm_worker.protocol.messages import (
    AllocateKV,
    Failed,
    Fence,
    Release,
    StageFailing,
    Stamp,
    Step,
    StepFailed,
    Stitch,
)

from tests.worker.engine.builders import DIGEST, PATIENCE_SECONDS, TOKEN, FakeStage, World, a_step, unused_address


def lost(*futures: Future[Any]) -> bool:
    return all(future.result(PATIENCE_SECONDS) is LOST_STEP for future in futures)


class TestSteps:
    def test_a_step_goes_to_all_stages_and_comes_back_from_the_last(self) -> None:
        with World(stages=3) as world:
            world.attach()
            step, future = world.submit()
            for name in ("0.0", "0.1", "0.2"):
                assert world[name].wait_told(Step) == step
            world["0.2"].answer(step)
            assert future.result(PATIENCE_SECONDS).step == step.step

    def test_several_steps_are_in_flight_and_come_back_in_order(self) -> None:
        with World() as world:
            world.attach()
            steps = [world.submit() for _ in range(3)]
            assert [step.step for step, _ in steps] == [0, 1, 2]
            for step, _ in steps:
                world["0.1"].answer(step)
            assert [future.result(PATIENCE_SECONDS).step for _, future in steps] == [0, 1, 2]

    def test_a_result_of_an_old_stamp_is_ignored(self) -> None:
        with World() as world:
            world.attach()
            step, future = world.submit()
            world["0.1"].answer(step, stamp=Stamp(step.stamp.term, step.stamp.epoch - 1))
            assert not future.done()
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).stamp == step.stamp

    def test_a_result_that_nobody_asked_for_is_ignored(self) -> None:
        with World() as world:
            world.attach()
            world["0.1"].answer(a_step(world.pipeline.boundary().stamp, 99))
            step, future = world.submit()
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).step == step.step

    def test_a_step_that_was_scheduled_under_an_old_topology_is_lost_unsent(self) -> None:
        with World() as world:
            world.attach()
            old = world.pipeline.boundary().stamp
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")
            future = world.pipeline.submit(old, lambda stamp, number: pytest.fail("nothing may be sent"))
            assert lost(future)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
class TestAStageThatDies:
    def serving(self, place: int) -> list[str]:
        return [f"{int(place == at)}.{at}" for at in range(3)]

    def test_is_replaced_by_its_donor_and_all_steps_in_flight_are_lost(self, place: int) -> None:
        with World(stages=3) as world:
            world.attach()
            flying = [world.submit()[1] for _ in range(3)]
            world[f"0.{place}"].die()
            assert lost(*flying)
            state = world.wait_serving(*self.serving(place))
            assert state.phase is EnginePhase.DEGRADED
            assert state.serving and not state.on_own_stages
            assert not state.stages[place].own_connected

    def test_costs_one_epoch_and_the_next_step_is_served(self, place: int) -> None:
        with World(stages=3) as world:
            world.attach()
            before = world.pipeline.boundary().stamp
            world[f"0.{place}"].die()
            world.wait_serving(*self.serving(place))
            step, future = world.submit()
            assert step.stamp == Stamp(before.term, before.epoch + 1)
            last = world[self.serving(place)[-1]]
            last.wait_told(Step)
            last.answer(step)
            assert future.result(PATIENCE_SECONDS).stamp == step.stamp

    def test_is_recorded_with_its_phases(self, place: int) -> None:
        with World(stages=3) as world:
            world.attach()
            world.pipeline.note_load(1, 0)
            world[f"0.{place}"].die()
            world.wait_serving(*self.serving(place))
            boundary = world.pipeline.boundary()
            world.pipeline.rolled_back(boundary, 1, 0.001)
            world.pipeline.resumed([40], [0])
            assert world.state.recoveries_total == 0  # not before the first token
            step, _ = world.submit()
            world[self.serving(place)[-1]].answer(step)
            (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
            assert world.state.requests_by_rung_total == {Rung.RECOMPUTED: 1}
        assert (recovery.kind, recovery.reason) == (RecoveryKind.BORROW, LossReason.RESET)
        assert recovery.stages == (place,)
        assert [str(each) for each in recovery.served_by] == self.serving(place)
        assert (recovery.requests, recovery.tokens_recomputed) == (1, 40)
        assert set(recovery.phases_ms) == {"fence", "stitch", "rollBack", "resume", "total"}
        assert recovery.resumed_at is not None and recovery.resumed_at >= recovery.detected_at

    def test_has_its_reason_though_the_conductor_looks_before_it_is_told(
        self, place: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with World(stages=3) as world:
            world.attach()
            tell = world.pipeline._conductor._events.put

            def late(event: Event) -> None:
                if isinstance(event, Lost):
                    tell(lambda: None)
                    world.wait_serving(*self.serving(place))
                tell(event)

            for channel in world.pipeline._shared.channels.values():
                monkeypatch.setattr(channel, "_on_event", late)
            world[f"0.{place}"].die()
            (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
            world.pipeline._conductor.look_again()
            assert world.state.recoveries_total == 1
        assert (recovery.kind, recovery.reason) == (RecoveryKind.BORROW, LossReason.RESET)


def test_the_stages_that_are_left_are_fenced_before_they_are_stitched() -> None:
    with World() as world:
        world.attach()
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        stamp = world.pipeline.boundary().stamp
        for name in ("0.0", "1.1"):
            orders = [m for m in world[name].told if isinstance(m, Fence | Stitch) and m.stamp == stamp]
            assert [type(order) for order in orders] == [Fence, Stitch]


def test_a_stage_that_says_that_it_fails_is_lost_by_its_own_word() -> None:
    with World() as world:
        world.attach()
        _, future = world.submit()
        world["0.1"].say(StageFailing("the device is lost"))
        world["0.1"].answers = False
        assert lost(future)
        state = world.wait(lambda state: state.recoveries_total >= 1)
        assert state.recoveries[0].reason is LossReason.SELF


def test_an_idle_instance_recovers_without_being_asked() -> None:
    with World() as world:
        world.attach()
        world["0.0"].die()
        (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
        assert recovery.resumed_at is not None
        assert world.serving == ["1.0", "0.1"]


def test_a_recovery_whose_requests_were_all_aborted_ends_with_them() -> None:
    with World() as world:
        world.attach()
        world.pipeline.note_load(2, 0)
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        assert world.state.recoveries_total == 0
        world.pipeline.note_load(0, 0)
        assert world.state.recoveries_total == 1


def test_two_stages_that_die_at_once_are_one_incident() -> None:
    with World(stages=3) as world:
        world.attach()
        world.pipeline.note_load(1, 0)
        _, future = world.submit()
        world["0.0"].die()
        world["0.2"].die()
        assert lost(future)
        world.wait_serving("1.0", "0.1", "1.2")
        step, _ = world.submit()
        world["1.2"].answer(step)
        (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
        assert recovery.stages == (0, 2)


def test_a_donor_that_dies_is_replaced_by_the_next() -> None:
    with World(instances=3) as world:
        world.attach()
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        _, future = world.submit()
        world["1.1"].die()
        assert lost(future)
        world.wait_serving("0.0", "2.1")


def test_a_donor_that_was_not_needed_may_die_without_any_effect() -> None:
    with World() as world:
        world.attach()
        step, future = world.submit()
        world["1.1"].die()
        world.wait(lambda state: state.stages[1].donors_connected == 0)
        world["0.1"].answer(step)
        assert future.result(PATIENCE_SECONDS).step == step.step
        assert world.pipeline.boundary().stamp == step.stamp


class TestADonorThatRefuses:
    def test_is_passed_over_for_the_next(self) -> None:
        with World(instances=3) as world:
            world.attach()
            world["1.1"].refuses = Failed(0, "already serves instance 2 as a guest")
            world["0.1"].die()
            world.wait_serving("0.0", "2.1")

    def test_gets_another_chance_when_nobody_else_is_left(self) -> None:
        with World() as world:
            world.attach()
            world["1.1"].refuses = Failed(0, "already serves instance 2 as a guest")
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            world["1.1"].refuses = None
            world.wait_serving("0.0", "1.1")

    def test_leaves_no_place_taken_at_the_others_that_were_asked(self) -> None:
        """Else a third instance could never borrow them."""
        with World(instances=3) as world:
            world.attach()
            world["1.0"].refuses = Failed(0, "no")
            world["2.0"].refuses = Failed(0, "no")
            world["0.0"].die()
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            world["1.1"].wait_told(Stitch)
            world["1.1"].wait_told(Release)


class TestAStageThatDiesWithinAStitch:
    def test_is_blamed_itself_and_not_its_neighbour_that_cannot_reach_it(self) -> None:
        with World(instances=3) as world:
            world.attach()
            world["0.0"].refuses = Failed(0, "cannot link to the next stage", unreachable=1)
            world["1.1"].dies_of = Stitch
            world["0.1"].die()
            world["1.1"].wait_told(Stitch)
            world["0.0"].refuses = None
            world.wait_serving("0.0", "2.1")
            assert world["1.0"].count(Stitch) == 0

    def test_a_link_that_cannot_be_made_is_blamed_on_its_far_end(self) -> None:
        with World(instances=3) as world:
            world.attach()
            world["0.0"].refuses = Failed(0, "cannot link to the next stage", unreachable=1)
            world["0.1"].die()
            world["1.1"].wait_told(Stitch)
            world["2.1"].wait_told(Stitch)
            world["0.0"].refuses = None
            world.wait(lambda state: state.serving)
            assert world.serving[0] == "0.0"


class TestWithoutADonor:
    def test_the_engine_waits_and_says_for_whom(self) -> None:
        with World(instances=1) as world:
            world.attach()
            _, future = world.submit()
            world["0.1"].die()
            assert lost(future)
            state = world.wait_phase(EnginePhase.WAITING)
            assert not state.serving
            assert state.message == "waits for stage 0.1"
            assert [str(each.served_by) for each in state.stages] == ["None", "None"]
            boundary = world.pipeline.boundary()
            assert not boundary.stitched and boundary.waiting_seconds > 0
            assert world.pipeline.boundary(0.01).waiting_seconds > boundary.waiting_seconds

    def test_the_survivors_are_fenced(self) -> None:
        with World(instances=1) as world:
            world.attach()
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            assert world["0.0"].wait_told(Fence, 2).stamp == world.pipeline.boundary().stamp

    def test_service_is_back_with_the_stage(self) -> None:
        with World(instances=1) as world:
            world.attach()
            world.pipeline.note_load(1, 0)
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            back = world.restart("0.1")
            world.wait_phase(EnginePhase.SERVING)
            back.wait_told(AllocateKV)
            step, _ = world.submit()
            back.answer(step)
            (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
        assert recovery.stages == (1,)
        assert recovery.phases_ms["wait"] > 0
        assert recovery.phases_ms["total"] >= recovery.phases_ms["wait"]
        assert world.pipeline.boundary().waiting_seconds == 0

    def test_donors_at_other_places_are_released_meanwhile(self) -> None:
        with World() as world:
            world.attach()
            world["0.0"].die()
            world.wait_serving("1.0", "0.1")
            world["1.1"].die()
            world["0.1"].die()
            world.wait_phase(EnginePhase.WAITING)
            world["1.0"].wait_told(Release)


class TestAStageThatReturns:
    def test_gets_its_kv_and_its_place_back_and_the_donor_is_released(self) -> None:
        with World() as world:
            world.attach()
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")
            _, future = world.submit()
            back = world.restart("0.1")
            state = world.wait_serving("0.0", "0.1")
            assert state.phase is EnginePhase.SERVING and state.on_own_stages
            assert lost(future)
            back.wait_told(AllocateKV)
            assert world["1.1"].wait_told(Release).stamp == world.pipeline.boundary().stamp
            kinds = [each.kind for each in world.wait(lambda state: state.recoveries_total == 2).recoveries]
            assert kinds == [RecoveryKind.BORROW, RecoveryKind.SWAP_BACK]

    def test_is_not_used_before_it_has_kv(self) -> None:
        with World() as world:
            world.attach()
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")
            back = FakeStage("0.1", 2, world["0.1"].address)
            back.answers = False
            world.stages[back.id] = back
            back.wait_told(AllocateKV)
            assert world.serving == ["0.0", "1.1"]
            assert back.count(Stitch) == 0

    def test_that_only_lost_its_connection_is_stitched_anew(self) -> None:
        """It keeps its KV, but what was in flight to it is gone, and maybe so are its answers."""
        with World(instances=1) as world:
            world.attach()
            before = world.pipeline.boundary().stamp
            _, future = world.submit()
            world["0.1"].has_kv = True
            world["0.1"].drop_connections()
            assert lost(future)
            world.wait(lambda state: state.serving and state.epoch > before.epoch)
            step, again = world.submit()
            world["0.1"].answer(step)
            assert again.result(PATIENCE_SECONDS).stamp == step.stamp

    def test_again_and_again_is_taken_in_every_time(self) -> None:
        with World() as world:
            world.attach()
            for _ in range(3):
                world["0.1"].die()
                world.wait_serving("0.0", "1.1")
                world.restart("0.1")
                world.wait_serving("0.0", "0.1")


def test_a_stage_whose_words_arrive_corrupt_is_lost() -> None:
    with World() as world:
        world.attach()
        step, future = world.submit()
        world["0.1"].answer_corruptly(step)
        assert lost(future)
        (recovery,) = world.wait(lambda state: state.recoveries_total == 1).recoveries
        assert recovery.reason is LossReason.CORRUPT


class TestSilence:
    def test_a_stage_that_says_nothing_is_lost_after_the_timeout(self) -> None:
        with World(heartbeat_timeout_seconds=1.0) as world:
            world.attach()
            _, future = world.submit()
            world["0.1"].answers = False
            assert lost(future)
            world.wait_serving("0.0", "1.1")
            world.wait(lambda state: state.recoveries_total >= 1)
            assert world.state.recoveries[0].reason is LossReason.SILENCE


class TestLinks:
    def test_a_link_that_breaks_between_two_that_live_costs_the_far_end_its_place(self) -> None:
        with World() as world:
            world.attach()
            _, future = world.submit()
            world["0.0"].link_lost(world.pipeline.boundary().stamp, neighbour=1)
            assert lost(future)
            world.wait_serving("0.0", "1.1")
            (recovery,) = world.wait(lambda state: state.recoveries_total >= 1).recoveries[:1]
        assert (recovery.reason, recovery.stages) == (LossReason.NEIGHBOUR, (1,))

    def test_the_far_end_gets_another_chance_later(self) -> None:
        with World() as world:
            world.attach()
            world["0.0"].link_lost(world.pipeline.boundary().stamp, neighbour=1)
            world.wait_serving("0.0", "1.1")
            world.wait_serving("0.0", "0.1")

    def test_a_report_of_an_old_topology_is_ignored(self) -> None:
        with World() as world:
            world.attach()
            stamp = world.pipeline.boundary().stamp
            world["0.0"].link_lost(Stamp(stamp.term, stamp.epoch - 1), neighbour=1)
            world["0.0"].link_lost(stamp, neighbour=7)  # no such place
            step, future = world.submit()
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).stamp == stamp
            world["0.0"].link_lost(stamp, neighbour=1)  # the conductor still works
            world.wait_serving("0.0", "1.1")

    def test_a_stage_that_is_dead_is_not_blamed_on_its_link(self) -> None:
        """Its neighbour's report may come first; the place is the same, and it is barred from nothing."""
        with World() as world:
            world.attach()
            world["0.0"].link_lost(world.pipeline.boundary().stamp, neighbour=1)
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")

    def test_a_stage_that_refuses_a_step_is_replaced(self) -> None:
        with World() as world:
            world.attach()
            step, future = world.submit()
            world["0.1"].say(StepFailed(step.stamp, step.step, "block 7 was never written here"))
            assert lost(future)
            world.wait_serving("0.0", "1.1")


class TestANewPlan:
    def test_with_another_address_of_a_serving_stage_loses_no_step_for_ever(self) -> None:
        with World() as world:
            world.attach()
            _, future = world.submit()
            moved = FakeStage("0.1", 2, has_kv=True)
            old, world.stages[moved.id] = world["0.1"], moved
            world.pipeline.set_plan(world.plan())
            assert lost(future)
            world.wait_serving("0.0", "0.1")
            step, again = world.submit()
            moved.answer(step)
            assert again.result(PATIENCE_SECONDS).stamp == step.stamp
            old.die()
            assert world.pipeline.boundary().stamp == step.stamp

    def test_with_another_address_that_answers_at_once_is_stitched_anew(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is lost then, and yet the process at work is another one."""
        start = Channel.start

        def start_and_wait(channel: Channel) -> None:
            start(channel)
            assert connected.acquire(timeout=PATIENCE_SECONDS)

        def put_and_tell(event: Event) -> None:
            put(event)
            connected.release()

        with World(instances=1) as world:
            world.attach()
            _, future = world.submit()
            moved = FakeStage("0.1", 2, has_kv=True)
            old, world.stages[moved.id] = world["0.1"], moved
            connected = threading.Semaphore(0)
            put = world.pipeline._conductor._events.put
            monkeypatch.setattr(
                world.pipeline._conductor,
                "_make_channel",
                lambda ref, plan: Channel(ref, 0, DIGEST, TOKEN, world.limits, put_and_tell, world.pipeline._on_result),
            )
            monkeypatch.setattr(Channel, "start", start_and_wait)
            world.pipeline.set_plan(world.plan())
            assert lost(future)
            moved.wait_told(Stitch)
            old.die()

    def test_without_the_donor_at_work_moves_to_another(self) -> None:
        with World(instances=3) as world:
            world.attach()
            world["0.1"].die()
            world.wait_serving("0.0", "1.1")
            world["1.1"].address = unused_address()
            world.pipeline.set_plan(world.plan())
            world.wait_serving("0.0", "2.1")


def test_a_closed_pipeline_leaves_its_stages() -> None:
    with World() as world:
        world.attach()
        told = world["0.0"].count(Fence)
        world.pipeline.close()
        assert world["0.0"].count(Fence) == told
