"""The engine says where sealed blocks are kept, and asks a stage that comes into the pipeline what it holds."""

from __future__ import annotations

import numpy as np
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.plan import ReplicationMode
from resilientllm_worker.protocol.messages import (
    Forget,
    ReplicateTo,
    ReplicationReport,
    Seal,
    Sealed,
    Stamp,
    Stitch,
)

from tests.worker.engine.builders import FakeStage, World


def a_world(instances: int = 2) -> World:
    world = World(instances=instances).attach()
    world.pipeline.set_cache(16, "")
    world.wait(lambda state: all(each.kept_by for each in state.replication) and bool(state.replication))
    return world


def report(keeper: FakeStage, **changes: object) -> ReplicationReport:
    figures = {
        "address": keeper.address,
        "connected": True,
        "block_bytes": 64,
        "sealed_blocks": 100,
        "stored_blocks": 100,
        "lag_blocks": 0,
        "lag_seconds": 0.0,
        "sent_blocks": 100,
        "sent_bytes": 6400,
        "cancelled_blocks": 0,
        "refused_blocks": 0,
        "corrupt_blocks": 0,
    }
    return ReplicationReport(**figures | changes)  # type: ignore[arg-type]


def kept_by(world: World) -> list[str | None]:
    return [None if each.kept_by is None else str(each.kept_by) for each in world.state.replication]


def wait_kept_at(stage: FakeStage, address: str | None) -> None:
    """Until a stage has been told so last: the engine's state says it before the stage has heard of it."""
    stage.wait_told_last(ReplicateTo, lambda message: message.address == address)


def test_every_stage_is_told_who_keeps_its_blocks() -> None:
    with a_world() as world:
        assert kept_by(world) == ["1.0", "1.1"]
        for place in range(2):
            assert world[f"0.{place}"].wait_told(ReplicateTo).address == world[f"1.{place}"].address


def test_nobody_is_told_before_the_cache_is_known_to_be_fit_for_it() -> None:
    with World().attach() as world:
        world.pipeline.set_cache(16, "the model has 2 KV cache groups")
        state = world.wait(lambda state: bool(state.replication))
        assert not any(each.supported or each.healthy or each.kept_by for each in state.replication)
        assert state.replication[0].message == "the model has 2 KV cache groups"
        assert world["0.0"].count(ReplicateTo) == 0


def test_a_plan_without_replication_stops_it() -> None:
    with a_world() as world:
        world.pipeline.set_plan(world.plan().model_copy(update={"replication": ReplicationMode.NONE}))
        wait_kept_at(world["0.0"], None)
        assert world.state.replication == ()


def test_health_is_what_the_stages_say() -> None:
    with a_world() as world:
        for place in range(2):
            world[f"0.{place}"].replication = report(world[f"1.{place}"])
        state = world.wait(lambda state: all(each.healthy for each in state.replication))
        assert [each.stored_blocks for each in state.replication] == [100, 100]
        world["0.1"].replication = report(world["1.1"], lag_blocks=7, lag_seconds=9.0)
        state = world.wait(lambda state: not state.replication[1].healthy)
        assert state.replication[1].lag_tokens == 7 * 16
        assert "slow" in state.replication[1].message


def test_a_keeper_that_is_lost_is_replaced() -> None:
    with a_world(instances=3) as world:
        world["1.0"].die()
        world.wait(lambda state: kept_by(world) == ["2.0", "1.1"])
        wait_kept_at(world["0.0"], world["2.0"].address)


def test_the_order_of_the_plan_is_restored_while_nothing_runs() -> None:
    with a_world(instances=3) as world:
        world.pipeline.note_load(1, 0)
        world["1.0"].die()
        world.wait(lambda state: kept_by(world) == ["2.0", "1.1"])
        world.restart("1.0", has_kv=True)
        world.wait(lambda state: state.stages[0].donors_connected == 2)
        wait_kept_at(world["0.0"], world["2.0"].address)
        assert kept_by(world) == ["2.0", "1.1"]
        world.pipeline.note_load(0, 0)
        wait_kept_at(world["0.0"], world["1.0"].address)


def test_the_keeper_stands_in_and_says_what_it_holds() -> None:
    with a_world() as world:
        world["1.1"].holds = {5: 50, 6: 51}
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        (new,) = world.pipeline.boundary().newcomers
        assert (new.place, new.blocks.tolist(), new.numbers.tolist()) == (1, [5, 6], [50, 51])
        assert world["1.1"].wait_told(Stitch).report_sealed
        assert not world["0.0"].wait_told(Stitch, 2).report_sealed, "it has been there all the time"
        assert kept_by(world) == ["1.0", None]


def test_newcomers_are_told_until_the_scheduler_has_rolled_back() -> None:
    with a_world(instances=3) as world:
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        world["1.1"].die()
        world.wait_serving("0.0", "2.1")
        boundary = world.pipeline.boundary()
        assert [new.place for new in boundary.newcomers] == [1, 1]
        world.pipeline.rolled_back(boundary, 0, 0.0)
        assert world.pipeline.boundary().newcomers == ()


def test_a_returning_stage_takes_its_place_when_it_has_caught_up() -> None:
    with a_world() as world:
        world["0.1"].die()
        world.wait_serving("0.0", "1.1")
        back = world.restart("0.1")
        world.wait(lambda state: kept_by(world) == ["1.0", "0.1"])
        wait_kept_at(world["1.1"], back.address)
        world["1.1"].replication = report(back, lag_blocks=90)
        world.wait(lambda state: state.replication[1].lag_tokens == 90 * 16)
        assert world.serving == ["0.0", "1.1"]
        back.holds = {1: 1}
        world["1.1"].replication = report(back)
        state = world.wait_serving("0.0", "0.1")
        assert state.recoveries[-1].kind is RecoveryKind.SWAP_BACK
        assert [new.numbers.tolist() for new in world.pipeline.boundary().newcomers][-1] == [1]


def test_seals_reach_all_stages_of_the_topology_that_they_were_made_under() -> None:
    with a_world() as world:
        stamp = world.pipeline.boundary().stamp
        seals = [Seal(1, 3, 0, 0, 1, b"key")]
        assert world.pipeline.seal(stamp, seals, [7])
        for place in range(2):
            assert world[f"0.{place}"].wait_told(Sealed) == Sealed(stamp, seals, [7])
        assert not world.pipeline.seal(Stamp(stamp.term, stamp.epoch - 1), seals, [])


def test_what_is_of_no_use_is_told_to_the_stage_that_holds_it() -> None:
    with a_world() as world:
        stamp = world.pipeline.boundary().stamp
        world.pipeline.forget(stamp, 1, np.array([3, 4], dtype=np.int32))
        assert world["0.1"].wait_told(Forget).blocks == np.array([3, 4], dtype="<i4").tobytes()
        assert world["0.0"].count(Forget) == 0
