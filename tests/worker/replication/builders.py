"""Two stages' KV caches, a keeper to send to, and what is between them, of which a test states only what matters."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from resilientllm_worker.protocol.blocks import pack_blocks, pack_numbers
from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, ReplicaHello, ReplicasKept, Seal, Stamp
from resilientllm_worker.replication.channel import ReplicaChannel
from resilientllm_worker.replication.keeper import serve_replicas
from resilientllm_worker.replication.sender import Replicator
from resilientllm_worker.replication.tcp import connect
from resilientllm_worker.seams.kv_blocks import KVBlocks
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.listener import Listener

from tests.worker.transport.builders import PATIENCE_SECONDS, TOKEN

STAMP = Stamp(3, 7)
NO_LINGER = 0.0


def a_seal(number: int, block: int | None = None, parent: int = 0, owner: int = 1, depth: int = 0) -> Seal:
    return Seal(number, number if block is None else block, parent, depth, owner, number.to_bytes(8, "big"))


def a_hello(store: KVBlocks | Cache, stamp: Stamp = STAMP) -> ReplicaHello:
    return ReplicaHello(PROTOCOL_VERSION, 0, 1, stamp, store.layout, store.block_bytes)


class Gate:
    """Lets everyone through, until it is closed."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._waiting = threading.Semaphore(0)

    def __call__(self) -> None:
        if not self._open.is_set():
            self._waiting.release()
            assert self._open.wait(PATIENCE_SECONDS), "a test did not open its gate"

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def await_someone(self) -> None:
        assert self._waiting.acquire(timeout=PATIENCE_SECONDS), "nobody came to the gate"


class Cache:
    """Two layers of CPU tensors and their `KVBlocks`; a read or write stops at its gate half-way through."""

    def __init__(self, blocks: int = 40, width: int = 16) -> None:
        self.blocks = blocks
        self.layers = [torch.zeros(blocks, 2, width) for _ in range(2)]
        self._store = KVBlocks(self.layers, blocks)
        self.block_bytes, self.layout = self._store.block_bytes, self._store.layout
        self.read_gate, self.write_gate = Gate(), Gate()

    def compute(self, slot: int) -> bytes:
        """New content, as a step makes it."""
        for layer in self.layers:
            layer[slot] = torch.rand(layer.shape[1:])
        return self.content(slot)

    def content(self, slot: int) -> bytes:
        memory = bytearray(self.block_bytes)
        self._store.read([slot], memoryview(memory))
        return bytes(memory)

    def read(self, slots: Sequence[int], into: memoryview) -> None:
        half = len(slots) // 2
        self._store.read(slots[:half], into)
        self.read_gate()
        self._store.read(slots[half:], into[half * self.block_bytes :])

    def write(self, slots: Sequence[int], data: memoryview) -> None:
        half = len(slots) // 2
        self._store.write(slots[:half], data)
        self.write_gate()
        self._store.write(slots[half:], data[half * self.block_bytes :])


class Shelf:
    """`KeptBlocks` as simple as they can be: a slot for each block, as many as there are, nothing given up unasked."""

    def __init__(self, capacity: int) -> None:
        self.free = list(range(1, capacity + 1))
        self.kept: dict[int, tuple[Seal, int]] = {}
        self.reserved: set[int] = set()
        self.ended: list[int] = []
        self._dropped: list[int] = []

    def place(self, seals: Sequence[Seal]) -> list[int | None]:
        here = {seal.number for seal, _ in self.kept.values()}
        slots: list[int | None] = []
        for seal in seals:
            self.forget([seal.block])
            if not self.free or (seal.parent and seal.parent not in here):
                slots.append(None)
                continue
            here.add(seal.number)
            slots.append(self.free.pop())
            self.reserved.add(slots[-1] or 0)
        return slots

    def commit(self, seals: Sequence[Seal], slots: Sequence[int]) -> None:
        for seal, slot in zip(seals, slots, strict=True):
            self.reserved.remove(slot)
            self.kept[seal.block] = seal, slot

    def abandon(self, slots: Sequence[int]) -> None:
        self.reserved.difference_update(slots)
        self.free += slots

    def forget(self, blocks: Iterable[int]) -> list[int]:
        had = [block for block in blocks if block in self.kept]
        self.free += [self.kept.pop(block)[1] for block in had]
        return had

    def end(self, owners: Iterable[int]) -> None:
        self.ended += owners

    def take_dropped(self) -> list[int]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def drop(self, block: int) -> None:
        """Gives up one for lack of room, if it is there."""
        if block in self.kept:
            self._dropped.append(self.kept[block][0].number)
            self.forget([block])

    def held(self) -> tuple[bytes, bytes]:
        return pack_blocks(self.kept), pack_numbers(seal.number for seal, _ in self.kept.values())

    @property
    def room(self) -> int:
        return len(self.free)


