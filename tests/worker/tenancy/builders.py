"""Steps, seals and tenants of which a test states only what it is about."""

from __future__ import annotations

from typing import Any

import msgspec
from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import CachedRequests, NewRequest, Seal, Stamp, Step
from resilientllm_worker.tenancy.blocks import Blocks
from resilientllm_worker.tenancy.pool import Pool, PoolBlocks

STAMP = Stamp(1, 1)
BLOCK_SIZE = 16
EMPTY = Step(STAMP, 1, [], CachedRequests([], [], [], [], []), [], [], [], [], [], None)


def a_step(**changes: Any) -> Step:
    return msgspec.structs.replace(EMPTY, **changes)


def new(request: str, *groups: list[int], computed: int = 0) -> NewRequest:
    return NewRequest(request, [1, 2, 3], None, b"", groups, computed)


def running(**blocks: list[int] | None) -> CachedRequests:
    """Cached requests by name, with the blocks that each gets in this step."""
    count = len(blocks)
    groups: list[tuple[list[int], ...] | None] = [None if ids is None else (ids,) for ids in blocks.values()]
    return CachedRequests(list(blocks), [[1]] * count, groups, [5] * count, [1] * count)


def a_seal(number: int, block: int, parent: int = 0, depth: int = 0, owner: int = 1) -> Seal:
    return Seal(number, block, parent, depth, owner, b"")


def a_chain(blocks: range, number: int = 1, owner: int = 1) -> list[Seal]:
    """One context in ``blocks``, with numbers from ``number`` upward."""
    return [
        a_seal(number + depth, block, number + depth - 1 if depth else 0, depth, owner)
        for depth, block in enumerate(blocks)
    ]


def a_guest(first: int, count: int) -> PoolBlocks:
    blocks = Pool(first, count).tenant(1)
    blocks.serve()
    return blocks


def keep(blocks: Blocks, seals: list[Seal]) -> list[int]:
    """Stores replicas as far as they are not refused. Returns the numbers of those that are stored."""
    placed = [(seal, slot) for seal, slot in zip(seals, blocks.place(seals), strict=True) if slot is not None]
    blocks.commit([seal for seal, _ in placed], [slot for _, slot in placed])
    return [seal.number for seal, _ in placed]


def held_by(blocks: Blocks) -> dict[int, int]:
    """Numbers by block, as it is told to others."""
    packed_blocks, packed_numbers = blocks.held()
    return dict(zip(unpack_blocks(packed_blocks).tolist(), unpack_numbers(packed_numbers).tolist(), strict=True))
