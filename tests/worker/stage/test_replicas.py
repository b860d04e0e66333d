"""What one stage has sealed, another keeps: it can stand in with it, and nothing of an older topology gets in."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from resilientllm_worker.protocol.blocks import pack_blocks, unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    Failed,
    Flush,
    Flushed,
    Forget,
    ReplicaHello,
    ReplicateTo,
    ReplicationReport,
    ReplicaWelcome,
    Seal,
    Sealed,
    Stamp,
    StepFailed,
    StepResult,
    Stitched,
)
from resilientllm_worker.transport.connection import dial
from resilientllm_worker.transport.errors import ConnectionClosed

from tests.worker.stage.builders import (
    HOME_BLOCKS,
    PATIENCE_SECONDS,
    POOL_BLOCKS,
    TOKEN,
    Engine,
    MemoryStore,
    Stage,
    closing,
)

OWN, OTHER = 0, 1
"""Instances: the one whose blocks are kept, and the one whose stage keeps them."""
BEAT_SECONDS = 0.01


def a_stage(instance: int) -> Stage:
    return Stage(stage=0, instance=instance, store=MemoryStore())


def store_of(stage: Stage) -> MemoryStore:
    assert stage.model.store is not None
    return stage.model.store


def content(stage: Stage, slot: int) -> bytes:
    return store_of(stage)[slot].rstrip()


def an_engine(stage: Stage) -> Engine:
    return Engine(stage.address, instance=OWN, heartbeat=BEAT_SECONDS)


def seal(number: int, block: int, parent: int = 0) -> Seal:
    return Seal(number, block, parent, 1 if parent else 0, owner=1, key=b"key %d" % number)


def tell_sealed(engine: Engine, *seals: Seal, epoch: int = 1) -> None:
    engine.connection.send(Sealed(Stamp(1, epoch), list(seals), []))


def replicate(engine: Engine, to: Stage, epoch: int = 1, term: int = 1) -> None:
    engine.connection.send(ReplicateTo(Stamp(term, epoch), to.address))


def report_when(engine: Engine, condition: Callable[[ReplicationReport], bool]) -> ReplicationReport:
    """The first that is so."""
    while True:
        try:
            report = engine.heartbeats.get(timeout=PATIENCE_SECONDS).replication
        except queue.Empty:
            pytest.fail("no heartbeat said so")
        if report is not None and condition(report):
            return report


def held(answer: Stitched) -> dict[int, int]:
    blocks, numbers = unpack_blocks(answer.held_blocks), unpack_numbers(answer.held_numbers)
    return dict(zip(blocks.tolist(), numbers.tolist(), strict=True))


@contextmanager
def kept() -> Iterator[tuple[Stage, Engine, Stage]]:
    """Blocks 1 and 2 are sealed on the own stage, and kept by the other."""
    with a_stage(OWN) as own, a_stage(OTHER) as other, closing(engine := an_engine(own)):
        engine.stitch(epoch=1)
        store_of(own)[1], store_of(own)[2] = b"one", b"two"
        tell_sealed(engine, seal(1, 1), seal(2, 2, parent=1))
        replicate(engine, other)
        report_when(engine, lambda report: report.stored_blocks == 2)
        yield own, engine, other


def test_a_stage_that_stands_in_has_what_was_kept_there() -> None:
    with kept() as (_, _, other), closing(guest := an_engine(other)):
        answer = guest.stitch(epoch=2, report=True)
        assert held(answer) == {1: 1, 2: 2}
        assert answer.capacity_blocks == POOL_BLOCKS
        guest.step(0, epoch=2, block_ids=([1, 2, 3],), computed=8)
        guest.expect(StepResult)
        (step,) = other.model.steps
        slots = step.new[0].block_ids[0]
        assert [content(other, slot) for slot in slots[:2]] == [b"one", b"two"]
        assert all(slot >= HOME_BLOCKS for slot in slots)


def test_what_was_not_kept_cannot_be_read() -> None:
    with kept() as (_, _, other), closing(guest := an_engine(other)):
        guest.stitch(epoch=2, report=True)
        guest.step(0, epoch=2, block_ids=([1, 5, 3],), computed=8)
        assert "block" in guest.expect(StepFailed).reason


def test_a_stage_tells_what_it_holds_only_if_it_is_asked() -> None:
    with kept() as (_, _, other), closing(guest := an_engine(other)):
        assert held(guest.stitch(epoch=2)) == {}


def test_a_block_that_a_step_writes_is_kept_no_longer() -> None:
    with kept() as (_, engine, other), closing(guest := an_engine(other)):
        engine.step(0, epoch=1, block_ids=([2],))
        engine.expect(StepResult)
        tell_sealed(engine, seal(3, 3, parent=1))  # voids travel with the next blocks
        report_when(engine, lambda report: report.stored_blocks == report.sealed_blocks == 2 and report.sent_blocks > 2)
        assert held(guest.stitch(epoch=2, report=True)) == {1: 1, 3: 3}


def test_new_content_of_a_block_replaces_the_old() -> None:
    with kept() as (own, engine, other), closing(guest := an_engine(other)):
        engine.step(0, epoch=1, block_ids=([2],))
        engine.expect(StepResult)
        store_of(own)[2] = b"again"
        tell_sealed(engine, seal(3, 2, parent=1))
        report_when(engine, lambda report: report.stored_blocks == 2 and report.sent_blocks > 2)
        assert held(guest.stitch(epoch=2, report=True)) == {1: 1, 2: 3}
        guest.step(0, epoch=2, block_ids=([1, 2, 4],), computed=8)
        guest.expect(StepResult)
        assert content(other, other.model.steps[0].new[0].block_ids[0][1]) == b"again"


def test_forgotten_blocks_are_not_held_any_more() -> None:
    with kept() as (_, _, other), closing(guest := an_engine(other)):
        guest.stitch(epoch=2, report=True)
        guest.connection.send(Forget(Stamp(1, 2), pack_blocks([2])))
        assert held(guest.stitch(epoch=3, report=True)) == {1: 1}


def test_after_a_fence_the_lost_stage_can_store_nothing() -> None:
    """It lives on, cut off from its engine, and goes on sending."""
    with kept() as (own, engine, other), closing(guest := an_engine(other)):
        guest.stitch(epoch=2, report=True)
        store_of(own)[2] = b"stale"
        tell_sealed(engine, seal(9, 3, parent=2))
        report_when(engine, lambda report: not report.connected and report.lag_blocks >= 1)
        assert held(guest.stitch(epoch=3, report=True)) == {1: 1, 2: 2}


def flush(engine: Engine, epoch: int = 1, call: int = 99) -> None:
    engine.connection.send(Flush(call, Stamp(1, epoch)))
    assert engine.expect(Flushed).call == call


def test_a_stage_that_is_left_sends_what_is_open_and_the_newcomer_goes_on_with_it() -> None:
    with kept() as (own, engine, other), closing(guest := an_engine(other)):
        store_of(own)[3] = b"half"
        engine.connection.send(Sealed(Stamp(1, 1), [Seal(3, 3, 2, 2, 1, b"")], []))
        flush(engine)
        assert held(guest.stitch(epoch=2, report=True)) == {1: 1, 2: 2, 3: 3}
        guest.step(0, epoch=2, block_ids=([1, 2, 3],), computed=10)
        guest.expect(StepResult)
        slots = other.model.steps[0].new[0].block_ids[0]
        assert [content(other, slot) for slot in slots] == [b"one", b"two", b"half"]
        assert held(guest.stitch(epoch=3, report=True)) == {1: 1, 2: 2}, "the step has written into it"


def test_a_stage_that_stays_keeps_what_is_open_over_a_stitch() -> None:
    with a_stage(OTHER) as other, closing(guest := an_engine(other)):
        guest.stitch(epoch=1)
        guest.step(0, epoch=1, block_ids=([1, 2],))
        guest.expect(StepResult)
        guest.connection.send(Sealed(Stamp(1, 1), [Seal(1, 1, 0, 0, 1, b"")], []))
        guest.stitch(epoch=2)
        guest.step(0, epoch=2, block_ids=([1],), computed=3)
        guest.expect(StepResult)
        guest.stitch(epoch=3)
        guest.step(0, epoch=3, block_ids=([2],), computed=3)
        assert "block" in guest.expect(StepFailed).reason, "that one was not sealed"


def test_a_flush_is_answered_also_where_there_is_nothing_to_send_or_it_is_out_of_date() -> None:
    with kept() as (_, engine, other), closing(guest := an_engine(other)):
        flush(engine)
        flush(engine, epoch=7)
        flush(guest)


def test_blocks_of_a_guest_are_sent_home() -> None:
    """The own stage comes back empty, is sent everything, and takes its place."""
    with kept() as (_, _, other), a_stage(OWN) as back, closing(guest := an_engine(other), home := an_engine(back)):
        guest.stitch(epoch=2, report=True)
        guest.step(0, epoch=2, block_ids=([1, 2, 3],), computed=8)
        guest.expect(StepResult)
        tell_sealed(guest, seal(3, 3, parent=2), epoch=2)
        replicate(guest, back, epoch=2)
        report_when(guest, lambda report: report.stored_blocks == 3)
        assert held(home.stitch(epoch=3, report=True)) == {1: 1, 2: 2, 3: 3}
        assert [content(back, block) for block in (1, 2)] == [b"one", b"two"]


def test_replicas_stay_good_for_the_next_time_when_a_guest_leaves() -> None:
    with kept() as (_, engine, other), closing(guest := an_engine(other)):
        guest.stitch(epoch=2, report=True)
        guest.release(epoch=3)
        engine.stitch(epoch=4)
        replicate(engine, other, epoch=4)
        report = report_when(engine, lambda report: report.connected and report.stored_blocks == 2)
        assert report.sent_blocks == 2, "what is there already is not sent again"


def test_what_is_sealed_is_counted_while_nobody_keeps_it() -> None:
    with kept() as (_, engine, other), closing(guest := an_engine(other)):
        engine.connection.send(ReplicateTo(Stamp(1, 1), None))
        report = report_when(engine, lambda report: not report.address)
        assert (report.sealed_blocks, report.stored_blocks) == (2, 0)
        guest.stitch(epoch=2, report=True)
        assert report_when(guest, lambda report: not report.address).sealed_blocks == 2


def test_an_engine_of_a_higher_term_starts_anew() -> None:
    with kept() as (own, engine, other):
        engine.close()
        with closing(successor := an_engine(own), guest := an_engine(other)):
            successor.stitch(epoch=1, term=2)
            replicate(successor, other, term=2)
            report_when(successor, lambda report: report.connected)
            assert held(guest.stitch(epoch=2, term=2, report=True)) == {}


@pytest.mark.parametrize(
    ("stage", "stamp", "layout"),
    [(1, Stamp(1, 1), "bytes"), (0, Stamp(0, 9), "bytes"), (0, Stamp(1, 1), "other")],
    ids=["another stage's", "an older stamp", "another shape"],
)
def test_strange_replicas_are_refused(stage: int, stamp: Stamp, layout: str) -> None:
    with kept() as (_, _, other), closing(connection := dial(other.address, TOKEN, PATIENCE_SECONDS)):
        connection.send(ReplicaHello(PROTOCOL_VERSION, OWN, stage, stamp, layout, 16))
        welcome = connection.receive()
        assert isinstance(welcome, ReplicaWelcome)
        assert welcome.refusal
        with pytest.raises(ConnectionClosed):
            connection.receive()


def test_nobody_keeps_blocks_of_an_instance_that_is_served_there() -> None:
    with kept() as (own, _, _), closing(connection := dial(own.address, TOKEN, PATIENCE_SECONDS)):
        connection.send(ReplicaHello(PROTOCOL_VERSION, OWN, 0, Stamp(1, 1), "bytes", 16))
        welcome = connection.receive()
        assert isinstance(welcome, ReplicaWelcome)
        assert "itself" in welcome.refusal


def test_a_keeper_of_a_newer_engines_blocks_obeys_no_older_engine_and_takes_none_of_its_blocks() -> None:
    """Both count their seals from 1, so the one would take the blocks of the other for its own."""
    with kept() as (_, engine, other), closing(newer := dial(other.address, TOKEN, PATIENCE_SECONDS)):
        newer.send(ReplicaHello(PROTOCOL_VERSION, OWN, 0, Stamp(2, 1), "bytes", 16))
        welcome = newer.receive()
        assert isinstance(welcome, ReplicaWelcome)
        assert (welcome.refusal, welcome.held_blocks) == ("", b""), "what the older engine numbered is of no use"
        with closing(guest := an_engine(other)):
            assert guest.welcome.stamp == Stamp(2, 0), "who attaches now must bring a higher term"
            refusal = guest.ask_stitch(epoch=7, report=True)
            assert isinstance(refusal, Failed) and "older" in refusal.reason
        replicate(engine, other)
        report_when(engine, lambda report: not report.connected)
        newer.close()
        with closing(older := dial(other.address, TOKEN, PATIENCE_SECONDS)):
            older.send(ReplicaHello(PROTOCOL_VERSION, OWN, 0, Stamp(1, 9), "bytes", 16))
            welcome = older.receive()
            assert isinstance(welcome, ReplicaWelcome)
            assert "newer" in welcome.refusal


def test_what_a_newer_engine_seals_does_not_go_out_over_the_channel_of_the_one_before() -> None:
    """Until it says where to."""
    with kept() as (own, _, other), closing(newer := an_engine(own), older := an_engine(other)):
        newer.stitch(epoch=1, term=2)
        newer.connection.send(Sealed(Stamp(2, 1), [seal(1, 3)], []))
        assert not report_when(newer, lambda report: report.sealed_blocks == 1).address
        assert held(older.stitch(epoch=2, report=True)) == {1: 1, 2: 2}
