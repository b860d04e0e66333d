"""The slots for other instances' blocks: replicas that are kept for them, and the blocks of the one served as a guest.

Replicas become the guest's blocks where they lie, so a take-over copies nothing. There is one slot for each block of an
instance. When no slot is free, replicas are given up in the order of `chains`, those of all instances alike; a guest's
blocks never are. Serving always beats replicating: a guest's write takes whatever slot it needs, a replica only that of
something worth less.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resilientllm_worker.protocol.blocks import pack_blocks, pack_numbers
from resilientllm_worker.protocol.messages import Seal
from resilientllm_worker.tenancy.blocks import NULL_BLOCK
from resilientllm_worker.tenancy.chains import Chains, Link, Worth
from resilientllm_worker.tenancy.errors import NotServed, PoolFull, SlotsBusy, UnmappedBlock


@dataclass(frozen=True)
class PoolUse:
    """What the pool's slots are used for; each is counted once."""

    free: int
    replicas: int
    """Sealed blocks of instances that are not served here."""
    arriving: int
    """Reserved for replicas that are being written."""
    guest: int
    """Blocks of the instance that is served as a guest."""


class Pool:
    """The slots ``first .. first + count - 1``."""

    def __init__(self, first: int, count: int) -> None:
        if first <= NULL_BLOCK or count < 0:
            raise ValueError(f"slots {first} to {first + count - 1}: slot 0 is the null block, count is at least 0")
        self._capacity = count
        self._lock = threading.Lock()
        """Of the pool and all its tenants. All below is under it."""
        self._free = list(range(first + count - 1, first - 1, -1))
        self._tenants: dict[int, PoolBlocks] = {}
        self._serving: PoolBlocks | None = None
        self._guest_waits = False
        """A step needs slots that are reserved, so no more are."""
        self._stored = 0

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def serving(self) -> int | None:
        """The instance that is served as a guest."""
        with self._lock:
            return None if self._serving is None else self._serving.instance

    @property
    def use(self) -> PoolUse:
        with self._lock:
            guest = 0 if self._serving is None else self._serving._mapped
            mapped = sum(tenant._mapped for tenant in self._tenants.values())
            return PoolUse(len(self._free), mapped - guest, self._reserved(), guest)

    def tenant(self, instance: int) -> PoolBlocks:
        with self._lock:
            if instance not in self._tenants:
                self._tenants[instance] = PoolBlocks(self, instance)
            return self._tenants[instance]

    # --- for tenants, under the lock -----------------------------------------------------------------------------

    def _now(self) -> int:
        self._stored += 1
        return self._stored

    def _reserved(self) -> int:
        """Slots that someone may be writing."""
        return sum(len(tenant._reserved) for tenant in self._tenants.values())

    def _slot_for_replica(self, depth: int) -> int | None:
        if not self._free and not self._drop_one(deeper_than=depth):
            return None
        return self._free.pop()

    def _slot_for_guest(self) -> int:
        if not self._free and not self._drop_one():
            # What is left is protected by replicas that are on their way. Those are worth less than a step.
            for tenant in self._tenants.values():
                tenant._give_up_reserved()
            self._drop_one()
        return self._free.pop()

    def _drop_one(self, deeper_than: int | None = None) -> bool:
        """Frees the slot of the replica that is worth least, of living owners only if it lies ``deeper_than``."""
        leaves = [
            (*leaf, tenant)
            for tenant in self._tenants.values()
            if tenant is not self._serving and (leaf := tenant._chains.first_to_go()) is not None
        ]
        if not leaves:
            return False
        rank, link, tenant = min(leaves, key=lambda leaf: leaf[0])
        if deeper_than is not None and rank.worth is Worth.LIVING and link.seal.depth <= deeper_than:
            return False
        tenant._drop(link)
        return True


