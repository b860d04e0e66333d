import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.tenancy.block_map import BlockMap, IdentityMap
from resilientllm_worker.tenancy.errors import PoolFull, UnmappedBlock


class TestAGuest:
    def test_gets_slots_of_the_pool_only(self) -> None:
        blocks = BlockMap(100, 3)
        blocks.admit([], [7, 900, 1])
        assert sorted(blocks.translate([7, 900, 1])) == [100, 101, 102]

    def test_keeps_a_block_s_slot(self) -> None:
        blocks = BlockMap(100, 3)
        blocks.admit([], [7])
        slot = blocks.translate([7])
        blocks.admit([7], [7, 8])
        assert blocks.translate([7]) == slot and blocks.free_slots == 1

    def test_shares_the_null_block_with_everyone(self) -> None:
        blocks = BlockMap(100, 1)
        blocks.admit([0], [0, 0])
        assert blocks.translate([0]) == [0] and blocks.free_slots == 1

    def test_cannot_read_what_was_never_written_here(self) -> None:
        blocks = BlockMap(100, 3)
        with pytest.raises(UnmappedBlock, match=r"\[9\] are to be read"):
            blocks.admit([9], [7])
        with pytest.raises(UnmappedBlock, match="block 7 has no slot"):
            blocks.translate([7])
        assert blocks.free_slots == 3

    def test_can_read_what_the_same_step_writes(self) -> None:
        blocks = BlockMap(100, 3)
        blocks.admit([9], [9])
        assert 9 in blocks

    def test_cannot_exceed_the_pool_and_takes_nothing_when_it_tries(self) -> None:
        blocks = BlockMap(100, 3)
        blocks.admit([], [1, 2])
        with pytest.raises(PoolFull, match="2 more blocks do not fit: 1 of 3"):
            blocks.admit([], [1, 3, 4])
        assert 3 not in blocks and blocks.free_slots == 1

    @given(steps=st.lists(st.lists(st.integers(0, 40), max_size=8), max_size=12))
    def test_never_shares_a_slot_between_blocks(self, steps: list[list[int]]) -> None:
        blocks = BlockMap(50, 41)
        for step in steps:
            blocks.admit([], step)
        ids = sorted({block for step in steps for block in step} - {0})
        slots = blocks.translate(ids)
        assert len(set(slots)) == len(ids) and all(50 <= slot < 91 for slot in slots)

    @pytest.mark.parametrize(("first", "count"), [(0, 4), (-1, 4), (1, -1)])
    def test_cannot_have_a_pool_over_the_null_block(self, first: int, count: int) -> None:
        with pytest.raises(ValueError, match="null block"):
            BlockMap(first, count)


class TestHome:
    def test_keeps_its_numbers_in_new_lists(self) -> None:
        ids = [3, 0, 1]
        translated = IdentityMap(4).translate(ids)
        assert translated == ids and translated is not ids

    @pytest.mark.parametrize("block", [-1, 4, 400])
    def test_cannot_reach_the_guests_pool(self, block: int) -> None:
        for read, written in (([block], []), ([], [1, block])):
            with pytest.raises(UnmappedBlock, match=f"block {block} is outside the 4 home blocks"):
                IdentityMap(4).admit(read, written)
