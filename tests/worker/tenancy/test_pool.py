"""Whose blocks are in the pool, and who gives way to whom."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Seal
from resilientllm_worker.tenancy.errors import NotServed, PoolFull, SlotsBusy, UnmappedBlock
from resilientllm_worker.tenancy.pool import Pool

from tests.worker.tenancy.builders import a_chain, a_guest, a_seal, held_by, keep

FIRST = 100
BLOCKS = range(10, 50)


class TestAGuest:
    def test_gets_slots_of_the_pool_only(self) -> None:
        guest = a_guest(FIRST, 3)
        guest.admit([], [7, 900, 1])
        assert sorted(guest.translate([7, 900, 1])) == [100, 101, 102]

    def test_keeps_a_block_s_slot(self) -> None:
        guest = a_guest(FIRST, 2)
        guest.admit([], [7])
        slot = guest.translate([7])
        guest.admit([7], [7, 8])
        assert guest.translate([7]) == slot

    def test_shares_the_null_block_with_everyone(self) -> None:
        guest = a_guest(FIRST, 1)
        guest.admit([0], [0, 0])
        guest.admit([], [1])
        assert guest.translate([0, 1]) == [0, FIRST]

    def test_cannot_read_what_was_never_written_here(self) -> None:
        guest = a_guest(FIRST, 1)
        with pytest.raises(UnmappedBlock, match=r"\[9\] are to be read"):
            guest.admit([9], [7])
        with pytest.raises(UnmappedBlock, match="block 7 has no slot"):
            guest.translate([7])
        guest.admit([], [8])

    def test_can_read_what_the_same_step_writes(self) -> None:
        guest = a_guest(FIRST, 3)
        guest.admit([9], [9])
        assert 9 in guest

    def test_cannot_exceed_the_pool_and_takes_nothing_when_it_tries(self) -> None:
        guest = a_guest(FIRST, 3)
        guest.admit([], [1, 2])
        with pytest.raises(PoolFull, match="2 more blocks do not fit: 1 of 3"):
            guest.admit([], [1, 3, 4])
        assert 3 not in guest
        guest.admit([], [3])

    def test_is_one_at_a_time(self) -> None:
        pool = Pool(FIRST, 3)
        pool.tenant(1).serve()
        pool.tenant(1).serve()
        assert pool.serving == 1
        with pytest.raises(ValueError, match="another guest"):
            pool.tenant(2).serve()
        pool.tenant(2).stop_serving()
        assert pool.serving == 1
        pool.tenant(1).stop_serving()
        assert pool.serving is None
        pool.tenant(2).serve()

    def test_alone_has_steps_and_seals(self) -> None:
        pool = Pool(FIRST, 3)
        tenant = pool.tenant(1)
        keep(tenant, [a_seal(1, block=7)])
        with pytest.raises(NotServed):
            tenant.admit([7], [])
        assert tenant.seal([a_seal(2, block=7)]) == [] and held_by(tenant) == {7: 1}

    def test_finds_its_replicas_as_its_blocks(self) -> None:
        pool = Pool(FIRST, 4)
        tenant = pool.tenant(1)
        seals = a_chain(BLOCKS[:2])
        slots = [slot for slot in tenant.place(seals) if slot is not None]
        tenant.commit(seals, slots)
        tenant.serve()
        tenant.admit([10, 11], [12])
        assert tenant.translate([10, 11]) == slots

    def test_leaves_its_sealed_blocks_as_replicas(self) -> None:
        pool = Pool(FIRST, 3)
        guest = pool.tenant(1)
        guest.serve()
        guest.admit([], [10, 11, 12])
        guest.seal(a_chain(BLOCKS[:2]))
        slots = guest.translate([10, 11])
        guest.stop_serving()
        assert 12 not in guest and guest.room == 1
        guest.serve()
        assert guest.translate([10, 11]) == slots and held_by(guest) == {10: 1, 11: 2}

    def test_takes_the_slots_of_others_replicas_from_their_chains_ends(self) -> None:
        pool = Pool(FIRST, 4)
        guest, other = pool.tenant(1), pool.tenant(2)
        keep(other, a_chain(BLOCKS[:4]))
        guest.serve()
        guest.admit([], [10, 11, 12])
        assert held_by(other) == {10: 1} and other.take_dropped() == [4, 3, 2]
        guest.admit([10, 11, 12], [13])
        assert other.take_dropped() == [1]

    def test_is_never_in_the_way_of_itself(self) -> None:
        pool = Pool(FIRST, 3)
        guest, other = pool.tenant(1), pool.tenant(2)
        guest.serve()
        guest.admit([], [10, 11, 12])
        guest.seal(a_chain(BLOCKS[:3]))
        guest.end([1])
        with pytest.raises(PoolFull):
            guest.admit([], [13])
        assert keep(other, [a_seal(1, block=10)]) == []
        assert held_by(guest) == {10: 1, 11: 2, 12: 3}

    def test_takes_the_slot_of_a_replica_though_its_child_is_on_the_way(self) -> None:
        pool = Pool(FIRST, 3)
        guest, other = pool.tenant(1), pool.tenant(2)
        keep(other, [a_seal(1, block=10)])
        seal = a_seal(2, block=11, parent=1, depth=1)
        (slot,) = other.place([seal])
        guest.serve()
        guest.admit([], [10, 11])
        assert other.take_dropped() == [1]
        assert slot is not None
        other.commit([seal], [slot])
        assert other.take_dropped() == [2] and held_by(other) == {}
        guest.admit([], [12])

    def test_waits_for_slots_that_someone_may_be_writing_and_then_comes_first(self) -> None:
        pool = Pool(FIRST, 3)
        guest, other = pool.tenant(1), pool.tenant(2)
        (slot,) = other.place([a_seal(1, block=10)])
        guest.serve()
        with pytest.raises(SlotsBusy, match="3 more blocks must wait: replicas are being written to 1 slots"):
            guest.admit([], [10, 11, 12])
        assert 10 not in guest and other.room == 0 and other.place([a_seal(2, block=11)]) == [None]
        assert slot is not None
        other.abandon([slot])
        assert other.place([a_seal(2, block=11)]) == [None]
        guest.admit([], [10, 11])
        assert other.place([a_seal(2, block=11)]) != [None]

    def test_that_leaves_makes_nobody_wait(self) -> None:
        pool = Pool(FIRST, 2)
        guest, other = pool.tenant(1), pool.tenant(2)
        other.place([a_seal(1, block=10)])
        guest.serve()
        with pytest.raises(SlotsBusy):
            guest.admit([], [10, 11])
        guest.stop_serving()
        assert other.place([a_seal(2, block=11)]) != [None]

    def test_that_must_start_anew_frees_its_slots_when_no_step_can_write_them(self) -> None:
        pool = Pool(FIRST, 2)
        guest, other = pool.tenant(1), pool.tenant(2)
        guest.serve()
        guest.admit([], [10, 11])
        guest.seal([a_seal(1, block=10)])
        guest.clear()
        assert held_by(guest) == {} and other.place([a_seal(1, block=10)]) == [None]
        guest.stop_serving()
        assert other.room == 2

    def test_keeps_what_it_forgets_unless_it_was_sealed(self) -> None:
        guest = a_guest(FIRST, 2)
        guest.admit([], [10, 11])
        guest.seal([a_seal(1, block=10)])
        assert guest.forget([10, 11, 12]) == [10]
        assert 10 not in guest and 11 in guest
        guest.admit([11], [13])

    def test_keeps_the_slots_of_blocks_that_it_overwrites(self) -> None:
        guest = a_guest(FIRST, 2)
        guest.admit([], [10])
        guest.seal([a_seal(1, block=10)])
        slot = guest.translate([10])
        assert guest.overwrite([10, 11]) == [10] and held_by(guest) == {}
        assert guest.translate([10]) == slot
        guest.stop_serving()
        assert 10 not in guest

    def test_seals_what_is_mapped_whatever_its_parent_and_newer_ones_only(self) -> None:
        guest = a_guest(FIRST, 2)
        guest.admit([], [10])
        seal = a_seal(8, block=10, parent=3, depth=2)
        assert guest.seal([seal, a_seal(9, block=11), a_seal(9, block=0)]) == [seal]
        assert guest.seal([seal, a_seal(7, block=10)]) == []
        newer = a_seal(9, block=10)
        assert guest.seal([newer]) == [newer] and guest.seals() == [(newer, guest.translate([10])[0])]

    @given(steps=st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=12))
    def test_never_shares_a_slot_between_blocks(self, steps: list[list[int]]) -> None:
        guest = a_guest(50, 41)
        for step in steps:
            guest.admit([], step)
        ids = sorted({block for step in steps for block in step} - {0})
        slots = guest.translate(ids)
        assert len(set(slots)) == len(ids) and all(50 <= slot < 91 for slot in slots)

    @pytest.mark.parametrize(("first", "count"), [(0, 4), (-1, 4), (1, -1)])
    def test_cannot_have_a_pool_over_the_null_block(self, first: int, count: int) -> None:
        with pytest.raises(ValueError, match="null block"):
            Pool(first, count)


class TestReplicas:
    def test_are_held_when_they_have_come(self) -> None:
        pool = Pool(FIRST, 3)
        tenant = pool.tenant(1)
        seals = a_chain(BLOCKS[:2])
        slots = [slot for slot in tenant.place(seals) if slot is not None]
        assert held_by(tenant) == {} and 10 not in tenant and tenant.room == 1
        tenant.commit(seals, slots)
        assert held_by(tenant) == {10: 1, 11: 2} and tenant.seals() == list(zip(seals, slots, strict=True))

    def test_that_are_abandoned_leave_their_slots(self) -> None:
        tenant = Pool(FIRST, 2).tenant(1)
        tenant.abandon([slot for slot in tenant.place(a_chain(BLOCKS[:2])) if slot is not None])
        assert tenant.room == 2 and tenant.take_dropped() == []
        assert keep(tenant, a_chain(BLOCKS[:2])) == [1, 2]

    def test_take_the_slot_that_their_block_has_and_void_it_at_once(self) -> None:
        tenant = Pool(FIRST, 1).tenant(1)
        (old,) = tenant.place([a_seal(1, block=10)])
        assert old is not None
        tenant.commit([a_seal(1, block=10)], [old])
        assert tenant.place([a_seal(2, block=10)]) == [old]
        assert held_by(tenant) == {} and tenant.take_dropped() == [], "who sends a newer one knows"

    @pytest.mark.parametrize(
        "seal",
        [
            a_seal(9, block=12, parent=8, depth=1),
            a_seal(9, block=0),
            a_seal(9, block=-1),
            a_seal(1, block=12),
            a_seal(9, block=10, parent=1, depth=1),
            a_seal(2, block=12, parent=2, depth=1),
            a_seal(3, block=11),
        ],
        ids=["hole", "null block", "no block", "number used", "on its parent", "own parent", "block on its way"],
    )
    def test_that_are_refused_leave_no_trace(self, seal: Seal) -> None:
        tenant = Pool(FIRST, 4).tenant(1)
        keep(tenant, [a_seal(1, block=10)])
        tenant.place([a_seal(4, block=11)])
        assert tenant.place([seal]) == [None]
        assert held_by(tenant) == {10: 1} and tenant.room == 2 and tenant.take_dropped() == []

    def test_may_follow_their_parent_in_one_call_but_not_in_the_next_before_it_has_come(self) -> None:
        tenant = Pool(FIRST, 4).tenant(1)
        first, second, third = a_chain(BLOCKS[:3])
        assert None not in tenant.place([first, second])
        assert tenant.place([third]) == [None]

    def test_are_refused_while_the_instance_is_served(self) -> None:
        guest = a_guest(FIRST, 4)
        assert guest.place([a_seal(1, block=10)]) == [None] and guest.room == 0

    @pytest.mark.parametrize("meanwhile", ["overwrite", "forget", "serve", "clear"])
    def test_that_became_void_on_their_way_are_not_held(self, meanwhile: str) -> None:
        pool = Pool(FIRST, 1)
        tenant = pool.tenant(1)
        seal = a_seal(1, block=10)
        (slot,) = tenant.place([seal])
        assert slot is not None
        if meanwhile in ("overwrite", "forget"):
            assert getattr(tenant, meanwhile)([10]) == []
        else:
            getattr(tenant, meanwhile)()
        assert pool.tenant(2).room == 0, "someone may still be writing it"
        tenant.commit([seal], [slot])
        assert held_by(tenant) == {} and tenant.take_dropped() == [] and pool.tenant(2).room == 1

    def test_come_only_where_they_were_placed(self) -> None:
        pool = Pool(FIRST, 2)
        seal = a_seal(1, block=10)
        (slot,) = pool.tenant(1).place([seal])
        assert slot is not None
        for tenant, other, place in ((1, a_seal(2, block=10), slot), (1, seal, slot - 1), (2, seal, slot)):
            with pytest.raises(ValueError, match="was not reserved"):
                pool.tenant(tenant).commit([other], [place])
        with pytest.raises(ValueError, match="was not reserved"):
            pool.tenant(2).abandon([slot])
        pool.tenant(1).commit([seal], [slot])

    def test_are_freed_where_they_are_forgotten_or_overwritten(self) -> None:
        tenant = Pool(FIRST, 2).tenant(1)
        keep(tenant, a_chain(BLOCKS[:2]))
        assert tenant.forget([11]) == [11] and tenant.overwrite([10]) == [10]
        assert tenant.room == 2 and 10 not in tenant and tenant.take_dropped() == []

    def test_are_all_freed_when_the_numbers_start_anew(self) -> None:
        pool = Pool(FIRST, 4)
        tenant = pool.tenant(1)
        keep(tenant, a_chain(BLOCKS[:4], number=5))
        keep(pool.tenant(2), [a_seal(1, block=10)])
        tenant.clear()
        assert tenant.room == 3 and held_by(tenant) == {} and tenant.take_dropped() == []
        assert keep(tenant, a_chain(BLOCKS[:2])) == [1, 2]


class TestWhoGivesWay:
    """A full pool of four, and a replica or a guest that wants in."""

    def test_nobody_to_a_replica_as_deep(self) -> None:
        pool = Pool(FIRST, 4)
        keep(pool.tenant(1), a_chain(BLOCKS[:4]))
        assert keep(pool.tenant(2), [a_seal(9, block=10, depth=3)]) == []
        assert pool.tenant(1).take_dropped() == []

    def test_the_deepest_to_one_less_deep(self) -> None:
        pool = Pool(FIRST, 4)
        keep(pool.tenant(1), a_chain(BLOCKS[:3]))
        keep(pool.tenant(2), [a_seal(1, block=10)])
        assert keep(pool.tenant(2), [a_seal(2, block=11, parent=1, depth=1)]) == [2]
        assert pool.tenant(1).take_dropped() == [3]

    def test_those_whose_owner_has_ended_whatever_their_depth_oldest_first(self) -> None:
        pool = Pool(FIRST, 4)
        tenant, other = pool.tenant(1), pool.tenant(2)
        keep(tenant, [a_seal(1, block=10, owner=1), a_seal(2, block=11, owner=2)])
        keep(other, [a_seal(1, block=10, owner=1), a_seal(2, block=11, owner=3)])
        other.end([1, 77])
        tenant.end([2])
        assert keep(tenant, [a_seal(3, block=12, depth=50)]) == [3] and tenant.take_dropped() == [2]
        assert keep(tenant, [a_seal(4, block=13, depth=50)]) == [4] and other.take_dropped() == [1]

    def test_a_chain_from_its_end_so_that_a_living_owner_s_keeps_all_before(self) -> None:
        pool = Pool(FIRST, 4)
        tenant = pool.tenant(1)
        keep(tenant, [a_seal(1, block=10, owner=1), a_seal(2, 11, 1, 1, owner=2), a_seal(3, 12, 1, 1, owner=1)])
        tenant.end([1])
        keep(tenant, [a_seal(4, 13, 3, 2, owner=1)])
        assert keep(pool.tenant(2), a_chain(BLOCKS[:3])) == [1, 2], "the last would take its own parent's place"
        assert tenant.take_dropped() == [4, 3]
        assert held_by(tenant) == {10: 1, 11: 2}

    def test_never_the_parent_of_the_one_that_wants_in(self) -> None:
        pool = Pool(FIRST, 1)
        tenant = pool.tenant(1)
        keep(tenant, [a_seal(1, block=10)])
        tenant.end([1])
        assert keep(tenant, [a_seal(2, 11, 1, 1)]) == [] and tenant.take_dropped() == []
        assert keep(pool.tenant(2), [a_seal(1, block=10)]) == [1], "it is a leaf again"

    def test_first_what_lost_its_chain_and_no_longer_when_the_chain_is_whole_again(self) -> None:
        pool = Pool(FIRST, 4)
        tenant = pool.tenant(1)
        first, *rest = a_chain(BLOCKS[:4])
        keep(tenant, [first, *rest])
        tenant.overwrite([10])
        assert held_by(tenant) == {11: 2, 12: 3, 13: 4}
        keep(pool.tenant(2), [a_seal(1, block=10)])
        assert keep(pool.tenant(2), [a_seal(2, 11, 1, depth=90)]) == [2] and tenant.take_dropped() == [4]
        pool.tenant(2).forget([10, 11])
        assert keep(tenant, [first, rest[-1]]) == [1, 4]
        assert keep(pool.tenant(2), [a_seal(3, block=12, depth=90)]) == []

    def test_behind_what_was_abandoned_first_too(self) -> None:
        pool = Pool(FIRST, 2)
        tenant = pool.tenant(1)
        seals = a_chain(BLOCKS[:2])
        slots = [slot for slot in tenant.place(seals) if slot is not None]
        tenant.commit(seals[1:], slots[1:])
        tenant.abandon(slots[:1])
        assert held_by(tenant) == {11: 2}
        keep(pool.tenant(2), [a_seal(1, block=10)])
        assert keep(pool.tenant(2), [a_seal(2, block=11, depth=90)]) == [2] and tenant.take_dropped() == [2]

    def test_each_is_told_of_once_unless_it_is_back(self) -> None:
        pool = Pool(FIRST, 2)
        tenant = pool.tenant(1)
        keep(tenant, a_chain(BLOCKS[:2]))
        keep(pool.tenant(2), [a_seal(1, block=10)])
        pool.tenant(2).forget([10])
        keep(tenant, a_chain(BLOCKS[:2])[1:])
        assert tenant.take_dropped() == []
        keep(pool.tenant(2), [a_seal(1, block=10)])
        assert tenant.take_dropped() == [2] and tenant.take_dropped() == []

    def test_none_is_told_of_that_came_on_a_second_way_while_the_first_was_given_up(self) -> None:
        pool = Pool(FIRST, 3)
        guest, other = pool.tenant(1), pool.tenant(2)
        seals = a_chain(BLOCKS[:2])
        keep(other, seals[:1])
        (slot,) = other.place(seals[1:])
        guest.serve()
        guest.admit([], [10, 11])
        guest.stop_serving()
        assert keep(other, seals) == [1, 2]
        assert slot is not None
        other.commit(seals[1:], [slot])
        assert other.take_dropped() == [] and held_by(other) == {10: 1, 11: 2} and other.room == 1

    def test_an_owner_is_remembered_only_as_long_as_its_blocks(self) -> None:
        """Numbers of owners rise without end, so what is kept of them must not."""
        tenant = Pool(FIRST, 4).tenant(1)
        for owner in range(1, 200):
            keep(tenant, [a_seal(owner, block=10, owner=owner)])
            tenant.end([owner, owner + 1])
        chains = tenant._chains
        assert len(chains._owned) == len(chains._ended) == 1
        assert len(chains._leaves) < 100
        keep(tenant, [a_seal(999, block=11, owner=200)])
        assert chains._ended == {199}, "an owner that was unknown when it ended counts as living"
