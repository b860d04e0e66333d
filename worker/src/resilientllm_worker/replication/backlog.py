"""Which sealed blocks the keeper has, and which it is to get next. Plain data; `sender` holds the lock.

    PENDING ──take──► READING ──confirm──► SENT ──answer──► STORED
       ▲                                     │                 │ dropped
       ├────────── corrupt, or lost ─────────┤                 ▼
       └──────────── once a second ──────────┴─refused─► LEFT_OUT

From anywhere a block that is about to be written goes to VOID, and what it held is told to the keeper as void.

Whatever takes time for each block of a cache goes in slices, between which the lock is free: a step must not wait.
"""

from __future__ import annotations

import enum
import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from resilientllm_worker.protocol.messages import ReplicasKept, Seal
from resilientllm_worker.transport.errors import ProtocolError

RETRY_SECONDS: Final = 1.0
"""Between two offers of what the keeper had left out."""
_SLICE: Final = 512

_Item = TypeVar("_Item")


class Standing(enum.Enum):
    """Of one sealed block."""

    PENDING = enum.auto()
    READING = enum.auto()
    """Its content is being copied out of the cache."""
    SENT = enum.auto()
    """And not answered."""
    STORED = enum.auto()
    LEFT_OUT = enum.auto()
    """The keeper had no room for it, or gave it up since; or there is no keeper."""
    VOID = enum.auto()
    """Not sealed any more; nothing refers to it but who was just about to do something with it."""


@dataclass(slots=True, eq=False)
class SealedBlock:
    seal: Seal
    slot: int
    standing: Standing


@dataclass
class Tally:
    """Counts of a `ReplicationReport`, over all keepers."""

    sent_blocks: int = 0
    sent_bytes: int = 0
    cancelled_blocks: int = 0
    refused_blocks: int = 0
    corrupt_blocks: int = 0


