"""Losses and recoveries: what conditions, the record and the events say of them."""

from __future__ import annotations

from datetime import timedelta

from resilientllm_api.engine_state import EnginePhase, LossReason, Recovery, RecoveryKind
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Announce, WriteStatus
from resilientllm_operator.world import World

from tests.operator.builders import (
    NOW,
    borrowed,
    condition,
    decided,
    engine_state,
    healthy_world,
    of_type,
    settled,
    silent,
    stage,
    status_of,
    with_engine,
    with_pod,
    with_status,
    without_pod,
)

BORROW = Recovery(
    id="r1",
    kind=RecoveryKind.BORROW,
    stages=(1,),
    reason=LossReason.RESET,
    served_by=(StageId(instance=0, stage=0), StageId(instance=1, stage=1)),
    detected_at=NOW,
    resumed_at=NOW + timedelta(milliseconds=87),
    phases_ms={"fence": 2.0, "stitch": 5.0, "rollBack": 10.0, "resume": 70.0, "total": 87.4},
    requests=3,
    tokens_recomputed=120,
    tokens_kept=640,
)
SWAP_BACK = Recovery(
    id="r2",
    kind=RecoveryKind.SWAP_BACK,
    stages=(1,),
    detected_at=NOW + timedelta(seconds=9),
    resumed_at=NOW + timedelta(seconds=9.02),
    phases_ms={"total": 20.0},
)


def events(world: World) -> list[str]:
    return [event.reason for event in of_type(decided(world), Announce)]


def borrowing() -> World:
    world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(BORROW,), recoveries_total=1))
    return with_pod(world, stage(0, 1), ready=False)


def restored() -> World:
    world = settled(borrowing())
    home = engine_state(0, recoveries=(BORROW, SWAP_BACK), recoveries_total=2)
    return with_pod(with_engine(world, 0, home), stage(0, 1), ready=True, restarts=1)


class TestABorrowedStage:
    def test_is_degraded_and_still_ready(self) -> None:
        assert condition(borrowing(), "Ready")[0] == "True"
        status, reason, message = condition(borrowing(), "Degraded")
        assert (status, reason) == ("True", "StageBorrowed")
        assert "1.1 stands in for stage 0.1" in message

    def test_is_being_brought_back(self) -> None:
        status, reason, message = condition(borrowing(), "Progressing")
        assert (status, reason) == ("True", "RestoringCapacity")
        assert "stage 0.1" in message

    def test_is_recorded_with_its_phases(self) -> None:
        last = status_of(borrowing()).last_recovery
        assert last is not None
        assert (last.instance, last.stages, last.reason, last.donor) == (0, (1,), "ConnectionReset", "1.1")
        assert last.phases["total"] == 87.4
        assert last.took == "87ms"
        assert (last.requests_affected, last.tokens_recomputed, last.tokens_kept) == (3, 120, 640)
        assert last.restored_at is None

    def test_shows_who_serves(self) -> None:
        instance = status_of(borrowing()).instances[0]
        assert instance.phase == "Degraded"
        assert [each.served_by for each in instance.stages] == ["0.0", "1.1"]

    def test_is_announced_once(self) -> None:
        event, unhealthy = of_type(decided(borrowing()), Announce)
        assert event.reason == "Borrowed" and event.warning
        assert "Stage 0.1 was lost (ConnectionReset); 1.1 stands in. It took 87ms" in event.note
        assert "120 tokens were computed again, 640 were kept" in event.note
        assert unhealthy.reason == "ReplicationUnhealthy"
        assert events(settled(borrowing())) == []

    def test_is_announced_before_it_is_written_down(self) -> None:
        """Once it is written down, nobody can see what has changed with it."""
        told = [type(each) for each in of_type(decided(borrowing()), Announce, WriteStatus)]
        assert told == [Announce, Announce, WriteStatus]

    def test_is_not_told_again_by_an_operator_that_wrote_something_else_first(self) -> None:
        """The last one ended between event and status, and this one had not heard of the engine when it began."""
        world = borrowing()
        conditions = tuple(
            each.model_copy(update={"message": "another"}) if each.type == "Ready" else each
            for each in world.object.status.conditions
        )
        other = with_status(world, world.object.status.model_copy(update={"conditions": conditions}))
        assert other != world
        assert of_type(decided(other), Announce) == of_type(decided(world), Announce)

    def test_of_a_stage_that_the_plan_forbids_is_not_called_a_loss_for_unknown_reasons(self) -> None:
        forbidden = BORROW.model_copy(update={"reason": None})
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(forbidden,)))
        event, _ = of_type(decided(world), Announce)
        assert event.note.startswith("Stage 0.1 must not be used any more; 1.1 stands in.")

    def test_is_announced_when_it_is_over(self) -> None:
        unfinished = BORROW.model_copy(update={"resumed_at": None, "phases_ms": {}})
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(unfinished,)))
        assert events(world) == ["ReplicationUnhealthy"]
        assert events(with_engine(settled(world), 0, borrowed(0, 1, donor=1, recoveries=(BORROW,)))) == ["Borrowed"]

    def test_without_a_donor_is_announced_as_what_it_was(self) -> None:
        alone = BORROW.model_copy(update={"served_by": (StageId(instance=0, stage=1),)})
        world = with_engine(healthy_world(), 0, engine_state(0, recoveries=(alone,)))
        assert events(world) == ["StageReturned"]
        assert status_of(world).recoveries[0].donor is None


