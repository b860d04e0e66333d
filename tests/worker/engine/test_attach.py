"""An engine puts its instance together, or says clearly why it cannot."""

import json
import threading
from collections.abc import Callable

import pytest
from resilientllm_api.engine_state import EnginePhase
from resilientllm_worker.engine.pipeline import AttachFailed, AttachRefused
from resilientllm_worker.protocol.messages import AllocateKV, DescribeKV, Stamp, Stitch

from tests.worker.engine.builders import DIGEST, HOME_BLOCKS, PATIENCE_SECONDS, World, unused_address


def test_an_engine_that_attached_serves_on_its_own_stages() -> None:
    with World() as world:
        state = world.attach().state
    assert state.phase is EnginePhase.SERVING
    assert state.serving and state.on_own_stages and not state.message
    assert [str(each.served_by) for each in state.stages] == ["0.0", "0.1"]
    assert [each.donors_connected for each in state.stages] == [1, 1]
    assert state.recoveries_total == 0


def test_every_stage_is_told_where_the_next_one_listens() -> None:
    with World(stages=3) as world:
        world.attach()
        following = [world[name].wait_told(Stitch).next_address for name in ("0.0", "0.1", "0.2")]
        assert following == [world["0.1"].address, world["0.2"].address, None]


def test_one_stage_is_a_pipeline_too() -> None:
    with World(stages=1) as world:
        world.attach()
        step, future = world.submit()
        world["0.0"].wait_told(type(step))
        world["0.0"].answer(step)
        assert future.result(PATIENCE_SECONDS).step == step.step


def test_the_capacity_is_that_of_the_smallest_stage() -> None:
    with World() as world:
        world.attach()
        assert world.pipeline.boundary().capacity_blocks == HOME_BLOCKS - 1


def test_the_term_is_above_all_that_stages_have_seen() -> None:
    with World() as world:
        world["0.1"].highest = Stamp(8_000_000_000_000_000, 3)  # a clock that went backwards
        world.attach()
        assert world.pipeline.boundary().stamp == Stamp(8_000_000_000_000_001, 1)


def test_donors_are_not_needed_to_attach() -> None:
    with World() as world:
        for name in ("1.0", "1.1"):
            world[name].die()
        world.pipeline.set_plan(world.plan())
        world.pipeline.wait_connected()
        assert world.state.phase is EnginePhase.ATTACHING


def test_without_a_plan_it_waits_for_one() -> None:
    with World() as world:
        state = world.state
    assert (state.phase, state.message) == (EnginePhase.STARTING, "waits for its plan")


class TestRefusals:
    def refusal(self, world: World) -> str:
        world.pipeline.set_plan(world.plan())
        with pytest.raises(AttachRefused) as refusal:
            world.pipeline.wait_connected()
        return str(refusal.value)

    def test_other_settings_are_named(self) -> None:
        with World() as world:
            world["0.1"].digest = json.dumps(json.loads(DIGEST) | {"block_size": 32})
            message = self.refusal(world)
            state = world.wait_phase(EnginePhase.FAILED)
        assert "0.1" in message and "block_size: 16 here, 32 there" in message
        assert "same flags" in message
        assert state.message == message and not state.serving

    def test_another_protocol_is_named(self) -> None:
        with World() as world:
            world["0.0"].protocol = 99
            message = self.refusal(world)
        assert "protocol 99" in message and "one image" in message

    def test_a_plan_of_another_length_is_named(self) -> None:
        with World() as world:
            for stage in world.stages.values():
                stage._stages = 3
            message = self.refusal(world)
        assert "has 2 stages" in message and "one of 3" in message

    def test_a_donor_with_other_settings_is_only_left_alone(self) -> None:
        with World() as world:
            world["1.1"].digest = "{}"
            world.pipeline.set_plan(world.plan())
            world.pipeline.wait_connected()
            state = world.wait(lambda state: state.stages[0].donors_connected == 1)
        assert state.stages[1].donors_connected == 0


