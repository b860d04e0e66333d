"""What shows that a block arrived as it was sent. Tokens do not: one wrong number in a cache often changes none."""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from resilientllm_worker.protocol.messages import Seal


def checksums(seals: Sequence[Seal], content: memoryview, block_bytes: int) -> list[int]:
    """XXH3, 64 bits, of each block of ``content``, in the order of ``seals``.

    Block and number are its seed: good content under a wrong label would be as bad as wrong content.
    """
    digest = xxhash.xxh3_64_intdigest
    return [
        digest(content[place * block_bytes : (place + 1) * block_bytes], _seed(seal))
        for place, seal in enumerate(seals)
    ]


def _seed(seal: Seal) -> int:
    return (seal.number << 24 ^ seal.block) & 0xFFFF_FFFF_FFFF_FFFF
