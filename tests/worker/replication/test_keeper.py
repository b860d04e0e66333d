"""A keeper stores whole batches that keep to the rules, as long as it may, and nothing else."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import ReplicaHello, Replicas, ReplicasKept, Seal
from resilientllm_worker.replication.channel import batch_limit
from resilientllm_worker.replication.checksum import checksums
from resilientllm_worker.replication.priority import NICENESS
from resilientllm_worker.replication.tcp import ReplicaSender, connect
from resilientllm_worker.tenancy.blocks import Blocks
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.pool import Pool
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed

from tests.worker.replication.builders import Keeper, a_hello, a_seal, keeping, some_bytes
from tests.worker.transport.builders import TOKEN, InThread, a_step, eventually


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with keeping() as one:
        yield one


@contextlib.contextmanager
def sending_to(keeper: Keeper) -> Iterator[ReplicaSender]:
    channel = connect(keeper.address, TOKEN, a_hello(keeper.cache))
    try:
        yield channel
    finally:
        channel.close()


@contextlib.contextmanager
def talking_to(keeper: Keeper) -> Iterator[Connection]:
    """Past the hello, without anything that keeps to the rules."""
    connection = dial(keeper.address, TOKEN, 5.0)
    try:
        connection.send(a_hello(keeper.cache))
        connection.receive()
        yield connection
    finally:
        connection.close()


def a_batch(keeper: Keeper, *seals: Seal, **changes: object) -> tuple[Replicas, bytes]:
    size = keeper.cache.block_bytes
    body = some_bytes(len(seals) * size, len(seals))
    batch = Replicas(list(seals), checksums(seals, memoryview(body), size), [], [], len(body))
    return msgspec.structs.replace(batch, **changes), body


def keep(channel: ReplicaSender, batch: Replicas, body: bytes) -> ReplicasKept:
    channel.send(batch.seals, batch.checksums, batch.void, batch.ended, memoryview(body))
    kept: ReplicasKept = InThread(channel.receive).result()
    return kept


class TestStoring:
    def test_content_void_and_ends(self, keeper: Keeper) -> None:
        with sending_to(keeper) as channel:
            batch, body = a_batch(keeper, a_seal(1), a_seal(2, parent=1))
            assert keep(channel, batch, body) == ReplicasKept([1, 2], [], [], [], 38)
            assert b"".join(keeper.contents().values()) == body
            batch, body = a_batch(keeper, a_seal(3, block=1), void=[2], ended=[4])
            assert keep(channel, batch, body) == ReplicasKept([3], [], [], [], 39)
            assert keeper.contents() == {3: body}
            assert keeper.shelf.ended == [4]

    def test_it_says_what_it_has(self, keeper: Keeper) -> None:
        with sending_to(keeper) as channel:
            keep(channel, *a_batch(keeper, a_seal(1, block=4), a_seal(2, block=7)))
        with sending_to(keeper) as channel:
            held = unpack_blocks(channel.welcome.held_blocks), unpack_numbers(channel.welcome.held_numbers)
            assert [each.tolist() for each in held] == [[4, 7], [1, 2]]

    def test_a_corrupt_block_and_what_is_behind_it_is_left_out(self, keeper: Keeper) -> None:
        with sending_to(keeper) as channel:
            batch, body = a_batch(keeper, a_seal(1), a_seal(2), a_seal(3, parent=2), a_seal(4))
            changed = bytearray(body)
            changed[keeper.cache.block_bytes] ^= 0x80
            assert keep(channel, batch, bytes(changed)) == ReplicasKept([1, 4], [3], [2], [], 38)
            size = keeper.cache.block_bytes
            assert keeper.contents() == {1: body[:size], 4: body[3 * size :]}

    def test_what_has_no_room_is_refused(self) -> None:
        with keeping(capacity=1) as keeper, sending_to(keeper) as channel:
            kept = keep(channel, *a_batch(keeper, a_seal(1), a_seal(2)))
            assert kept == ReplicasKept([1], [2], [], [], 0)

    def test_its_thread_gives_way_to_serving(self, keeper: Keeper) -> None:
        ours = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        with sending_to(keeper):
            (thread,) = [each for each in threading.enumerate() if each.name.startswith("connection ")]
            assert thread.native_id is not None
            assert os.getpriority(os.PRIO_PROCESS, thread.native_id) == max(ours, NICENESS)
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == ours


class TestRealBlocks:
    """What a stage has in place of the shelf."""

    @pytest.mark.parametrize("blocks", [Pool(1, 40).tenant(0), HomeBlocks(41)], ids=["pool", "home"])
    def test_content_is_in_the_slots_that_they_gave(self, keeper: Keeper, blocks: Blocks) -> None:
        keeper.shelf = blocks
        size = keeper.cache.block_bytes
        with sending_to(keeper) as channel:
            batch, body = a_batch(keeper, a_seal(1), a_seal(2, parent=1), a_seal(4, parent=3))
            assert keep(channel, batch, body) == ReplicasKept([1, 2], [4], [], [], 38)
            held = {seal.number: keeper.cache.content(slot) for seal, slot in blocks.seals()}
            assert held == {1: body[:size], 2: body[size : 2 * size]}
            assert keep(channel, *a_batch(keeper, void=[2], ended=[1])) == ReplicasKept([], [], [], [], 39)
            assert [seal.number for seal, _ in blocks.seals()] == [1]


class TestFencing:
    def test_a_hello_that_is_not_in_force_is_refused(self, keeper: Keeper) -> None:
        keeper.fence()
        with sending_to(keeper) as channel:
            assert "not in force" in channel.welcome.refusal
            assert channel.welcome.held_blocks == b""
            with pytest.raises(ConnectionClosed):
                InThread(channel.receive).result()

    def test_nothing_is_committed_after_a_fence(self, keeper: Keeper) -> None:
        keeper.cache.write_gate.close()
        with sending_to(keeper) as channel:
            batch, body = a_batch(keeper, a_seal(1), a_seal(2))
            channel.send(batch.seals, batch.checksums, [], [], memoryview(body))
            keeper.cache.write_gate.await_someone()
            keeper.fence()
            keeper.cache.write_gate.open()
            with pytest.raises(ConnectionClosed):
                InThread(channel.receive).result()
            assert keeper.untouched()

    @pytest.mark.parametrize("change", [{"layout": "other"}, {"protocol": 1}, {"block_bytes": 1}])
    def test_another_layout_is_refused_in_words(self, keeper: Keeper, change: dict[str, object]) -> None:
        hello: ReplicaHello = msgspec.structs.replace(a_hello(keeper.cache), **change)
        channel = connect(keeper.address, TOKEN, hello)
        assert "expected protocol" in channel.welcome.refusal
        channel.close()


LIMIT = batch_limit(256)
BROKEN: dict[str, Callable[[Keeper], Replicas]] = {
    "too short": lambda keeper: a_batch(keeper, a_seal(1), body_bytes=keeper.cache.block_bytes - 1)[0],
    "too long": lambda keeper: a_batch(keeper, a_seal(1), body_bytes=keeper.cache.block_bytes + 1)[0],
    "no content": lambda keeper: a_batch(keeper, a_seal(1), body_bytes=0)[0],
    "content of nothing": lambda keeper: a_batch(keeper, body_bytes=keeper.cache.block_bytes)[0],
    "too many": lambda keeper: a_batch(keeper, *(a_seal(number) for number in range(1, LIMIT + 2)))[0],
    "checksum missing": lambda keeper: a_batch(keeper, a_seal(1), checksums=[])[0],
    "checksum too many": lambda keeper: a_batch(keeper, a_seal(1), checksums=[1, 2])[0],
    "checksum below": lambda keeper: a_batch(keeper, a_seal(1), checksums=[-1])[0],
    "null block": lambda keeper: a_batch(keeper, a_seal(1, block=0))[0],
    "negative block": lambda keeper: a_batch(keeper, a_seal(1, block=-1))[0],
    "large block": lambda keeper: a_batch(keeper, a_seal(1, block=1 << 31))[0],
    "void block": lambda keeper: a_batch(keeper, a_seal(1), void=[-5])[0],
    "block twice": lambda keeper: a_batch(keeper, a_seal(1, block=1), a_seal(2, block=1))[0],
    "number twice": lambda keeper: a_batch(keeper, Seal(1, 1, 0, 0, 1, b""), Seal(1, 2, 0, 0, 1, b""))[0],
    "number 0": lambda keeper: a_batch(keeper, Seal(0, 1, 0, 0, 1, b""))[0],
    "large number": lambda keeper: a_batch(keeper, Seal(1 << 63, 1, 0, 0, 1, b""))[0],
    "own parent": lambda keeper: a_batch(keeper, a_seal(1, parent=1))[0],
    "negative depth": lambda keeper: a_batch(keeper, a_seal(1, depth=-1))[0],
}


class TestBrokenRules:
    @pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
    def test_they_close_the_connection_and_nothing_is_stored(
        self, keeper: Keeper, broken: Callable[[Keeper], Replicas]
    ) -> None:
        batch = broken(keeper)
        with talking_to(keeper) as connection:
            with contextlib.suppress(ConnectionClosed):  # it may be closed before all has gone
                connection.send(batch, [bytes(batch.body_bytes)])
            with pytest.raises(ConnectionClosed):
                InThread(connection.receive).result()
        assert keeper.untouched()
        assert_serves(keeper)

    def test_a_command_closes_the_connection(self, keeper: Keeper) -> None:
        with talking_to(keeper) as connection:
            connection.send(a_step())
            with pytest.raises(ConnectionClosed):
                InThread(connection.receive).result()
        assert_serves(keeper)

    def test_a_batch_that_ends_within_is_not_stored(self, keeper: Keeper) -> None:
        batch, body = a_batch(keeper, a_seal(1), a_seal(2))
        for missing in (1, keeper.cache.block_bytes, len(body), len(body) + 3):
            with talking_to(keeper) as connection:
                frame = b"".join(connection.encode(batch, [body]))
                connection.send_parts([memoryview(frame)[:-missing]])
        assert eventually(lambda: not any(each.name.startswith("connection ") for each in threading.enumerate()))
        assert keeper.untouched()
        assert_serves(keeper)

    @pytest.mark.parametrize("seed", range(40))
    def test_garbage_never_stops_the_keeper(self, keeper: Keeper, seed: int) -> None:
        rng = random.Random(seed)
        batch, body = a_batch(keeper, a_seal(1), a_seal(2, parent=1), void=[3], ended=[1])
        with talking_to(keeper) as connection:
            frame = bytearray(b"".join(connection.encode(batch, [body])))
            header = len(frame) - len(body)
            for _ in range(rng.randint(1, 4)):
                frame[rng.randrange(header)] = rng.randrange(256)
            with contextlib.suppress(ConnectionClosed):
                connection.send_parts([memoryview(bytes(frame))])
        for content in keeper.contents().values():
            assert content in (body[: len(content)], body[len(content) :])
        assert_serves(keeper)


def assert_serves(keeper: Keeper) -> None:
    with sending_to(keeper) as channel:
        assert keep(channel, *a_batch(keeper, a_seal(99))).stored == [99]


def test_good_content_under_a_wrong_label_is_corrupt() -> None:
    seals, body = [Seal(7, 3, 0, 0, 1, b"key")], memoryview(bytes(range(64)))
    (good,) = checksums(seals, body, 64)
    assert checksums(seals, body, 64) == [good]
    assert checksums([Seal(8, 3, 0, 0, 1, b"key")], body, 64) != [good]
    assert checksums([Seal(7, 4, 0, 0, 1, b"key")], body, 64) != [good]
