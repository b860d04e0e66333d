"""One tenant's sealed content, linked from child to parent, and what of it is to be given up first.

A block is of use only with all blocks before it in its context. So content goes leaf by leaf, never a parent before its
children; plain order of age would lose the heads of chains, and with them everything behind.

When a parent's content is void, because it was overwritten, all that is behind it is *broken*. It is kept, since it
costs nothing until room is needed, and may be of use again: vLLM hits a block by its hash, behind any block of the same
content, and goes on from there. But it is first in line.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from resilientllm_worker.protocol.messages import Seal

_STALE_LEAVES = 64
"""So many outdated entries are always allowed, however few the links."""


class Worth(IntEnum):
    BROKEN = 0
    """Something before it in its context is missing."""
    ENDED = 1
    """Its owner has ended; another request may hit it."""
    LIVING = 2


class Rank(NamedTuple):
    """The lowest goes first. Comparable between tenants of one pool."""

    worth: Worth
    closeness: int
    """Of living owners' content, minus the depth; the deepest saves least. Otherwise 0."""
    stored: int


@dataclass(slots=True, eq=False)
class Link:
    """Sealed content in a slot, or a slot that is reserved for it."""

    seal: Seal
    slot: int
    stored: int = 0
    """When the content came, as a count that rises from 1; 0 while the slot is reserved."""
    whole: bool = False
    """It is here, and so is everything before it in its context."""


class Chains:
    """Links by number. A reserved one protects its parent, but is itself neither held nor given up."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._children: dict[int, set[int]] = {}
        """By number, which itself may be missing."""
        self._owned: dict[int, set[int]] = {}
        """Numbers by owner; none is empty."""
        self._ended: set[int] = set()
        """Among the owners of `_owned`."""
        self._leaves: list[tuple[Rank, int]] = []
        """A heap. An entry counts if its number is still a leaf of that rank; every leaf has such an entry."""

    def get(self, number: int) -> Link | None:
        return self._links.get(number)

    def held(self) -> Iterator[Link]:
        return (link for link in self._links.values() if link.stored)

    def reserve(self, link: Link) -> None:
        """Raises `ValueError` if its number is here already, or not above its parent's, as in a circle."""
        seal = link.seal
        if seal.number in self._links or not 0 <= seal.parent < seal.number:
            raise ValueError(f"seal {seal.number} behind {seal.parent}: it is here already, or comes before its parent")
        self._links[seal.number] = link
        self._owned.setdefault(seal.owner, set()).add(seal.number)
        if seal.parent:
            self._children.setdefault(seal.parent, set()).add(seal.number)

    def store(self, link: Link, now: int) -> None:
        """The content of a reserved link has come. ``now`` is higher than ever before."""
        link.stored = now
        link.whole = self._is_whole(link.seal)
        self._offer(link)
        self._retrace(link.seal.number)

    def remove(self, link: Link) -> None:
        seal = link.seal
        del self._links[seal.number]
        _discard(self._owned, seal.owner, seal.number)
        if seal.owner not in self._owned:
            self._ended.discard(seal.owner)
        if seal.parent:
            _discard(self._children, seal.parent, seal.number)
            if (parent := self._links.get(seal.parent)) is not None:
                self._offer(parent)
        self._retrace(seal.number)

    def end(self, owners: Iterable[int]) -> None:
        for owner in owners:
            if owner in self._owned and owner not in self._ended:
                self._ended.add(owner)
                for number in self._owned[owner]:
                    self._offer(self._links[number])

    def first_to_go(self) -> tuple[Rank, Link] | None:
        """The leaf that is worth least; None if nothing is held, or all of it is protected."""
        while self._leaves:
            rank, number = self._leaves[0]
            link = self._links.get(number)
            if link is not None and number not in self._children and rank == self._rank(link):
                return rank, link
            heapq.heappop(self._leaves)
        return None

    def _rank(self, link: Link) -> Rank:
        if not link.whole:
            return Rank(Worth.BROKEN, 0, link.stored)
        if link.seal.owner in self._ended:
            return Rank(Worth.ENDED, 0, link.stored)
        return Rank(Worth.LIVING, -link.seal.depth, link.stored)

    def _offer(self, link: Link) -> None:
        """After any change of a link's rank, or of its having children."""
        if not link.stored or link.seal.number in self._children:
            return
        heapq.heappush(self._leaves, (self._rank(link), link.seal.number))
        if len(self._leaves) > 2 * len(self._links) + _STALE_LEAVES:
            self._leaves = [
                (self._rank(leaf), number)
                for number, leaf in self._links.items()
                if leaf.stored and number not in self._children
            ]
            heapq.heapify(self._leaves)

    def _is_whole(self, seal: Seal) -> bool:
        if not seal.parent:
            return True
        parent = self._links.get(seal.parent)
        return parent is not None and parent.whole

    def _retrace(self, number: int) -> None:
        """``number`` came or went: so did the chains of all that is behind it."""
        pending = [*self._children.get(number, ())]
        while pending:
            link = self._links[pending.pop()]
            whole = self._is_whole(link.seal)
            if link.stored and whole != link.whole:
                link.whole = whole
                self._offer(link)
                pending.extend(self._children.get(link.seal.number, ()))


def _discard(sets: dict[int, set[int]], key: int, member: int) -> None:
    sets[key].discard(member)
    if not sets[key]:
        del sets[key]
