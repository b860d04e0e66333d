"""What every replica channel keeps to, whatever it runs on. A new transport joins by its line in `PAIRS`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from queue import Queue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    ReplicaHello,
    Replicas,
    ReplicasKept,
    ReplicaWelcome,
    Seal,
)
from resilientllm_worker.replication.channel import MAX_BATCH_BYTES, ReplicaChannel, ReplicaInlet, batch_limit
from resilientllm_worker.replication.tcp import connect
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed, ProtocolError

from tests.worker.replication.builders import STAMP, a_seal, some_bytes
from tests.worker.replication.memory_channel import memory_wire
from tests.worker.transport.builders import PATIENCE_SECONDS, TOKEN, InThread, listening

HELLO = ReplicaHello(PROTOCOL_VERSION, 0, 1, STAMP, "layout", 16)
WELCOME = ReplicaWelcome("", b"\1\0\0\0", b"\2\0\0\0\0\0\0\0")
KEPT = ReplicasKept([1], [2], [3], [4], 5)
Ends = tuple[ReplicaChannel, ReplicaInlet]


@contextlib.contextmanager
def over_tcp() -> Iterator[Ends]:
    accepted: Queue[Connection] = Queue()
    done: Queue[None] = Queue()

    def serve(connection: Connection) -> None:
        assert connection.receive() == HELLO
        connection.send(WELCOME)
        accepted.put(connection)
        done.get(timeout=PATIENCE_SECONDS)

    with listening(serve) as listener:
        channel = connect(listener.address, TOKEN, HELLO)
        yield channel, accepted.get(timeout=PATIENCE_SECONDS)
        done.put(None)
        channel.close()


@contextlib.contextmanager
def in_memory() -> Iterator[Ends]:
    open_channel, inlet = memory_wire()
    inlet.send(WELCOME)
    yield open_channel(), inlet
    inlet.close()


PAIRS = [over_tcp, in_memory]


Pair = Callable[[], AbstractContextManager[Ends]]


class Landed:
    """Takes batches as they come."""

    def __init__(self, inlet: ReplicaInlet) -> None:
        self._inlet = inlet
        self._memory = memoryview(b"")
        self.batches: list[tuple[Replicas, bytes]] = []

    def take(self, count: int = 1) -> None:
        for _ in range(count):
            batch = self._inlet.receive_replicas(self._allocate)
            self.batches.append((batch, bytes(self._memory)))

    def take_all(self) -> None:
        while True:
            self.take()

    def _allocate(self, batch: Replicas) -> memoryview:
        self._memory = memoryview(bytearray(batch.body_bytes))
        return self._memory


def seals(count: int) -> list[Seal]:
    return [a_seal(number) for number in range(1, count + 1)]


@pytest.mark.parametrize("pair", PAIRS)
class TestContract:
    def test_the_sender_learns_what_it_is_welcomed_with(self, pair: Pair) -> None:
        with pair() as (channel, _):
            assert channel.welcome == WELCOME

    @settings(max_examples=15, deadline=None)
    @given(sizes=st.lists(st.integers(0, 1 << 19), max_size=6))
    def test_batches_arrive_whole_and_in_order(self, pair: Pair, sizes: list[int]) -> None:
        sent = [
            (Replicas(seals(place), [7] * place, [place], [9], size), some_bytes(size, place))
            for place, size in enumerate(sizes)
        ]
        with pair() as (channel, inlet):
            landed = Landed(inlet)
            receiving = InThread(lambda: landed.take(len(sent)))
            memory = bytearray(1 << 19)
            for batch, body in sent:
                memory[: len(body)] = body
                content = memoryview(memory)[: len(body)]
                channel.send(batch.seals, batch.checksums, batch.void, batch.ended, content)
                memory[:] = bytes(len(memory))  # free for others once `send` has returned
            receiving.result()
        assert landed.batches == sent

    def test_answers_arrive_in_order(self, pair: Pair) -> None:
        answers = [ReplicasKept([number], [], [], [], 0) for number in range(5)]
        with pair() as (channel, inlet):
            for answer in answers:
                inlet.send(answer)
            assert InThread(lambda: [channel.receive() for _ in answers]).result() == answers

    def test_answers_arrive_while_a_batch_cannot_go_out(self, pair: Pair) -> None:
        with pair() as (channel, inlet):
            sending, _ = stuck(channel)
            inlet.send(KEPT)
            assert InThread(channel.receive).result() == KEPT
            assert sending.running
            InThread(Landed(inlet).take_all)
            sending.result()

    @pytest.mark.parametrize("closing_end", [0, 1])
    def test_closing_either_end_wakes_both_and_delivers_nothing_in_part(self, pair: Pair, closing_end: int) -> None:
        with pair() as ends:
            channel, inlet = ends
            waiting = InThread(channel.receive)
            sending, went = stuck(channel)
            ends[closing_end].close()
            ends[closing_end].close()
            for blocked in (waiting, sending):
                with pytest.raises(ConnectionClosed):
                    blocked.result()
            landed = Landed(inlet)
            with pytest.raises(ConnectionClosed):
                InThread(landed.take_all).result()
            assert all(len(body) == SIZE for _, body in landed.batches)
            assert len(landed.batches) <= len(went) + 1

    def test_closing_wakes_a_keeper_that_waits(self, pair: Pair) -> None:
        with pair() as (channel, inlet):
            waiting = InThread(Landed(inlet).take)
            channel.close()
            with pytest.raises(ConnectionClosed):
                waiting.result()
            with pytest.raises(ConnectionClosed):
                channel.send([], [], [1], [], memoryview(b""))

    def test_an_error_of_who_gives_memory_closes_the_channel(self, pair: Pair) -> None:
        def refuse(batch: Replicas) -> memoryview:
            raise ProtocolError("no")

        with pair() as (channel, inlet):
            channel.send(seals(1), [1], [], [], memoryview(b"0123"))
            with pytest.raises(ProtocolError, match="no"):
                InThread(lambda: inlet.receive_replicas(refuse)).result()
            with pytest.raises(ConnectionClosed):
                InThread(channel.receive).result()


SIZE = 8 << 20


def stuck(channel: ReplicaChannel) -> tuple[InThread, list[None]]:
    """Sends more than can be under way while nobody reads; and what went."""
    content, went = memoryview(bytearray(SIZE)), list[None]()

    def send() -> None:
        for _ in range(8):
            channel.send(seals(1), [1], [], [], content)
            went.append(None)

    return InThread(send), went


def test_a_batch_may_always_have_one_block() -> None:
    assert batch_limit(1 << 40) == 1
    assert batch_limit(1 << 20) * (1 << 20) == MAX_BATCH_BYTES


class TestTCP:
    def test_a_keeper_that_is_not_there(self) -> None:
        with listening() as listener:
            address = listener.address
        for nowhere in (address, "nonsense"):
            with pytest.raises(ConnectionFailed):
                connect(nowhere, TOKEN, HELLO)

    def test_another_token_is_refused(self) -> None:
        with listening() as listener, pytest.raises(ConnectionFailed, match="authenticate"):
            connect(listener.address, b"another", HELLO)

    def test_something_else_than_a_welcome_is_refused(self) -> None:
        with listening() as listener, pytest.raises(ProtocolError, match="expected a ReplicaWelcome"):
            connect(listener.address, TOKEN, HELLO)  # it is echoed

    def test_something_else_than_an_answer_is_refused(self) -> None:
        with over_tcp() as (channel, inlet):
            inlet.send(WELCOME)
            with pytest.raises(ProtocolError, match="expected ReplicasKept"):
                InThread(channel.receive).result()

    def test_replicas_have_no_place_on_a_command_channel(self) -> None:
        with over_tcp() as (channel, inlet):
            assert isinstance(inlet, Connection)
            channel.send(seals(1), [1], [], [], memoryview(b"0123"))
            with pytest.raises(ProtocolError, match="where only commands belong"):
                InThread(inlet.receive).result()