class PoolBlocks:
    """`Blocks` of one other instance, made by `Pool.tenant`. While it is not served, it has sealed blocks only.

    Unlike at home, a slot that is reserved for a replica is one less for the guest, for as long as that is written.
    """

    def __init__(self, pool: Pool, instance: int) -> None:
        self.instance = instance
        self._pool = pool
        self._lock = pool._lock
        # All below under `_lock`.
        self._slots: dict[int, int] = {NULL_BLOCK: NULL_BLOCK}
        """Of the blocks that can be read."""
        self._unsealed: set[int] = set()
        """Among these, without the null block."""
        self._sealed: dict[int, Link] = {}
        """The others."""
        self._chains = Chains()
        """Of the links in `_sealed` and `_coming`."""
        self._coming: dict[int, Link] = {}
        """By block: replicas that are on their way, and still wanted."""
        self._reserved: dict[int, Link | None] = {}
        """By slot: what is on its way there. A link that is not in `_coming` was given up; None: it is void."""
        self._dropped: dict[int, None] = {}

    def __contains__(self, block: int) -> bool:
        with self._lock:
            return block in self._slots

    # --- steps -------------------------------------------------------------------------------------------------

    def admit(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Written blocks get a slot on first use and keep it: the engine's own limit bounds how many ids it has.

        Raises:
            NotServed: this instance is not served as a guest, so its blocks are not for steps.
            UnmappedBlock: a block of ``read`` is neither mapped nor in ``written``.
            PoolFull: more slots are needed than the guest can have.
            SlotsBusy: more than it can have at this moment. In all cases no block has changed.
        """
        with self._lock:
            if not self._is_served:
                raise NotServed(f"instance {self.instance} is not served here as a guest")
            slots = self._slots
            fresh = {block: None for block in written if block not in slots}
            if missing := [block for block in read if block not in slots and block not in fresh]:
                raise UnmappedBlock(f"blocks {missing[:8]} are to be read, but were never written here for this engine")
            capacity, reserved = self._pool.capacity, self._pool._reserved()
            left = capacity - self._mapped
            if len(fresh) > left:
                raise PoolFull(f"{len(fresh)} more blocks do not fit: {left} of {capacity} slots are left")
            self._pool._guest_waits = len(fresh) > left - reserved
            if self._pool._guest_waits:
                raise SlotsBusy(f"{len(fresh)} more blocks must wait: replicas are being written to {reserved} slots")
            for block in fresh:
                slots[block] = self._pool._slot_for_guest()
            self._unsealed.update(fresh)

    def translate(self, blocks: list[int]) -> list[int]:
        with self._lock:
            slots = self._slots
            try:
                return [slots[block] for block in blocks]
            except KeyError as error:
                raise UnmappedBlock(f"block {error} has no slot here for this engine") from None

    # --- who is served -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Raises `ValueError` if another instance is served."""
        with self._lock:
            if self._pool._serving not in (None, self):
                raise ValueError(f"instance {self.instance} cannot be served: there is another guest")
            self._pool._serving = self
            self._void_reserved()
            # Nobody keeps replicas here while this is the original, so nobody will ask.
            self._dropped.clear()

    def stop_serving(self) -> None:
        with self._lock:
            if self._is_served:
                self._pool._serving = None
                self._pool._guest_waits = False
                for block in self._unsealed:
                    self._pool._free.append(self._slots.pop(block))
                self._unsealed.clear()

    def clear(self) -> None:
        with self._lock:
            self._void_reserved()
            if self._is_served:
                self._unsealed.update(self._sealed)
            else:
                self._unmap(self._sealed)
            self._sealed.clear()
            self._chains = Chains()
            self._dropped.clear()

    # --- sealed content ----------------------------------------------------------------------------------------

    def seal(self, seals: Sequence[Seal]) -> list[Seal]:
        with self._lock:
            return [seal for seal in seals if self._seal(seal)] if self._is_served else []

    def overwrite(self, blocks: Iterable[int]) -> list[int]:
        """Of an instance that is not served, what was overwritten elsewhere is of no use here either."""
        with self._lock:
            had = self._void(blocks)
            if self._is_served:
                self._unsealed.update(had)
            else:
                self._unmap(had)
            return had

    def forget(self, blocks: Iterable[int]) -> list[int]:
        with self._lock:
            had = self._void(blocks)
            self._unmap(had)
            return had

    def end(self, owners: Iterable[int]) -> None:
        with self._lock:
            self._chains.end(owners)

    def held(self) -> tuple[bytes, bytes]:
        with self._lock:
            return pack_blocks(self._sealed), pack_numbers(link.seal.number for link in self._sealed.values())

    @property
    def sealed_count(self) -> int:
        with self._lock:
            return len(self._sealed)

    def seals(self) -> list[tuple[Seal, int]]:
        with self._lock:
            links = [(link.seal, link.slot) for link in self._sealed.values()]
        return sorted(links, key=lambda link: link[0].number)

    # --- keeping replicas --------------------------------------------------------------------------------------

    def place(self, seals: Sequence[Seal]) -> list[int | None]:
        with self._lock:
            here: set[int] = set()
            return [self._place(seal, here) for seal in seals]

    def commit(self, seals: Sequence[Seal], slots: Sequence[int]) -> None:
        with self._lock:
            for seal, slot in zip(seals, slots, strict=True):
                link = self._end_reservation(slot, seal)
                if link is not None and self._coming.get(seal.block) is link:
                    del self._coming[seal.block]
                    self._slots[seal.block] = slot
                    self._label(link)
                    continue
                self._pool._free.append(slot)
                if link is not None and self._chains.get(seal.number) is None:
                    self._dropped[seal.number] = None

    def abandon(self, slots: Sequence[int]) -> None:
        with self._lock:
            for slot in slots:
                link = self._end_reservation(slot)
                if link is not None and self._coming.get(link.seal.block) is link:
                    del self._coming[link.seal.block]
                    self._chains.remove(link)
                self._pool._free.append(slot)

    def take_dropped(self) -> list[int]:
        with self._lock:
            dropped = list(self._dropped)
            self._dropped.clear()
            return dropped

    @property
    def room(self) -> int:
        with self._lock:
            return len(self._pool._free) if self._may_place else 0

    # --- under the lock ----------------------------------------------------------------------------------------

    @property
    def _is_served(self) -> bool:
        return self._pool._serving is self

    @property
    def _may_place(self) -> bool:
        return not self._is_served and not self._pool._guest_waits

    @property
    def _mapped(self) -> int:
        return len(self._slots) - 1

    def _seal(self, seal: Seal) -> bool:
        old = self._sealed.get(seal.block)
        if seal.block not in self._slots or (old is not None and seal.number <= old.seal.number):
            return False
        if not self._could_hold(seal):
            return False
        self._void([seal.block])
        self._unsealed.discard(seal.block)
        link = Link(seal, self._slots[seal.block])
        self._chains.reserve(link)
        self._label(link)
        return True

    def _place(self, seal: Seal, here: set[int]) -> int | None:
        """``here`` are the numbers placed earlier in the same call."""
        if not self._may_place or seal.block in self._coming or not self._could_hold(seal):
            return None
        if seal.parent and seal.parent not in here:
            parent = self._chains.get(seal.parent)
            if parent is None or not parent.stored or parent.seal.block == seal.block:
                return None
        if self._void([seal.block]):
            link = Link(seal, self._slots.pop(seal.block))
            self._chains.reserve(link)
        else:
            link = Link(seal, NULL_BLOCK)
            self._chains.reserve(link)  # first, so that it cannot take its own parent's slot
            slot = self._pool._slot_for_replica(seal.depth)
            if slot is None:
                self._chains.remove(link)
                return None
            link.slot = slot
        self._coming[seal.block] = self._reserved[link.slot] = link
        here.add(seal.number)
        return link.slot

    def _could_hold(self, seal: Seal) -> bool:
        known = self._chains.get(seal.number)
        return (
            seal.block > NULL_BLOCK
            and 0 <= seal.parent < seal.number
            and (known is None or known.seal.block == seal.block)
        )

    def _label(self, link: Link) -> None:
        self._sealed[link.seal.block] = link
        self._chains.store(link, self._pool._now())
        self._dropped.pop(link.seal.number, None)

    def _void(self, blocks: Iterable[int]) -> list[int]:
        """Returns those that had a seal. They are still mapped, and it is for the caller to say as what."""
        had = []
        for block in blocks:
            if (link := self._coming.pop(block, None)) is not None:
                self._chains.remove(link)
                self._reserved[link.slot] = None
            if (link := self._sealed.pop(block, None)) is not None:
                self._chains.remove(link)
                had.append(block)
        return had

    def _void_reserved(self) -> None:
        self._give_up_reserved()
        self._reserved = dict.fromkeys(self._reserved)

    def _give_up_reserved(self) -> None:
        for link in self._coming.values():
            self._chains.remove(link)
        self._coming.clear()

    def _drop(self, link: Link) -> None:
        self._dropped[link.seal.number] = None
        self._unmap(self._void([link.seal.block]))

    def _unmap(self, blocks: Iterable[int]) -> None:
        self._pool._free.extend(self._slots.pop(block) for block in blocks)

    def _end_reservation(self, slot: int, seal: Seal | None = None) -> Link | None:
        link = self._reserved.get(slot)
        if slot not in self._reserved or (seal is not None and link is not None and link.seal != seal):
            raise ValueError(f"slot {slot} was not reserved for {seal or 'a replica'} of instance {self.instance}")
        del self._reserved[slot]
        return link