class TestAStageThatMoves:
    MOVE = Recovery(
        id="r1",
        kind=RecoveryKind.MOVE,
        stages=(1,),
        served_by=(StageId(instance=0, stage=0), StageId(instance=1, stage=1)),
        detected_at=NOW,
        resumed_at=NOW + timedelta(milliseconds=12),
    )

    def test_is_no_loss(self) -> None:
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(self.MOVE,)))
        (moved, _) = of_type(decided(world), Announce)
        assert moved.reason == "Moved" and not moved.warning
        assert "1.1 has taken over" in moved.note
        assert status_of(world).last_recovery is None

    def test_is_recorded_with_its_return(self) -> None:
        world = settled(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1, recoveries=(self.MOVE,))))
        home = with_engine(world, 0, engine_state(0, recoveries=(self.MOVE, SWAP_BACK)))
        assert status_of(home).recoveries[0].restored_at == SWAP_BACK.resumed_at


class TestAStageThatComesBack:
    def test_ends_the_degradation(self) -> None:
        assert condition(restored(), "Degraded")[0] == "False"
        assert condition(restored(), "Progressing")[:2] == ("False", "AsSpecified")

    def test_completes_the_record_of_the_loss(self) -> None:
        last = status_of(restored()).last_recovery
        assert last is not None
        assert (last.id, last.restored_at) == ("r1", SWAP_BACK.resumed_at)
        assert [each.kind for each in status_of(restored()).recoveries] == ["Borrow", "SwapBack"]

    def test_is_announced(self) -> None:
        assert events(restored()) == ["SwappedBack", "ReplicationHealthy"]


class TestALossWithoutADonor:
    @staticmethod
    def world() -> World:
        waiting = borrowed(0, 1, donor=1, phase=EnginePhase.WAITING, serving=False)
        stages = tuple(
            each.model_copy(update={"served_by": None}) if each.stage == 1 else each for each in waiting.stages
        )
        world = with_engine(healthy_world(), 0, waiting.model_copy(update={"stages": stages}), verified=False)
        return with_pod(world, stage(0, 1), ready=False)

    def test_is_not_ready_but_available(self) -> None:
        status, reason, message = condition(self.world(), "Ready")
        assert (status, reason) == ("False", "StageLost")
        assert "instance 0 waits for stage 0.1: no donor is left" in message
        assert condition(self.world(), "Available")[:2] == ("True", "SomeInstancesServing")
        assert condition(self.world(), "Degraded")[:2] == ("True", "StageLost")

    def test_is_announced(self) -> None:
        assert events(self.world()) == ["StageLost", "ReplicationUnhealthy"]


class TestALostEngine:
    def test_is_not_ready_but_available(self) -> None:
        status, reason, message = condition(silent(healthy_world(), 0), "Ready")
        assert (status, reason) == ("False", "EngineLost")
        assert "the engine of instance 0 (tiny-0-engine-" in message
        assert condition(silent(healthy_world(), 0), "Available")[0] == "True"
        assert status_of(silent(healthy_world(), 0)).instances[0].phase == "Unreachable"

    def test_is_announced_and_so_is_its_return(self) -> None:
        lost = silent(healthy_world(), 0)
        assert events(lost) == ["InstanceLost"]
        assert events(with_engine(settled(lost), 0, engine_state(0))) == ["InstanceReady", "ReplicationHealthy"]

    def test_leaves_its_recoveries_in_the_record(self) -> None:
        lost = silent(settled(borrowing()), 0)
        assert [each.id for each in status_of(lost).recoveries] == ["r1"]

    def test_both_lost_is_not_available(self) -> None:
        world = silent(silent(healthy_world(), 0), 1)
        assert condition(world, "Available")[:2] == ("False", "NoInstanceServing")


def test_a_blink_of_recovering_keeps_the_endpoint_and_the_verification() -> None:
    world = with_engine(healthy_world(), 0, engine_state(0, phase=EnginePhase.RECOVERING))
    instance = status_of(world).instances[0]
    assert instance.serving and instance.verified


def test_the_record_keeps_the_last_ten() -> None:
    many = tuple(
        BORROW.model_copy(update={"id": f"r{n}", "detected_at": NOW + timedelta(seconds=n)}) for n in range(10)
    )
    first = settled(with_engine(healthy_world(), 0, engine_state(0, recoveries=many)))
    later = BORROW.model_copy(update={"id": "s1", "detected_at": NOW + timedelta(seconds=99)})
    world = with_engine(first, 1, engine_state(1, recoveries=(later,)))
    record = status_of(world).recoveries
    assert len(record) == 10
    assert (record[0].id, record[-1].id) == ("r1", "s1")


def test_a_stage_pod_that_is_replaced_elsewhere_stays_degraded_until_then() -> None:
    world = without_pod(borrowing(), stage(0, 1))
    assert condition(world, "Degraded")[0] == "True"
    assert condition(world, "Ready")[0] == "True"


def test_transition_times_change_with_the_status_only() -> None:
    before = healthy_world()
    (old,) = [each for each in before.object.status.conditions if each.type == "Ready"]
    later = NOW + timedelta(hours=1)
    after = status_of(with_engine(before, 0, borrowed(0, 1, donor=1)), later)
    times = {each.type: each.last_transition_time for each in after.conditions}
    assert times["Ready"] == old.last_transition_time
    assert times["Degraded"] == later
