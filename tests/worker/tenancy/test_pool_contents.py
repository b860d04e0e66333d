"""A small pool under any sequence of what its users may do, against a model of what is in each slot.

The model knows the rules in their plainest form: it looks at all that is held, each time. It keeps what was last
written to each slot, so a label that does not fit its slot's content cannot pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from resilientllm_worker.protocol.messages import Seal
from resilientllm_worker.tenancy.errors import NotServed, PoolFull, SlotsBusy, UnmappedBlock
from resilientllm_worker.tenancy.pool import Pool, PoolBlocks

from tests.worker.tenancy.builders import held_by

FIRST, COUNT = 20, 5
INSTANCES = (1, 2, 3)
BLOCKS = range(1, 7)

instances = st.sampled_from(INSTANCES)
some_blocks = st.lists(st.sampled_from(BLOCKS), max_size=3)
picks = st.integers(0, 11)


@dataclass
class Held:
    seal: Seal
    slot: int
    stored: int


@dataclass
class Tenant:
    """What one instance should have here."""

    mapped: dict[int, int] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    """By number."""
    coming: dict[int, tuple[Seal, bool]] = field(default_factory=dict)
    """By slot: the replica, and whether it is wanted."""
    told: set[int] = field(default_factory=set)
    """Slots in `coming` whose sender is to be told if it was given up meanwhile."""
    ended: set[int] = field(default_factory=set)
    dropped: list[int] = field(default_factory=list)
    numbers: int = 0
    """The highest that was used."""

    def wanted(self) -> list[Seal]:
        return [seal for seal, wanted in self.coming.values() if wanted]

    def numbers_here(self) -> dict[int, int]:
        """Blocks by number, those on their way included."""
        return {seal.number: seal.block for seal in [*self.wanted(), *(held.seal for held in self.held.values())]}

    def void(self, block: int) -> bool:
        for slot, (seal, wanted) in self.coming.items():
            if wanted and seal.block == block:
                self.coming[slot] = (seal, False)
                self.told.discard(slot)
        numbers = [number for number, held in self.held.items() if held.seal.block == block]
        for number in numbers:
            del self.held[number]
        return bool(numbers)

    def forget_owners(self) -> None:
        self.ended &= {seal.owner for seal in self.wanted()} | {held.seal.owner for held in self.held.values()}

    def whole(self, seal: Seal) -> bool:
        while seal.parent:
            if seal.parent not in self.held:
                return False
            seal = self.held[seal.parent].seal
        return True

    def rank(self, held: Held) -> tuple[int, int, int]:
        if not self.whole(held.seal):
            return 0, 0, held.stored
        if held.seal.owner in self.ended:
            return 1, 0, held.stored
        return 2, -held.seal.depth, held.stored

    def leaves(self) -> list[Held]:
        parents = {seal.parent for seal in self.wanted()} | {held.seal.parent for held in self.held.values()}
        return [held for number, held in self.held.items() if number not in parents]


class PoolContents(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(FIRST, COUNT)
        self.model = {instance: Tenant() for instance in INSTANCES}
        self.serving: int | None = None
        self.guest_waits = False
        self.content: dict[int, object] = {}
        """Of every slot: the number of a seal with its instance and term, or something that nobody ever seals."""
        self.term = dict.fromkeys(INSTANCES, 1)
        self.now = 0

    def tenant(self, instance: int) -> PoolBlocks:
        return self.pool.tenant(instance)

    def free(self) -> int:
        return COUNT - sum(len(tenant.mapped) + len(tenant.coming) for tenant in self.model.values())

    def scribble(self, slot: int) -> None:
        self.now += 1
        self.content[slot] = self.now

    def sealed_as(self, instance: int, number: int) -> object:
        return instance, self.term[instance], number

    def victim(self) -> tuple[Tenant, Held] | None:
        leaves = [
            (tenant, leaf)
            for instance, tenant in self.model.items()
            if instance != self.serving
            for leaf in tenant.leaves()
        ]
        return min(leaves, key=lambda leaf: leaf[0].rank(leaf[1]), default=None)

    def drop(self, tenant: Tenant, held: Held) -> None:
        assert held.seal.number not in {other.seal.parent for other in tenant.held.values()}
        tenant.dropped.append(held.seal.number)
        del tenant.held[held.seal.number], tenant.mapped[held.seal.block]
        tenant.forget_owners()

    def a_seal(self, instance: int, block: int, pick: int, again: int) -> Seal:
        """Mostly a new number behind one that is here, sometimes an old one or a hole."""
        tenant = self.model[instance]
        known = sorted(tenant.numbers_here())
        if tenant.numbers and again == 0:
            number = pick % tenant.numbers + 1
        else:
            tenant.numbers += 1
            number = tenant.numbers
        parents = range(number) if again == 1 else [0, *(other for other in known if other < number)]
        parent = parents[pick % len(parents)]
        depth = tenant.held[parent].seal.depth + 1 if parent in tenant.held else pick % 4
        return Seal(number, block, parent, depth, 1 + pick % 3, b"")

    # --- keeping replicas --------------------------------------------------------------------------------------

    @rule(
        instance=instances,
        wishes=st.lists(st.tuples(st.sampled_from(BLOCKS), picks, st.integers(0, 9)), min_size=1, max_size=3),
    )
    def place(self, instance: int, wishes: list[tuple[int, int, int]]) -> None:
        tenant = self.model[instance]
        seals = [self.a_seal(instance, *wish) for wish in wishes]
        slots = self.tenant(instance).place(seals)
        here: set[int] = set()
        for seal, slot in zip(seals, slots, strict=True):
            expected = self.expect_place(instance, seal, here)
            assert (slot is not None) == expected, f"{seal} in {seals}: {slots}"
            if slot is not None:
                others = self.model.values()
                assert slot not in [mapped for other in others for mapped in other.mapped.values()]
                assert all(slot not in other.coming for other in others)
                tenant.coming[slot] = (seal, True)
                tenant.told.add(slot)
                here.add(seal.number)
                self.scribble(slot)

    @rule(instance=instances, wishes=st.lists(st.tuples(st.sampled_from(BLOCKS), picks), min_size=1, max_size=4))
    def keep(self, instance: int, wishes: list[tuple[int, int]]) -> None:
        """As it mostly goes: new numbers, placed and filled."""
        for block, pick in wishes:
            self.place(instance, [(block, pick, 9)])
            self.fill(instance, 3, keep=True)

    def expect_place(self, instance: int, seal: Seal, here: set[int]) -> bool:
        """Does in the model what placing does, except for the new slot itself."""
        tenant = self.model[instance]
        if (
            instance == self.serving
            or self.guest_waits
            or any(seal.block == coming.block for coming in tenant.wanted())
        ):
            return False
        if seal.parent >= seal.number or tenant.numbers_here().get(seal.number, seal.block) != seal.block:
            return False
        if seal.parent and seal.parent not in here:
            parent = tenant.held.get(seal.parent)
            if parent is None or parent.seal.block == seal.block:
                return False
        if tenant.void(seal.block):
            del tenant.mapped[seal.block]
            tenant.forget_owners()
            return True
        if self.free() > 0:
            return True
        tenant.coming[-1] = (seal, True)  # so that neither its parent gives way, nor its owner is forgotten
        victim = self.victim()
        gives_way = victim is not None and (
            victim[0].rank(victim[1])[0] < 2 or victim[1].seal.depth > seal.depth  # broken, or its owner has ended
        )
        if victim is not None and gives_way:
            self.drop(*victim)
        del tenant.coming[-1]
        return gives_way

    @rule(instance=instances, pick=picks, keep=st.booleans())
    def fill(self, instance: int, pick: int, keep: bool) -> None:
        """Commits or abandons some of what is on its way."""
        tenant = self.model[instance]
        slots = list(tenant.coming)[: 1 + pick % 4]
        if pick % 2:
            slots.reverse()
        chosen = [tenant.coming[slot] for slot in slots]
        if not keep:
            self.tenant(instance).abandon(slots)
        else:
            for (seal, _), slot in zip(chosen, slots, strict=True):
                self.content[slot] = self.sealed_as(instance, seal.number)
            self.tenant(instance).commit([seal for seal, _ in chosen], slots)
        for (seal, wanted), slot in zip(chosen, slots, strict=True):
            del tenant.coming[slot]
            if keep and wanted:
                self.hold(tenant, seal, slot)
            elif keep and slot in tenant.told and seal.number not in tenant.numbers_here():
                tenant.dropped.append(seal.number)
            tenant.told.discard(slot)
        tenant.forget_owners()

    def hold(self, tenant: Tenant, seal: Seal, slot: int) -> None:
        self.now += 1
        tenant.held[seal.number] = Held(seal, slot, self.now)
        tenant.mapped[seal.block] = slot
        if seal.number in tenant.dropped:
            tenant.dropped.remove(seal.number)

    @rule(instance=instances)
    def take_dropped(self, instance: int) -> None:
        taken = self.tenant(instance).take_dropped()
        assert sorted(taken) == sorted(self.model[instance].dropped) and len(set(taken)) == len(taken)
        self.model[instance].dropped.clear()

    # --- sealed content ----------------------------------------------------------------------------------------

    @rule(instance=instances, wishes=st.lists(st.tuples(st.sampled_from(BLOCKS), picks, st.integers(0, 9)), max_size=3))
    def seal(self, instance: int, wishes: list[tuple[int, int, int]]) -> None:
        tenant = self.model[instance]
        seals = [self.a_seal(instance, *wish) for wish in wishes]
        expected = []
        for seal in seals:
            old = max((number for number, held in tenant.held.items() if held.seal.block == seal.block), default=0)
            if (
                instance == self.serving
                and seal.block in tenant.mapped
                and seal.number > max(old, seal.parent)
                and tenant.numbers_here().get(seal.number, seal.block) == seal.block
            ):
                expected.append(seal)
                tenant.void(seal.block)
                tenant.forget_owners()
                slot = tenant.mapped[seal.block]
                self.hold(tenant, seal, slot)
                self.content[slot] = self.sealed_as(instance, seal.number)
        assert self.tenant(instance).seal(seals) == expected

    @rule(instance=instances, blocks=some_blocks, forget=st.booleans())
    def void(self, instance: int, blocks: list[int], forget: bool) -> None:
        tenant = self.model[instance]
        had = [block for block in blocks if tenant.void(block)]
        tenant.forget_owners()
        if forget or instance != self.serving:
            for block in had:
                del tenant.mapped[block]
        method = self.tenant(instance).forget if forget else self.tenant(instance).overwrite
        assert method(blocks) == had

    @rule(instance=instances, owners=st.lists(st.integers(1, 3), max_size=2))
    def end(self, instance: int, owners: list[int]) -> None:
        self.tenant(instance).end(owners)
        self.model[instance].ended.update(owners)
        self.model[instance].forget_owners()

    # --- serving -----------------------------------------------------------------------------------------------

    @rule(instance=instances)
    def serve(self, instance: int) -> None:
        tenant = self.model[instance]
        if self.serving not in (None, instance):
            with pytest.raises(ValueError, match="another guest"):
                self.tenant(instance).serve()
            return
        self.tenant(instance).serve()
        self.serving = instance
        self.void_coming(tenant)
        tenant.dropped.clear()

    def void_coming(self, tenant: Tenant) -> None:
        tenant.coming = {slot: (seal, False) for slot, (seal, _) in tenant.coming.items()}
        tenant.told.clear()
        tenant.forget_owners()

    @precondition(lambda self: self.serving is not None)
    @rule()
    def stop_serving(self) -> None:
        assert self.serving is not None
        self.tenant(self.serving).stop_serving()
        tenant = self.model[self.serving]
        sealed = {held.seal.block for held in tenant.held.values()}
        tenant.mapped = {block: slot for block, slot in tenant.mapped.items() if block in sealed}
        self.serving, self.guest_waits = None, False

    @rule(instance=instances, rarely=st.integers(0, 3))
    def clear(self, instance: int, rarely: int) -> None:
        if rarely:
            return
        self.tenant(instance).clear()
        tenant = self.model[instance]
        self.void_coming(tenant)
        mapped = tenant.mapped if instance == self.serving else {}
        self.model[instance] = Tenant(mapped=mapped, coming=tenant.coming)
        self.term[instance] += 1

    @rule(instance=instances, read=some_blocks, written=some_blocks)
    def admit(self, instance: int, read: list[int], written: list[int]) -> None:
        if instance != self.serving:
            with pytest.raises(NotServed):
                self.tenant(instance).admit(read, written)
            return
        self.run_step(self.tenant(instance), self.model[instance], read, written)

    @precondition(lambda self: self.serving is not None)
    @rule(written=st.lists(st.sampled_from(BLOCKS), min_size=2, max_size=6))
    def admit_much(self, written: list[int]) -> None:
        assert self.serving is not None
        self.run_step(self.tenant(self.serving), self.model[self.serving], [], written)

    @precondition(lambda self: self.serving is not None)
    @rule(wishes=st.lists(st.tuples(st.sampled_from(BLOCKS), picks), min_size=1, max_size=3))
    def compute(self, wishes: list[tuple[int, int]]) -> None:
        """As it mostly goes: a step writes blocks, and then they are sealed."""
        assert self.serving is not None
        self.admit(self.serving, [], [block for block, _ in wishes])
        self.seal(self.serving, [(block, pick, 9) for block, pick in wishes])

    def run_step(self, blocks: PoolBlocks, tenant: Tenant, read: list[int], written: list[int]) -> None:
        fresh = set(written) - tenant.mapped.keys()
        reserved = sum(len(other.coming) for other in self.model.values())
        assert blocks.overwrite(written) == [block for block in written if tenant.void(block)]
        tenant.forget_owners()
        if set(read) - tenant.mapped.keys() - fresh:
            with pytest.raises(UnmappedBlock):
                blocks.admit(read, written)
            return
        if len(fresh) > COUNT - len(tenant.mapped):
            with pytest.raises(PoolFull, match="do not fit"):
                blocks.admit(read, written)
            return
        self.guest_waits = len(fresh) > COUNT - len(tenant.mapped) - reserved
        if self.guest_waits:
            with pytest.raises(SlotsBusy):
                blocks.admit(read, written)
            return
        while self.free() < len(fresh):
            victim = self.victim()
            if victim is None:
                for other in self.model.values():
                    other.coming = {slot: (seal, False) for slot, (seal, _) in other.coming.items()}
                    other.forget_owners()
                victim = self.victim()
            assert victim is not None
            self.drop(*victim)
        blocks.admit(read, written)
        for block, slot in zip(written, blocks.translate(written), strict=True):
            tenant.mapped[block] = slot
            self.scribble(slot)

    # --- what always holds -------------------------------------------------------------------------------------

    @invariant()
    def labels_denote_contents(self) -> None:
        for instance, tenant in self.model.items():
            seals = self.tenant(instance).seals()
            assert [(held.seal, held.slot) for _, held in sorted(tenant.held.items())] == seals
            assert held_by(self.tenant(instance)) == {seal.block: seal.number for seal, _ in seals}
            for seal, slot in seals:
                assert self.content[slot] == self.sealed_as(instance, seal.number)
                assert self.tenant(instance).translate([seal.block]) == [slot]

    @invariant()
    def every_slot_is_free_or_one_block_s(self) -> None:
        used: list[int] = []
        for instance, tenant in self.model.items():
            mapped = [block for block in BLOCKS if block in self.tenant(instance)]
            assert mapped == sorted(tenant.mapped), "what is served never vanishes, and nothing else stays"
            assert self.tenant(instance).translate(mapped) == [tenant.mapped[block] for block in mapped]
            used += [*tenant.mapped.values(), *tenant.coming]
        assert len(set(used)) == len(used) and set(used) <= set(range(FIRST, FIRST + COUNT))
        for instance in INSTANCES:
            assert self.tenant(instance).room == (
                0 if instance == self.serving or self.guest_waits else COUNT - len(used)
            )
        assert self.pool.serving == self.serving
        use = self.pool.use
        assert (use.free, use.free + use.replicas + use.arriving + use.guest) == (COUNT - len(used), COUNT)


PoolContents.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestPoolContents = PoolContents.TestCase
