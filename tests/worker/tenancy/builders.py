"""Steps of which a test states only what it is about."""

from __future__ import annotations

from typing import Any

import msgspec
from resilientllm_worker.protocol.messages import CachedRequests, NewRequest, Stamp, Step

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
    groups = [None if ids is None else (ids,) for ids in blocks.values()]
    return CachedRequests(list(blocks), [[1]] * count, groups, [5] * count, [1] * count)