class TestWaiting:
    def test_a_stage_that_is_not_there_is_named_and_waited_for(self) -> None:
        with World() as world:
            world["0.1"].die()
            world.pipeline.set_plan(world.plan())
            state = world.wait(lambda state: bool(state.stages) and state.stages[0].own_connected)
            assert (state.phase, state.message) == (EnginePhase.ATTACHING, "waits for stage 0.1")
            world.restart("0.1")
            world.pipeline.wait_connected()

    def test_it_ends_with_an_error_that_a_restart_may_mend(self) -> None:
        with World(attach_timeout_seconds=0.3) as world:
            world["0.1"].die()
            world.pipeline.set_plan(world.plan())
            with pytest.raises(AttachFailed, match=r"waits for stage 0\.1") as failure:
                world.pipeline.wait_connected()
        assert not isinstance(failure.value, AttachRefused)

    def test_an_address_that_somebody_else_has_now_is_waited_for(self) -> None:
        with World() as world:
            world["0.1"].claims = world["1.0"].id
            world.pipeline.set_plan(world.plan())
            state = world.wait(lambda state: "found stage 1.0" in state.message)
            assert state.phase is EnginePhase.ATTACHING
            world["0.1"].claims = world["0.1"].id
            world.pipeline.wait_connected()

    def test_an_address_that_is_none_is_told(self) -> None:
        with World() as world:
            world["0.1"].address = "127.0.0.1:0"
            world.pipeline.set_plan(world.plan())
            world.wait(lambda state: "port" in state.message)


class TestAStageThatDiesMeanwhile:
    @pytest.mark.parametrize("of", [DescribeKV, AllocateKV], ids=["describing", "allocating"])
    def test_is_asked_again_when_it_is_back(self, of: type) -> None:
        with World() as world:
            world["0.1"].dies_of = of
            world.pipeline.set_plan(world.plan())
            world.pipeline.wait_connected()
            back = _restart_when_gone(world, "0.1")
            if of is AllocateKV:
                world.pipeline.describe_kv()
            assert world.attach().state.serving
            assert back()

    def test_in_the_first_stitch_is_replaced_by_its_donor(self) -> None:
        with World() as world:
            world["0.1"].dies_of = Stitch
            world.attach()
            world.wait_serving("0.0", "1.1")


class TestPlans:
    def test_an_older_plan_changes_nothing(self) -> None:
        with World() as world:
            old = world.plan()
            world.attach()
            world.pipeline.set_plan(old)
            world.pipeline.set_plan(world.plan())
            assert world.wait(lambda state: state.plan_version == 3).serving

    def test_a_plan_of_another_length_is_ignored(self) -> None:
        with World() as world, World(stages=3) as another:
            world.attach()
            another._version = 7
            world.pipeline.set_plan(another.plan())
            world.pipeline.set_plan(world.plan())
            assert world.wait(lambda state: state.plan_version == 2).serving

    def test_a_new_plan_with_the_same_stages_disturbs_nothing(self) -> None:
        with World() as world:
            world.attach()
            before = world.pipeline.boundary().stamp
            step, future = world.submit()
            world.pipeline.set_plan(world.plan())
            world.wait(lambda state: state.plan_version == 2)
            world["0.1"].answer(step)
            assert future.result(PATIENCE_SECONDS).step == step.step
            assert world.pipeline.boundary().stamp == before

    def test_a_donor_that_is_new_in_the_plan_is_dialled(self) -> None:
        with World() as world:
            away = world["1.1"].address
            world["1.1"].address = unused_address()
            world.pipeline.set_plan(world.plan())
            world.wait(lambda state: bool(state.stages) and state.stages[0].donors_connected == 1)
            assert world.state.stages[1].donors_connected == 0
            world["1.1"].address = away
            world.pipeline.set_plan(world.plan())
            world.wait(lambda state: state.stages[1].donors_connected == 1)


def _restart_when_gone(world: World, name: str) -> Callable[[], bool]:
    """Bring the stage back as soon as it has died; says whether it did."""
    done = threading.Event()
    stage = world[name]
    assert stage.dies_of is not None
    kind = stage.dies_of

    def restart() -> None:
        stage.wait_told(kind)
        stage.die()
        world.restart(name)
        done.set()

    threading.Thread(target=restart, daemon=True).start()
    return lambda: done.wait(PATIENCE_SECONDS)
