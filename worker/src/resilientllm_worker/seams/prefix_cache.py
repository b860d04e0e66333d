"""Seam: vLLM's prefix cache. Which KV blocks have content on every stage, and which only seem to.

vLLM hashes a block when it schedules the tokens that fill it, and trusts the hash from then on. With stages that can
be replaced that is not enough: a block counts only if every stage of the present pipeline has computed or received
its content. Such a block is *sealed*, under a number that stands for this content of this block.

Relies on vllm/v1/core/block_pool.py: ``get_new_blocks`` is the only way by which a block is handed out to be written,
``get_cached_block`` the only one by which a hash is looked up, and both are called on the instance; and on
``req_to_blocks`` of the one manager of a full-attention model (vllm/v1/core/single_type_kv_cache_manager.py).
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from resilientllm_worker.protocol.messages import Seal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request


@dataclass
class _Owner:
    """How far a request's blocks are sealed."""

    number: int
    preemptions: int
    sealed: int = 0
    """Its first so many blocks are."""


class PrefixCache:
    """Thin over one engine's block pool. For vLLM's engine thread only."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self.pool = pool = manager.block_pool
        managers = manager.coordinator.single_type_managers
        self.block_tokens = int(managers[0].block_size)
        self.obstacle = ""
        """Why blocks of this engine cannot be sealed; empty if they can."""
        if not manager.enable_caching:
            self.obstacle = (
                "prefix caching is off, by --no-enable-prefix-caching or because vLLM has none for this model here"
            )
        elif len(managers) != 1:
            self.obstacle = (
                f"the model has {len(managers)} KV cache groups: only models with one are replicated yet; "
                "--disable-hybrid-kv-cache-manager makes it one, which takes more memory"
            )
        self._tables: dict[str, list[KVCacheBlock]] = managers[0].req_to_blocks
        self._numbers = array("q", bytes(8 * pool.num_gpu_blocks))
        self._doubtful = bytearray(pool.num_gpu_blocks)
        """Blocks whose hash is not to be trusted: some stage lacks their content."""
        self._doubts = False
        self._last = 0
        self._open: dict[str, tuple[int, int]] = {}
        """Requests with a seal on their open block: its place in their table, and which it is."""
        self._owners: dict[str, _Owner] = {}
        self._owners_seen = 0
        self._stock_new = pool.get_new_blocks
        self._stock_cached = pool.get_cached_block
        pool.get_new_blocks = self._get_new_blocks
        pool.get_cached_block = self._get_cached_block

    # --- in place of the pool's own ------------------------------------------------------------------------------

    def _get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = self._stock_new(num_blocks)
        numbers, doubtful = self._numbers, self._doubtful
        for block in blocks:
            numbers[block.block_id] = doubtful[block.block_id] = 0
        return blocks

    def _get_cached_block(self, block_hash: Any, kv_cache_group_ids: list[int]) -> list[KVCacheBlock] | None:
        while (found := self._stock_cached(block_hash, kv_cache_group_ids)) is not None and self._doubts:
            doubtful = [block for block in found if self._doubtful[block.block_id]]
            if not doubtful:
                break
            # Another block may have the same hash and be good.
            self.pool.evict_blocks({block.block_id for block in doubtful})
        return found

    # --- sealing -------------------------------------------------------------------------------------------------

    def seal(self, processed: Iterable[tuple[Request, int]]) -> list[Seal]:
        """New seals. ``processed``: requests of a step whose results are here, and how many of their tokens have KV.

        All stages run steps in order, so by then every block below that mark has been computed everywhere, those that
        the request found in the cache included.
        """
        if self.obstacle:
            return []
        fresh: list[Seal] = []
        numbers, block_tokens = self._numbers, self.block_tokens
        for request, tokens in processed:
            owner = self._owner(request)
            full = tokens // block_tokens
            if full <= owner.sealed:
                continue
            table = self._tables[request.request_id]
            for depth in range(owner.sealed, full):
                block = table[depth]
                if numbers[block.block_id] or block.block_hash is None:
                    continue
                fresh.append(self._seal(table, depth, owner))
            owner.sealed = full
        return fresh

    def seal_all(self, requests: Iterable[Request]) -> list[Seal]:
        """New seals of all that these requests have computed, open blocks included; none of them is in a step.

        The seal of an open block holds until `go_on`.
        """
        if self.obstacle:
            return []
        fresh: list[Seal] = []
        for request in requests:
            owner, table = self._owner(request), self._tables[request.request_id]
            full, begun = divmod(request.num_computed_tokens, self.block_tokens)
            fresh += [
                self._seal(table, depth, owner)
                for depth in range(owner.sealed, full + bool(begun))
                if not (table[depth].is_null or self._numbers[table[depth].block_id])
            ]
            if begun:
                self._open[request.request_id] = (full, table[full].block_id)
        return fresh

    def go_on(self, requests: Collection[str]) -> None:
        """These are in the step that is next, which writes their open blocks."""
        for request in self._open.keys() & requests:
            depth, block = self._open.pop(request)
            if any(found.block_id == block for found in self._tables[request][depth : depth + 1]):
                self._numbers[block] = 0  # else it was preempted meanwhile, and has other blocks

    def has_all(self, request: Request) -> bool:
        """Whether every stage has all that this request has computed, and still reads."""
        if self.obstacle:
            return False
        count = -(-request.num_computed_tokens // self.block_tokens)
        table = self._tables[request.request_id][:count]
        # The last ones are missing first.
        return all(block.is_null or self._numbers[block.block_id] for block in reversed(table))

    def _owner(self, request: Request) -> _Owner:
        owner = self._owners.get(request.request_id)
        if owner is None:
            self._owners_seen += 1
            owner = self._owners[request.request_id] = _Owner(self._owners_seen, request.num_preemptions)
        elif owner.preemptions != request.num_preemptions:
            owner.preemptions, owner.sealed = request.num_preemptions, 0  # it has other blocks now
        return owner

    def _seal(self, table: Sequence[KVCacheBlock], depth: int, owner: _Owner) -> Seal:
        block, numbers = table[depth], self._numbers
        self._last += 1
        numbers[block.block_id] = self._last
        parent = numbers[table[depth - 1].block_id] if depth else 0
        return Seal(self._last, block.block_id, parent, depth, owner.number, block.block_hash or b"")

    def valid(self, seals: Iterable[Seal]) -> list[Seal]:
        """Those whose blocks were not handed out again since."""
        return [seal for seal in seals if self._numbers[seal.block] == seal.number]

    def end(self, requests: Collection[str]) -> list[int]:
        """Owners that these requests were; they are gone."""
        for request in self._open.keys() & requests:
            del self._open[request]
        return [self._owners.pop(request).number for request in requests if request in self._owners]

    # --- another pipeline ----------------------------------------------------------------------------------------

    def unseal(self, seals: Iterable[Seal]) -> None:
        """Nobody was told of these."""
        for seal in self.valid(seals):
            self._numbers[seal.block] = 0
            self._doubtful[seal.block] = 1
            self._doubts = True

    def keep(self, held: Sequence[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> list[NDArray[np.int32]]:
        """From now on only sealed blocks that all of ``held`` have (blocks, and numbers of their seals) count.

        Requests that go on with their blocks must have only such (`has_all`). Returns for each of ``held`` the blocks
        that it may forget.

        Raises:
            ValueError: a block that does not exist.
        """
        numbers = np.frombuffer(self._numbers, dtype=np.int64)
        kept = numbers > 0
        for blocks, seals in held:
            if len(blocks) != len(seals) or (len(blocks) and not 0 <= blocks.min() <= blocks.max() < len(numbers)):
                raise ValueError(f"{len(blocks)} blocks with {len(seals)} numbers, of a cache of {len(numbers)} blocks")
            theirs = np.zeros_like(numbers)
            theirs[blocks] = seals
            kept &= theirs == numbers
        numbers[~kept] = 0
        doubtful = np.frombuffer(self._doubtful, dtype=np.uint8)
        doubtful[:] = ~kept
        self._doubts = True
        return [blocks[~kept[blocks]] for blocks, _ in held]

    def forget_all(self) -> None:
        """The prefix cache was emptied."""
        np.frombuffer(self._numbers, dtype=np.int64)[:] = 0

    def spare(self, count: int) -> list[KVCacheBlock]:
        """Up to ``count`` free blocks without sealed content, those first that vLLM would hand out next."""
        numbers = self._numbers
        free = self.pool.free_block_queue.get_all_free_blocks()
        return [block for block in free if not numbers[block.block_id]][:count]