class Keeper:
    """A stage that keeps replicas, on a real socket."""

    def __init__(self, capacity: int = 40, verify: bool = True, width: int = 16) -> None:
        self.cache = Cache(capacity + 1, width)
        self.shelf: Any = Shelf(capacity)
        self.in_force = True
        self.hellos: list[ReplicaHello] = []
        self._verify = verify
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._listener = Listener("127.0.0.1", 0, TOKEN, self._serve)
        self.address = self._listener.address

    def _serve(self, connection: Connection) -> None:
        hello = connection.receive()
        assert isinstance(hello, ReplicaHello)
        self.hellos.append(hello)
        self._connections.append(connection)
        serve_replicas(connection, hello, self.shelf, self.cache, self.may_store, self._verify)

    @contextlib.contextmanager
    def may_store(self) -> Iterator[bool]:
        with self._lock:
            yield self.in_force

    def fence(self) -> None:
        with self._lock:
            self.in_force = False

    def cut(self) -> None:
        """Breaks the connections that there are."""
        for connection in self._connections:
            connection.close()

    def contents(self) -> dict[int, bytes]:
        """By number, all that is kept."""
        with self._lock:
            return {seal.number: self.cache.content(slot) for seal, slot in self.shelf.kept.values()}

    def drop(self, block: int) -> None:
        with self._lock:
            self.shelf.drop(block)

    def untouched(self) -> bool:
        with self._lock:
            return not self.shelf.kept and not self.shelf.reserved and len(self.shelf.free) == self.cache.blocks - 1

    def close(self) -> None:
        self.cache.write_gate.open()
        self._listener.close()


@contextlib.contextmanager
def keeping(capacity: int = 40, verify: bool = True, width: int = 16) -> Iterator[Keeper]:
    keeper = Keeper(capacity, verify, width)
    try:
        yield keeper
    finally:
        keeper.close()


class Source:
    """A stage that serves: seals blocks and replicates them."""

    def __init__(
        self,
        blocks: int = 40,
        width: int = 16,
        dial: Callable[[str, ReplicaHello], ReplicaChannel] | None = None,
        linger_seconds: float = NO_LINGER,
        batch_blocks: int = 8,
    ) -> None:
        self.cache = Cache(blocks, width)
        self.sealed: dict[int, Seal] = {}
        self.truth: dict[int, bytes] = {}
        """By number, the content when it was sealed."""
        self._numbers = itertools.count(1)
        self.replicator = Replicator(
            self.cache,
            dial or (lambda address, hello: connect(address, TOKEN, hello)),
            lambda stamp: a_hello(self.cache, stamp),
            lambda: len(self.sealed),
            linger_seconds,
            batch_blocks,
        )

    def compute(self, *blocks: int, owner: int = 1) -> list[Seal]:
        """A step writes ``blocks``, each behind the one before, and they are sealed."""
        self.overwrite(*blocks)
        seals: list[Seal] = []
        for depth, block in enumerate(blocks):
            number = next(self._numbers)
            seal = a_seal(number, block, seals[-1].number if seals else 0, owner, depth)
            self.truth[number] = self.cache.compute(block)
            self.sealed[block] = seal
            seals.append(seal)
        self.replicator.offer([(seal, seal.block) for seal in seals], [])
        return seals

    def overwrite(self, *blocks: int) -> None:
        """A step is about to write ``blocks``, and does."""
        self.replicator.cancel(blocks)
        for block in blocks:
            self.sealed.pop(block, None)
            self.cache.compute(block)

    def redirect(self, keeper: Keeper | None, stamp: Stamp = STAMP) -> None:
        sealed = [(seal, seal.block) for seal in sorted(self.sealed.values(), key=lambda seal: seal.number)]
        self.replicator.redirect(stamp, keeper.address if keeper else None, lambda: sealed)

    @property
    def numbers(self) -> set[int]:
        return {seal.number for seal in self.sealed.values()}

    def is_kept_by(self, keeper: Keeper) -> bool:
        """Everything, and known to be so; with the content that it had when it was sealed."""
        report = self.replicator.report()
        kept = keeper.contents()
        assert all(self.truth[number] == content for number, content in kept.items())
        return report.lag_blocks == 0 and report.stored_blocks == len(self.sealed) and self.numbers <= kept.keys()

    def close(self) -> None:
        self.cache.read_gate.open()
        self.replicator.close()


@contextlib.contextmanager
def serving(
    blocks: int = 40,
    width: int = 16,
    dial: Callable[[str, ReplicaHello], ReplicaChannel] | None = None,
    linger_seconds: float = NO_LINGER,
    batch_blocks: int = 8,
) -> Iterator[Source]:
    source = Source(blocks, width, dial, linger_seconds, batch_blocks)
    try:
        yield source
    finally:
        source.close()


def kept_all(seals: Sequence[Seal], room: int = 10) -> ReplicasKept:
    return ReplicasKept([seal.number for seal in seals], [], [], [], room)


def some_bytes(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)
