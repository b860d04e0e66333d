"""The former names of `blocks`, for as long as the stage server uses them."""

from __future__ import annotations

from resilientllm_worker.tenancy.home import HomeBlocks as IdentityMap
from resilientllm_worker.tenancy.pool import Pool, PoolBlocks

__all__ = ["BlockMap", "IdentityMap"]


class BlockMap(PoolBlocks):
    """A guest with a pool of its own."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__(Pool(first, count), 0)
        self.serve()
