"""Where the content of blocks is read from and written to, as the rest of this package sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class BlockStore(Protocol):
    """A stage's KV cache; `seams.kv_blocks.KVBlocks` is one. Any number of threads may use it."""

    @property
    def block_bytes(self) -> int:
        """Of one block."""

    @property
    def layout(self) -> str:
        """Equal where the bytes of one store mean the same in the other."""

    def read(self, slots: Sequence[int], into: memoryview) -> None:
        """Copies the blocks in ``slots``, in this order, into ``len(slots) * block_bytes`` bytes."""

    def write(self, slots: Sequence[int], data: memoryview) -> None:
        """The inverse of `read`."""


def close_ranks(content: memoryview, block_bytes: int, places: Sequence[int]) -> memoryview:
    """Moves the blocks at ``places``, which rise, to the front of ``content``; returns them."""
    for target, place in enumerate(places):
        if target != place:
            content[target * block_bytes : (target + 1) * block_bytes] = content[
                place * block_bytes : (place + 1) * block_bytes
            ]
    return content[: len(places) * block_bytes]
