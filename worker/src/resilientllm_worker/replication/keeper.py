"""The receiving end of replication: stores what another stage sends, in this stage's pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    ReplicaHello,
    Replicas,
    ReplicasKept,
    ReplicaWelcome,
    Seal,
)
from resilientllm_worker.replication.channel import ReplicaInlet, batch_limit
from resilientllm_worker.replication.checksum import checksums
from resilientllm_worker.replication.priority import yield_to_serving
from resilientllm_worker.replication.store import BlockStore, close_ranks
from resilientllm_worker.transport.errors import ProtocolError

logger = logging.getLogger(__name__)

_MAX_BLOCK = (1 << 31) - 1
_MAX_NUMBER = (1 << 63) - 1
_MAX_CHECKSUM = (1 << 64) - 1


class KeptBlocks(Protocol):
    """What a stage's pool keeps of one instance's sealed blocks, and where. Knows no content, and moves none."""

    def place(self, seals: Sequence[Seal]) -> list[int | None]:
        """Reserves a slot for each; None if there is no room, or the parent is neither here nor before it."""

    def commit(self, seals: Sequence[Seal], slots: Sequence[int]) -> None:
        """The content of ``seals`` is in ``slots`` now."""

    def abandon(self, slots: Sequence[int]) -> None:
        """Gives reserved slots back."""

    def forget(self, blocks: Iterable[int]) -> list[int]:
        """Frees what is kept of these blocks."""

    def end(self, owners: Iterable[int]) -> None:
        """These owners have ended."""

    def take_dropped(self) -> list[int]:
        """Numbers that were given up since the last call."""

    def held(self) -> tuple[bytes, bytes]:
        """Blocks and numbers, as in `ReplicaWelcome`."""

    @property
    def room(self) -> int:
        """Blocks that could be stored now without giving up any."""


def serve_replicas(
    inlet: ReplicaInlet,
    hello: ReplicaHello,
    blocks: KeptBlocks,
    store: BlockStore,
    may_store: Callable[[], AbstractContextManager[bool]],
    verify: bool = True,
) -> None:
    """Welcomes the sender of ``hello`` and keeps what it sends, until one of the two ends it.

    ``may_store`` is entered whenever ``blocks`` is used, and never while content moves. It holds the lock that guards
    ``blocks``, and yields whether the hello is still in force: not once the instance was fenced by a newer stamp, or
    sends over another channel. So nothing is committed after a fence.

    Call it in a thread that does nothing else: it lowers the thread's priority. ``verify`` is false only to show what
    checksums are good for.

    Raises:
        ConnectionClosed: the sender has gone. What it sent in part was not stored.
        ProtocolError: it broke the rules.
    """
    yield_to_serving()
    try:
        refusal = _refusal(hello, store)
        held = (b"", b"")
        with may_store() as allowed:
            if not allowed:
                refusal = refusal or f"{hello.stamp} of instance {hello.instance} is not in force here"
            if not refusal:
                held = blocks.held()
        inlet.send(ReplicaWelcome(refusal, *held))
        if refusal:
            logger.warning("keeps nothing for %s: %s", inlet.peer, refusal)
            return
        landing = _Landing(store.block_bytes)
        while True:
            kept = _keep(inlet.receive_replicas(landing.accept), landing.content, blocks, store, may_store, verify)
            if kept is None:
                logger.info("keeps nothing more for %s: %s is not in force any more", inlet.peer, hello.stamp)
                return
            inlet.send(kept)
    finally:
        inlet.close()


def _refusal(hello: ReplicaHello, store: BlockStore) -> str:
    ours = PROTOCOL_VERSION, store.layout, store.block_bytes
    theirs = hello.protocol, hello.layout, hello.block_bytes
    if ours == theirs:
        return ""
    return "expected protocol {}, layout {}, {} bytes a block; found {}, {}, {}".format(*ours, *theirs)


def _keep(
    batch: Replicas,
    content: memoryview,
    blocks: KeptBlocks,
    store: BlockStore,
    may_store: Callable[[], AbstractContextManager[bool]],
    verify: bool,
) -> ReplicasKept | None:
    """Stores one batch; None if that is not allowed any more, and then nothing of it is stored."""
    block_bytes = store.block_bytes
    found = checksums(batch.seals, content, block_bytes) if verify else batch.checksums
    good = [place for place, expected in enumerate(batch.checksums) if found[place] == expected]
    with may_store() as allowed:
        if not allowed:
            return None
        blocks.forget(batch.void)
        slots = blocks.place([batch.seals[place] for place in good])
        blocks.end(batch.ended)  # after what they filled last
    placed = [(place, slot) for place, slot in zip(good, slots, strict=True) if slot is not None]
    reserved = [slot for _, slot in placed]
    seals = [batch.seals[place] for place, _ in placed]
    committed = False
    try:
        if placed:
            store.write(reserved, close_ranks(content, block_bytes, [place for place, _ in placed]))
        with may_store() as allowed:
            if not allowed:
                return None
            blocks.commit(seals, reserved)
            committed = True
            dropped, room = blocks.take_dropped(), blocks.room
    finally:
        if not committed:
            with may_store():
                blocks.abandon(reserved)
    stored = [seal.number for seal in seals]
    good_numbers = {batch.seals[place].number for place in good}
    return ReplicasKept(
        stored=stored,
        refused=sorted(good_numbers.difference(stored)),
        corrupt=[seal.number for seal in batch.seals if seal.number not in good_numbers],
        dropped=dropped,
        room=room,
    )


class _Landing:
    """Memory for one batch at a time."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._memory = memoryview(b"")
        self.content = memoryview(b"")

    def accept(self, batch: Replicas) -> memoryview:
        """Raises `ProtocolError`, before anything is allocated, if the batch breaks the rules."""
        _check(batch, self._block_bytes)
        if batch.body_bytes > len(self._memory):
            self._memory = memoryview(bytearray(batch.body_bytes))
        self.content = self._memory[: batch.body_bytes]
        return self.content


def _check(batch: Replicas, block_bytes: int) -> None:
    count = len(batch.seals)
    if count > batch_limit(block_bytes):
        raise ProtocolError(f"expected at most {batch_limit(block_bytes)} blocks in a batch, found {count}")
    if batch.body_bytes != count * block_bytes:
        raise ProtocolError(f"{count} blocks of {block_bytes} bytes each are not {batch.body_bytes} bytes")
    if len(batch.checksums) != count or not all(0 <= each <= _MAX_CHECKSUM for each in batch.checksums):
        raise ProtocolError(f"expected {count} checksums of 64 bits")
    if len({seal.block for seal in batch.seals}) != count or len({seal.number for seal in batch.seals}) != count:
        raise ProtocolError("a batch names a block or a number twice")
    for block in (*batch.void, *(seal.block for seal in batch.seals)):
        if not 0 < block <= _MAX_BLOCK:
            raise ProtocolError(f"there is no block {block}")
    for seal in batch.seals:
        if not (0 <= seal.parent < seal.number <= _MAX_NUMBER and seal.depth >= 0):
            raise ProtocolError(f"{seal} cannot be")
