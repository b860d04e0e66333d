"""The blocks of the stage's own instance: slot equals id, so there is always room and nothing is ever dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from resilientllm_worker.protocol.blocks import pack_blocks, pack_numbers
from resilientllm_worker.protocol.messages import Seal
from resilientllm_worker.tenancy.blocks import NULL_BLOCK
from resilientllm_worker.tenancy.errors import UnmappedBlock


class HomeBlocks:
    """`Blocks` within ``0 .. count - 1``. Content that is not sealed is readable too: only the engine knows of it."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} home blocks: there is at least the null block")
        self._count = count
        self._lock = threading.Lock()
        # All below under `_lock`.
        self._serving = False
        self._seals: dict[int, Seal] = {}
        self._blocks: dict[int, int] = {}
        """By number, of `_seals` and `_reserved`."""
        self._reserved: dict[int, Seal | None] = {}
        """What is on its way there. None: it is void, but someone may still be writing it."""

    def __contains__(self, block: int) -> bool:
        with self._lock:
            return 0 <= block < self._count and block not in self._reserved

    # --- steps -------------------------------------------------------------------------------------------------

    def admit(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Raises `UnmappedBlock` for an id that belongs to the guests' pool, or to nobody, or is being filled."""
        with self._lock:
            for blocks in (read, written):
                for block in blocks:
                    if not 0 <= block < self._count:
                        raise UnmappedBlock(f"block {block} is outside the {self._count} home blocks of this stage")
                    if block in self._reserved:
                        raise UnmappedBlock(f"block {block} is just being filled with a replica")

    def translate(self, blocks: list[int]) -> list[int]:
        """``blocks`` itself, as a new list."""
        return blocks.copy()

    # --- who is served -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        with self._lock:
            self._serving = True
            self._void_reserved()

    def stop_serving(self) -> None:
        with self._lock:
            self._serving = False

    def clear(self) -> None:
        with self._lock:
            self._void_reserved()
            self._seals.clear()
            self._blocks.clear()

    # --- sealed content ----------------------------------------------------------------------------------------

    def seal(self, seals: Sequence[Seal]) -> list[Seal]:
        with self._lock:
            return [seal for seal in seals if self._seal(seal)]

    def overwrite(self, blocks: Iterable[int]) -> list[int]:
        with self._lock:
            return [block for block in blocks if self._void(block)]

    def forget(self, blocks: Iterable[int]) -> list[int]:
        return self.overwrite(blocks)

    def end(self, owners: Iterable[int]) -> None:
        """Nothing: all content has its place here, whatever it is worth."""

    def held(self) -> tuple[bytes, bytes]:
        with self._lock:
            return pack_blocks(self._seals), pack_numbers(seal.number for seal in self._seals.values())

    @property
    def sealed_count(self) -> int:
        with self._lock:
            return len(self._seals)

    def seals(self) -> list[tuple[Seal, int]]:
        with self._lock:
            seals = list(self._seals.values())
        return [(seal, seal.block) for seal in sorted(seals, key=lambda seal: seal.number)]

    # --- keeping replicas --------------------------------------------------------------------------------------

    def place(self, seals: Sequence[Seal]) -> list[int | None]:
        with self._lock:
            here: set[int] = set()
            return [self._place(seal, here) for seal in seals]

    def commit(self, seals: Sequence[Seal], slots: Sequence[int]) -> None:
        with self._lock:
            for seal, slot in zip(seals, slots, strict=True):
                if self._end_reservation(slot, seal) is not None:
                    self._seals[slot] = seal

    def abandon(self, slots: Sequence[int]) -> None:
        with self._lock:
            for slot in slots:
                if (seal := self._end_reservation(slot)) is not None:
                    del self._blocks[seal.number]

    def take_dropped(self) -> list[int]:
        return []

    @property
    def room(self) -> int:
        with self._lock:
            return 0 if self._serving else self._count - 1 - len(self._seals) - len(self._reserved)

    # --- under the lock ----------------------------------------------------------------------------------------

    def _seal(self, seal: Seal) -> bool:
        if not self._could_hold(seal):
            return False
        if (old := self._seals.get(seal.block)) is not None and seal.number <= old.number:
            return False
        self._void(seal.block)
        self._seals[seal.block] = seal
        self._blocks[seal.number] = seal.block
        return True

    def _place(self, seal: Seal, here: set[int]) -> int | None:
        """``here`` are the numbers placed earlier in the same call."""
        if self._serving or not self._could_hold(seal):
            return None
        if seal.parent and seal.parent not in here:
            parent_block = self._blocks.get(seal.parent)
            if parent_block not in self._seals or parent_block == seal.block:
                return None
        self._void(seal.block)
        self._reserved[seal.block] = seal
        self._blocks[seal.number] = seal.block
        here.add(seal.number)
        return seal.block

    def _could_hold(self, seal: Seal) -> bool:
        return (
            NULL_BLOCK < seal.block < self._count
            and seal.block not in self._reserved
            and 0 <= seal.parent < seal.number
            and self._blocks.get(seal.number, seal.block) == seal.block
        )

    def _void(self, block: int) -> bool:
        """Returns whether ``block`` had a seal."""
        if (coming := self._reserved.get(block)) is not None:
            self._reserved[block] = None
            del self._blocks[coming.number]
        if (old := self._seals.pop(block, None)) is None:
            return False
        del self._blocks[old.number]
        return True

    def _void_reserved(self) -> None:
        for block in self._reserved:
            self._void(block)

    def _end_reservation(self, slot: int, seal: Seal | None = None) -> Seal | None:
        reserved = self._reserved.get(slot)
        if slot not in self._reserved or (seal is not None and reserved is not None and reserved != seal):
            raise ValueError(f"slot {slot} was not reserved for {seal or 'a replica'}")
        del self._reserved[slot]
        return reserved
