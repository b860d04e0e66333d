"""The stage's own blocks: always room, but never two contents under one label."""

import pytest
from resilientllm_worker.tenancy.errors import UnmappedBlock
from resilientllm_worker.tenancy.home import HomeBlocks

from tests.worker.tenancy.builders import a_chain, a_seal, held_by, keep


class TestSlots:
    def test_are_the_ids_in_new_lists(self) -> None:
        ids = [3, 0, 1]
        translated = HomeBlocks(4).translate(ids)
        assert translated == ids and translated is not ids

    @pytest.mark.parametrize("block", [-1, 4, 400])
    def test_end_where_the_pool_begins(self, block: int) -> None:
        home = HomeBlocks(4)
        assert block not in home
        for read, written in (([block], []), ([], [1, block])):
            with pytest.raises(UnmappedBlock, match=f"block {block} is outside the 4 home blocks"):
                home.admit(read, written)

    def test_include_the_null_block_at_least(self) -> None:
        with pytest.raises(ValueError, match="null block"):
            HomeBlocks(0)


class TestSeals:
    def test_stay_until_the_block_is_written_again(self) -> None:
        home = HomeBlocks(8)
        seals = a_chain(range(3, 6))
        assert home.seal(seals) == seals
        assert held_by(home) == {3: 1, 4: 2, 5: 3}
        assert home.overwrite([7, 4, 4]) == [4]
        assert held_by(home) == {3: 1, 5: 3}
        assert home.seals() == [(seals[0], 3), (seals[2], 5)]

    def test_that_are_forgotten_are_void_and_the_block_stays(self) -> None:
        home = HomeBlocks(8)
        home.seal(a_chain(range(3, 5)))
        assert home.forget([4, 5]) == [4]
        assert held_by(home) == {3: 1} and 4 in home

    def test_give_way_to_newer_ones_only(self) -> None:
        home = HomeBlocks(8)
        home.seal([a_seal(5, block=3)])
        assert home.seal([a_seal(5, block=3), a_seal(4, block=3)]) == []
        assert home.seal([a_seal(6, block=3)]) == [a_seal(6, block=3)]
        assert held_by(home) == {3: 6}

    @pytest.mark.parametrize("block", [-1, 0, 8])
    def test_are_not_for_the_null_block_or_others_blocks(self, block: int) -> None:
        home = HomeBlocks(8)
        assert home.seal([a_seal(1, block)]) == [] and home.place([a_seal(1, block)]) == [None]

    def test_never_name_two_blocks_by_one_number(self) -> None:
        home = HomeBlocks(8)
        home.seal([a_seal(1, block=3)])
        assert home.seal([a_seal(1, block=4)]) == [] and home.place([a_seal(1, block=4)]) == [None]
        assert home.place([a_seal(2, block=4), a_seal(2, block=5)]) == [4, None]

    def test_are_all_void_when_the_numbers_start_anew(self) -> None:
        home = HomeBlocks(8)
        home.seal([a_seal(7, block=3)])
        home.clear()
        assert held_by(home) == {} and home.seal([a_seal(1, block=3)])


class TestReplicas:
    def test_are_held_when_they_have_come(self) -> None:
        home = HomeBlocks(8)
        assert home.place(a_chain(range(3, 5))) == [3, 4]
        assert held_by(home) == {} and 3 not in home
        home.commit(a_chain(range(3, 5)), [3, 4])
        assert held_by(home) == {3: 1, 4: 2} and 3 in home

    def test_that_are_on_their_way_can_be_neither_read_nor_written_nor_sealed(self) -> None:
        home = HomeBlocks(8)
        home.place([a_seal(1, block=3)])
        for read, written in (([3], []), ([], [3])):
            with pytest.raises(UnmappedBlock, match="block 3 is just being filled"):
                home.admit(read, written)
        assert home.seal([a_seal(2, block=3)]) == [] and home.place([a_seal(2, block=3)]) == [None]

    def test_void_what_the_block_held_before_they_come(self) -> None:
        home = HomeBlocks(8)
        home.seal([a_seal(1, block=3)])
        home.place([a_seal(2, block=3)])
        assert held_by(home) == {}
        home.abandon([3])
        assert held_by(home) == {} and 3 in home

    def test_are_of_no_use_behind_a_hole(self) -> None:
        home = HomeBlocks(8)
        first, second, third = a_chain(range(3, 6))
        assert home.place([second]) == [None]
        assert home.place([first]) == [3]
        assert home.place([second]) == [None], "its parent may yet be abandoned"
        home.commit([first], [3])
        assert home.place([second, third]) == [4, 5]

    def test_cannot_take_the_block_of_their_own_parent(self) -> None:
        home = HomeBlocks(8)
        home.seal([a_seal(1, block=3)])
        assert home.place([a_seal(2, block=3, parent=1, depth=1)]) == [None]
        assert held_by(home) == {3: 1}

    @pytest.mark.parametrize("meanwhile", ["overwrite", "forget", "serve", "clear"])
    def test_that_became_void_on_their_way_are_not_held(self, meanwhile: str) -> None:
        home = HomeBlocks(8)
        seal = a_seal(1, block=3)
        home.place([seal])
        if meanwhile in ("overwrite", "forget"):
            assert getattr(home, meanwhile)([3]) == []
        else:
            getattr(home, meanwhile)()
        assert 3 not in home, "someone may still be writing it"
        home.commit([seal], [3])
        assert held_by(home) == {} and 3 in home
        assert home.seal([seal]) == [seal], "its number is free again"

    def test_are_refused_while_steps_write_the_blocks(self) -> None:
        home = HomeBlocks(8)
        home.serve()
        assert home.place([a_seal(1, block=3)]) == [None] and home.room == 0
        home.stop_serving()
        assert home.place([a_seal(1, block=3)]) == [3]

    def test_have_room_in_every_block_without_content(self) -> None:
        home = HomeBlocks(8)
        assert home.room == 7
        keep(home, a_chain(range(3, 5)))
        home.place([a_seal(9, block=6)])
        assert home.room == 4
        home.abandon([6])
        assert home.room == 5 and home.take_dropped() == []

    def test_come_only_where_they_were_placed(self) -> None:
        home = HomeBlocks(8)
        home.place([a_seal(1, block=3)])
        for seal, slot in ((a_seal(2, block=3), 3), (a_seal(1, block=4), 4)):
            with pytest.raises(ValueError, match=f"slot {slot} was not reserved"):
                home.commit([seal], [slot])
        with pytest.raises(ValueError, match="slot 4 was not reserved"):
            home.abandon([4])
        home.commit([a_seal(1, block=3)], [3])
        assert held_by(home) == {3: 1}
