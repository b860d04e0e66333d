"""What shows that a block arrived as it was sent. Tokens do not: one wrong number in a cache often changes none."""

from __future__ import annotations

import xxhash


def checksums(content: memoryview, block_bytes: int) -> list[int]:
    """XXH3, 64 bits, of each block in ``content``, which is a whole number of blocks."""
    digest = xxhash.xxh3_64_intdigest
    return [digest(content[start : start + block_bytes]) for start in range(0, len(content), block_bytes)]
