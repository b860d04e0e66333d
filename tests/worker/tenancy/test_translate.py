"""Two tenants' requests and blocks never meet, and nothing that names either is forgotten."""

import copy

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Array, Grammar, Logprobs, Step, StepResult
from resilientllm_worker.tenancy.blocks import Blocks
from resilientllm_worker.tenancy.errors import ForeignRequest, PoolFull, TranslationError, UnmappedBlock
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.translate import from_runner, to_runner, written_blocks

from tests.worker.tenancy.builders import BLOCK_SIZE, STAMP, a_guest, a_step, new, running

FIRST = 100


def guest(count: int = 8, known: tuple[int, ...] = ()) -> Blocks:
    blocks = a_guest(FIRST, count)
    blocks.admit([], known)
    return blocks


class TestRequestIds:
    STEP = a_step(
        new=[new("n", [1])],
        cached=running(c=None),
        num_scheduled_tokens=[("n", 3), ("c", 1)],
        finished=["f"],
        preempted=["p"],
        grammar=Grammar(["c"], bytes(4), 1),
    )

    def test_get_the_tenant_s_prefix_wherever_they_stand(self) -> None:
        ours = to_runner(self.STEP, "7/", HomeBlocks(10), BLOCK_SIZE)
        assert ours.new[0].request == "7/n"
        assert ours.cached.requests == ["7/c"]
        assert ours.num_scheduled_tokens == [("7/n", 3), ("7/c", 1)]
        assert (ours.finished, ours.preempted) == (["7/f"], ["7/p"])
        assert ours.grammar == Grammar(["7/c"], bytes(4), 1)

    def test_are_all_translated_in_every_field_that_the_protocol_has(self) -> None:
        """A field that someone adds to the wire with an id in it must be translated too."""
        marked = msgspec.msgpack.encode(to_runner(self.STEP, "@", HomeBlocks(10), BLOCK_SIZE))
        for request in ("n", "c", "f", "p"):
            assert marked.count(b"\xa2@" + request.encode()) == msgspec.msgpack.encode(self.STEP).count(
                b"\xa1" + request.encode()
            )

    def test_come_back_without_it(self) -> None:
        array = Array("float32", (1,), bytes(4))
        logprobs = Logprobs(array, array, array, None)
        theirs = StepResult(STAMP, 4, ["7/a", "7/b"], [[1], [2]], logprobs, [("7/a", logprobs)], [("7/b", 0)])
        ours = StepResult(STAMP, 4, ["a", "b"], [[1], [2]], logprobs, [("a", logprobs)], [("b", 0)])
        assert from_runner(theirs, "7/") == ours
        assert from_runner(msgspec.structs.replace(theirs, num_nans=None), "7/").num_nans is None

    @pytest.mark.parametrize("request_id", ["8/a", "a", "77/a"])
    def test_of_another_tenant_are_not_passed_on(self, request_id: str) -> None:
        with pytest.raises(ForeignRequest, match=f"tenant '7/', found '{request_id}'"):
            from_runner(StepResult(STAMP, 4, [request_id], [[1]], None, [], None), "7/")


