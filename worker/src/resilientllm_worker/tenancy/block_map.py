"""Which slot of the stage's KV cache holds a tenant's block.

The map is strict. A block that a step reads must be mapped, because an unmapped one would be another tenant's memory or
garbage, and no output token would betray it. A block that a step is about to write gets a slot on first use, and keeps
it when the engine uses its id again: the engine's own limit bounds how many ids it has.
"""

from __future__ import annotations

from collections.abc import Iterable

from resilientllm_worker.tenancy.errors import PoolFull, UnmappedBlock

NULL_BLOCK = 0
"""vLLM's padding, the same for all tenants."""


class BlockMap:
    """The blocks of a guest, in the slots ``first .. first + count - 1``."""

    def __init__(self, first: int, count: int) -> None:
        if first <= NULL_BLOCK or count < 0:
            raise ValueError(f"slots {first} to {first + count - 1}: slot 0 is the null block, count is at least 0")
        self._slots: dict[int, int] = {NULL_BLOCK: NULL_BLOCK}
        self._free = list(range(first + count - 1, first - 1, -1))
        self._count = count

    def __contains__(self, block: int) -> bool:
        return block in self._slots

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def admit(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Gives slots to the blocks that a step writes, after seeing that it reads only blocks that have content.

        One step may read what it writes: a request hits the prefix that another one computes in the same batch. So
        all of a step's blocks belong in one call.

        Raises:
            UnmappedBlock: a block of ``read`` is neither mapped nor in ``written``.
            PoolFull: more slots are needed than are free. In both cases the map is unchanged.
        """
        slots = self._slots
        fresh = {block: None for block in written if block not in slots}
        if missing := [block for block in read if block not in slots and block not in fresh]:
            raise UnmappedBlock(f"blocks {missing[:8]} are to be read, but were never written here for this engine")
        if len(fresh) > len(self._free):
            raise PoolFull(f"{len(fresh)} more blocks do not fit: {len(self._free)} of {self._count} slots are free")
        for block in fresh:
            slots[block] = self._free.pop()

    def translate(self, blocks: list[int]) -> list[int]:
        """The slots of ``blocks``, as a new list. Raises `UnmappedBlock`."""
        slots = self._slots
        try:
            return [slots[block] for block in blocks]
        except KeyError as error:
            raise UnmappedBlock(f"block {error} has no slot here for this engine") from None


class IdentityMap:
    """The blocks of the stage's own instance: slot equals id, within ``0 .. count - 1``."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"{count} home blocks: there is at least the null block")
        self._count = count

    def __contains__(self, block: int) -> bool:
        return 0 <= block < self._count

    def admit(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Raises `UnmappedBlock` for an id that belongs to the guests' pool, or to nobody."""
        for blocks in (read, written):
            for block in blocks:
                if not 0 <= block < self._count:
                    raise UnmappedBlock(f"block {block} is outside the {self._count} home blocks of this stage")

    def translate(self, blocks: list[int]) -> list[int]:
        """``blocks`` itself, as a new list."""
        return blocks.copy()
