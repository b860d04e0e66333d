"""How tensors are cut for the wire. Both ends cut alike, so what a frame is need not be said in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from resilientllm_worker.protocol.messages import TensorHeader

RUN_BYTES = 16 << 20
"""The largest run. Each end holds one in memory where a tensor's own cannot be sent from, or received into."""
_OFFSET_BITS = 40


class Run(NamedTuple):
    """A contiguous part of a tensor's memory."""

    tensor: int
    """The place of the tensor in the list."""
    offset: int
    nbytes: int


def runs(tensors: Sequence[TensorHeader]) -> Iterator[Run]:
    """All memory of ``tensors``, in order."""
    for place, tensor in enumerate(tensors):
        for offset in range(0, tensor.nbytes, RUN_BYTES):
            yield Run(place, offset, min(RUN_BYTES, tensor.nbytes - offset))


def checksum(run: Run, content: memoryview) -> int:
    """XXH3, 64 bits, seeded with the place of the run: good content in the wrong place would be as bad as wrong one."""
    return xxhash.xxh3_64_intdigest(content, run.tensor << _OFFSET_BITS ^ run.offset)