class Backlog:
    """The sealed blocks of one tenant, as one keeper is to have them. ``now`` is in seconds, of any steady clock."""

    def __init__(
        self, sealed: Sequence[tuple[Seal, int]], ended: Collection[int], tally: Tally, has_keeper: bool, now: float
    ) -> None:
        """``ended`` are owners known to have ended. What is there goes to the keeper after the first `settle` only."""
        self._tally = tally
        self._first = Standing.PENDING if has_keeper else Standing.LEFT_OUT
        self._blocks = {seal.block: SealedBlock(seal, slot, self._first) for seal, slot in sealed}
        self._numbers = {block.seal.number: block for block in self._blocks.values()}
        self._owners = Counter(block.seal.owner for block in self._blocks.values())
        """How many blocks each has here."""
        self._ended = {owner for owner in ended if owner in self._owners}
        self._counts = Counter({self._first: len(self._blocks)})
        self._lagging = dict.fromkeys(self._numbers, now) if has_keeper else {}
        """Number → since when; in this order too, so the first has waited longest."""
        self._left_out: dict[int, SealedBlock] = {} if has_keeper else dict(self._numbers)
        self._of_living: list[int] = []
        self._of_ended: list[int] = []
        """Heaps of the numbers of what is pending, and of some that is not any more or is of the other heap."""
        self._reading: list[SealedBlock] = []
        self._sent: deque[list[SealedBlock]] = deque()
        """Batches without an answer, in order."""
        self._void: set[int] = set()
        self._untold: set[int] = set()
        """Owners whose end the keeper does not know."""
        self._room = 0
        self._pending_since = now
        self._retried = now

    # --- figures -----------------------------------------------------------------------------------------------

    @property
    def stored(self) -> int:
        return self._counts[Standing.STORED]

    @property
    def pending(self) -> int:
        return self._counts[Standing.PENDING]

    @property
    def lag(self) -> int:
        """Blocks to be sent, or sent and not answered."""
        return len(self._lagging)

    @property
    def batches_sent(self) -> int:
        """Without an answer yet."""
        return len(self._sent)

    @property
    def pending_since(self) -> float:
        """When the batch that is next began to fill."""
        return self._pending_since

    @property
    def ended(self) -> Collection[int]:
        return self._ended

    def lag_seconds(self, now: float) -> float:
        return now - next(iter(self._lagging.values()), now)

    # --- what the tenant does ----------------------------------------------------------------------------------

    def offer(self, sealed: Iterable[tuple[Seal, int]], ended: Iterable[int], now: float) -> None:
        """Takes up newly sealed blocks, and after them the end of owners."""
        for seal, slot in sealed:
            if seal.number in self._numbers:
                continue
            self.cancel([seal.block])  # of no effect, unless a block was sealed twice without being written
            block = SealedBlock(seal, slot, Standing.VOID)
            self._blocks[seal.block] = self._numbers[seal.number] = block
            self._owners[seal.owner] += 1
            self._move(block, self._first, now)
        for owner in ended:
            if owner in self._owners:
                self._ended.add(owner)
                self._untold.add(owner)

    def cancel(self, blocks: Iterable[int]) -> bool:
        """These are about to be written. Returns whether there is something to tell the keeper where nothing was."""
        had_void = bool(self._void)
        for number in blocks:
            block = self._blocks.pop(number, None)
            if block is None:
                continue
            if block.standing in (Standing.SENT, Standing.STORED):
                self._void.add(number)
            elif block.standing in (Standing.PENDING, Standing.READING):
                self._tally.cancelled_blocks += 1
            self._move(block, Standing.VOID, 0.0)
            del self._numbers[block.seal.number]
            owner = block.seal.owner
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]
                self._ended.discard(owner)
                self._untold.discard(owner)
        return bool(self._void) and not had_void

    # --- what the sender does ----------------------------------------------------------------------------------

    def settle(self, held: Mapping[int, int], now: float) -> Iterator[None]:
        """Begins with a keeper that holds ``held``, block → number. Yields wherever the lock may be let go.

        Nothing may be taken before it is through; offers and cancels may come at any time.
        """
        self._of_living, self._of_ended = [], []
        self._void.clear()
        self._untold = set(self._ended)
        self._room = 0
        for some in _slices(list(self._blocks.values())):
            for block in some:
                if block.standing is not Standing.VOID:
                    is_held = held.get(block.seal.block) == block.seal.number
                    self._move(block, Standing.STORED if is_held else Standing.PENDING, now)
            yield
        for blocks in _slices(list(held)):
            for number in blocks:
                block_here = self._blocks.get(number)
                if block_here is None or block_here.seal.number != held[number]:
                    self._void.add(number)
            yield

    def take(self, limit: int, now: float) -> list[SealedBlock]:
        """The next batch to read, ancestors first: of living owners before those of ended ones, else by number."""
        batch: list[SealedBlock] = []
        while len(batch) < limit and (block := self._next()) is not None:
            # A request that goes on may have hit blocks that one filled which has ended.
            line = [block]
            while (parent := self._numbers.get(line[-1].seal.parent)) and parent.standing is Standing.PENDING:
                if parent.seal.number >= line[-1].seal.number:
                    break  # no engine says so, and it would be an endless line
                line.append(parent)
            line.reverse()
            for each in line[: limit - len(batch)]:
                self._move(each, Standing.READING, now)
                batch.append(each)
            if block.standing is Standing.PENDING:
                self._push(block)
        self._reading = batch
        self._pending_since = now
        return batch

    def confirm(self, batch: Sequence[SealedBlock]) -> tuple[list[int], list[int], list[int]]:
        """``batch`` was read. Which of it, by place, was not cancelled meanwhile and is now sent; void; ended."""
        good = [place for place, block in enumerate(batch) if block.standing is Standing.READING]
        void, ended = sorted(self._void), sorted(self._untold)
        self._void, self._untold, self._reading = set(), set(), []
        if good or void or ended:
            for place in good:
                self._move(batch[place], Standing.SENT, 0.0)
            self._sent.append([batch[place] for place in good])
        return good, void, ended

    def answer(self, kept: ReplicasKept, now: float) -> None:
        """What became of the oldest batch without an answer. Raises `ProtocolError` if there is none."""
        if not self._sent:
            raise ProtocolError("the keeper answered a batch that was not sent")
        stored, corrupt = set(kept.stored), set(kept.corrupt)
        for block in self._sent.popleft():
            if block.standing is not Standing.SENT:
                continue
            if block.seal.number in stored:
                self._move(block, Standing.STORED, now)
            elif block.seal.number in corrupt:
                self._move(block, Standing.PENDING, now)
            else:
                self._move(block, Standing.LEFT_OUT, now)
        for number in kept.dropped:
            dropped = self._numbers.get(number)
            if dropped is not None and dropped.standing is Standing.STORED:
                self._move(dropped, Standing.LEFT_OUT, now)
        self._tally.corrupt_blocks += len(kept.corrupt)
        self._tally.refused_blocks += len(kept.refused) + len(kept.dropped)
        self._room = kept.room

    def lose(self, now: float) -> None:
        """The connection broke: what was not answered is to be sent again, unless the next `settle` finds it there."""
        for batch in (self._reading, *self._sent):
            for block in batch:
                if block.standing in (Standing.READING, Standing.SENT):
                    self._move(block, Standing.PENDING, now)
        self._reading = []
        self._sent.clear()

    # --- offering again ----------------------------------------------------------------------------------------

    def retry_seconds(self, now: float) -> float | None:
        """How long until what was left out should be offered again; None if there is nothing, or no room for it."""
        if not self._left_out or not self._free:
            return None
        return max(0.0, self._retried + RETRY_SECONDS - now)

    def left_out(self) -> list[SealedBlock]:
        """A copy, for `worth_retrying`."""
        return list(self._left_out.values())

    def worth_retrying(self, left_out: list[SealedBlock]) -> list[SealedBlock]:
        """As many as there is room for, in the order of `take`. Takes time, changes nothing, needs no lock.

        Whose parent the keeper neither has nor is to get, it could not use.
        """
        useful: dict[int, SealedBlock] = {}
        for block in sorted(left_out, key=lambda block: block.seal.number):
            parent = self._numbers.get(block.seal.parent)
            if (
                not block.seal.parent
                or block.seal.parent in useful
                or (parent is not None and parent.standing is not Standing.LEFT_OUT)
            ):
                useful[block.seal.number] = block
        return heapq.nsmallest(
            self._free, useful.values(), key=lambda block: (block.seal.owner in self._ended, block.seal.number)
        )

    def retry(self, blocks: Iterable[SealedBlock], now: float) -> None:
        self._retried = now
        for block in blocks:
            if block.standing is Standing.LEFT_OUT:
                self._move(block, Standing.PENDING, now)

    @property
    def _free(self) -> int:
        """What is void but untold is room as well, as soon as it is told."""
        return self._room + len(self._void)

    # --- bookkeeping -------------------------------------------------------------------------------------------

    def _move(self, block: SealedBlock, to: Standing, now: float) -> None:
        number = block.seal.number
        if block.standing is Standing.LEFT_OUT:
            self._left_out.pop(number, None)
        self._counts[block.standing] -= 1
        self._counts[to] += 1
        block.standing = to
        match to:
            case Standing.PENDING:
                self._lagging.setdefault(number, now)
                if self.pending == 1:
                    self._pending_since = now
                self._push(block)
            case Standing.STORED | Standing.VOID:
                self._lagging.pop(number, None)
            case Standing.LEFT_OUT:
                self._lagging.pop(number, None)
                self._left_out[number] = block

    def _push(self, block: SealedBlock) -> None:
        heapq.heappush(self._of_ended if block.seal.owner in self._ended else self._of_living, block.seal.number)

    def _next(self) -> SealedBlock | None:
        for heap, is_of_living in ((self._of_living, True), (self._of_ended, False)):
            while heap:
                block = self._numbers.get(heapq.heappop(heap))
                if block is None or block.standing is not Standing.PENDING:
                    continue
                if is_of_living and block.seal.owner in self._ended:
                    self._push(block)
                    continue
                return block
        return None


def _slices(items: list[_Item]) -> Iterator[list[_Item]]:
    for start in range(0, len(items), _SLICE):
        yield items[start : start + _SLICE]