class TestBlocks:
    def test_of_a_new_request_get_slots_group_by_group(self) -> None:
        blocks = guest()
        ours = to_runner(a_step(new=[new("a", [3, 4], [5])]), "", blocks, BLOCK_SIZE)
        assert ours.new[0].block_ids == (blocks.translate([3, 4]), blocks.translate([5]))
        assert min(blocks.translate([3, 4, 5])) >= FIRST

    def test_that_a_sliding_window_has_left_behind_are_nobody_s(self) -> None:
        """vLLM puts the null block in their place, which needs no content and no slot; the full group has them all."""
        step = a_step(new=[new("a", [3, 4, 5], [0, 6, 7], computed=2 * BLOCK_SIZE)], cached=running(b=[0, 2]))
        with pytest.raises(UnmappedBlock, match=r"\[6\]"):
            to_runner(step, "", guest(known=(3, 4)), BLOCK_SIZE)
        blocks = guest(count=6, known=(3, 4, 6))
        ours = to_runner(step, "", blocks, BLOCK_SIZE)
        assert ours.new[0].block_ids == (blocks.translate([3, 4, 5]), [0, *blocks.translate([6, 7])])
        assert ours.cached.new_block_ids == [([0, *blocks.translate([2])],)]

    def test_that_a_new_request_hits_must_have_content_here(self) -> None:
        step = a_step(new=[new("a", [3, 4], computed=BLOCK_SIZE)])
        with pytest.raises(UnmappedBlock, match=r"\[3\]"):
            to_runner(step, "", guest(), BLOCK_SIZE)
        to_runner(step, "", guest(known=(3,)), BLOCK_SIZE)

    def test_that_are_computed_in_part_must_have_content_too(self) -> None:
        step = a_step(new=[new("a", [3, 4], computed=BLOCK_SIZE + 1)])
        with pytest.raises(UnmappedBlock, match=r"\[4\]"):
            to_runner(step, "", guest(known=(3,)), BLOCK_SIZE)

    @pytest.mark.parametrize(
        "step",
        [
            a_step(new=[new("a", [3, 4], computed=BLOCK_SIZE), new("b", [3])]),
            a_step(new=[new("a", [3, 4], computed=BLOCK_SIZE)], cached=running(b=[3])),
        ],
    )
    def test_may_be_hit_in_the_step_that_writes_them_whatever_the_order(self, step: Step) -> None:
        """vLLM lists resumed requests behind new ones that were scheduled after them and hit their prefix."""
        to_runner(step, "", guest(), BLOCK_SIZE)

    def test_of_running_requests_get_slots_and_none_stays_none(self) -> None:
        blocks = guest()
        ours = to_runner(a_step(cached=running(a=[3], b=None, c=[])), "", blocks, BLOCK_SIZE)
        assert ours.cached.new_block_ids == [(blocks.translate([3]),), None, ([],)]

    def test_to_be_zeroed_are_only_those_in_use(self) -> None:
        blocks = guest(known=(3,))
        assert to_runner(a_step(zero_block_ids=[3, 9]), "", blocks, BLOCK_SIZE).zero_block_ids == blocks.translate([3])
        assert 9 not in blocks

    def test_to_be_copied_read_their_source_and_write_their_target(self) -> None:
        blocks = guest(known=(3,))
        ours = to_runner(a_step(block_copies=[(3, 4)]), "", blocks, BLOCK_SIZE)
        assert ours.block_copies == [(blocks.translate([3])[0], blocks.translate([4])[0])]
        with pytest.raises(UnmappedBlock, match=r"\[9\]"):
            to_runner(a_step(block_copies=[(9, 4)]), "", blocks, BLOCK_SIZE)

    def test_beyond_the_pool_leave_the_map_as_it_was(self) -> None:
        blocks = guest(count=2, known=(3,))
        with pytest.raises(PoolFull):
            to_runner(a_step(new=[new("a", [4, 5])]), "", blocks, BLOCK_SIZE)
        assert 4 not in blocks and 5 not in blocks

    def test_of_home_keep_their_numbers_within_home(self) -> None:
        step = a_step(new=[new("a", [3, 4])], cached=running(b=[5]), zero_block_ids=[3], block_copies=[(1, 3)])
        assert to_runner(step, "", HomeBlocks(6), BLOCK_SIZE) == step
        with pytest.raises(UnmappedBlock, match="block 5 is outside the 5 home blocks"):
            to_runner(step, "", HomeBlocks(5), BLOCK_SIZE)

    @pytest.mark.parametrize("blocks", [HomeBlocks(10), guest(known=(3, 4))])
    def test_are_given_to_the_runner_in_lists_of_its_own(self, blocks: Blocks) -> None:
        """V1 extends a new request's list with every further block."""
        step = a_step(new=[new("a", [3])], cached=running(b=[4]))
        before = copy.deepcopy(step)
        ours = to_runner(step, "", blocks, BLOCK_SIZE)
        ours.new[0].block_ids[0].append(99)
        groups = ours.cached.new_block_ids[0]
        assert groups is not None
        groups[0].append(99)
        assert step == before


class TestWrittenBlocks:
    """Whose seals are void: a block that is left out would pass for what it held before."""

    @pytest.mark.parametrize(
        ("step", "written"),
        [
            (a_step(new=[new("a", [3, 4], [5, 6])]), [3, 4, 5, 6]),
            (a_step(new=[new("a", [3, 4], [5, 6], computed=BLOCK_SIZE)]), [4, 6]),
            (a_step(new=[new("a", [3, 4], computed=2 * BLOCK_SIZE)]), []),
            (a_step(cached=running(a=[3], b=None, c=[4, 5])), [3, 4, 5]),
            (a_step(block_copies=[(3, 4)]), [4]),
            (a_step(zero_block_ids=[3, 4]), [3, 4]),
        ],
    )
    def test_are_those_that_a_step_fills_copies_to_or_zeroes(self, step: Step, written: list[int]) -> None:
        assert sorted(written_blocks(step, BLOCK_SIZE)) == written

    def test_include_the_block_that_a_new_request_goes_on_with(self) -> None:
        step = a_step(new=[new("a", [3, 4, 5], [6, 7, 8], [], computed=BLOCK_SIZE + 1)])
        assert sorted(written_blocks(step, BLOCK_SIZE)) == [4, 5, 7, 8]

    def test_do_not_share_memory_with_the_step(self) -> None:
        step = a_step(zero_block_ids=[3])
        written_blocks(step, BLOCK_SIZE).append(4)
        assert step.zero_block_ids == [3]


ids = st.integers(-2, 12)
requests = st.text("ab/", max_size=3)


@given(
    news=st.lists(st.tuples(requests, st.lists(st.lists(ids, max_size=4), max_size=2), st.integers(0, 70)), max_size=3),
    cached=st.dictionaries(st.sampled_from("xyz"), st.none() | st.lists(ids, max_size=3)),
    zeros=st.lists(ids, max_size=3),
    copies=st.lists(st.tuples(ids, ids), max_size=2),
    home=st.booleans(),
)
def test_any_step_is_translated_within_the_tenant_s_slots_or_refused(
    news: list[tuple[str, list[list[int]], int]],
    cached: dict[str, list[int] | None],
    zeros: list[int],
    copies: list[tuple[int, int]],
    home: bool,
) -> None:
    blocks = HomeBlocks(6) if home else guest(count=6, known=(1, 2))
    step = a_step(
        new=[new(request, *groups, computed=computed) for request, groups, computed in news],
        cached=running(**cached),
        zero_block_ids=zeros,
        block_copies=copies,
    )
    try:
        ours = to_runner(step, "t/", blocks, BLOCK_SIZE)
    except TranslationError:
        return
    slots = [slot for request in ours.new for group in request.block_ids for slot in group]
    slots += [slot for groups in ours.cached.new_block_ids for group in groups or () for slot in group]
    slots += ours.zero_block_ids + [slot for pair in ours.block_copies for slot in pair]
    assert set(slots) <= (set(range(6)) if home else {0, *range(FIRST, FIRST + 6)})
