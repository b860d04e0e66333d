"""Which blocks go next, and what each is known to be, whatever the order in which things happen."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from resilientllm_worker.protocol.messages import ReplicasKept, Seal
from resilientllm_worker.replication.backlog import RETRY_SECONDS, Backlog, SealedBlock, Standing, Tally
from resilientllm_worker.transport.errors import ProtocolError

from tests.worker.replication.builders import a_seal, kept_all

LIMIT = 4


def a_backlog(*seals: Seal, held: dict[int, int] | None = None, has_keeper: bool = True) -> tuple[Backlog, Tally]:
    """Connected, to a keeper that holds ``held``."""
    tally = Tally()
    backlog = Backlog(slotted(seals), (), tally, has_keeper, now=0.0)
    if has_keeper:
        settle(backlog, held or {})
    return backlog, tally


def slotted(seals: Sequence[Seal]) -> list[tuple[Seal, int]]:
    return [(seal, seal.block) for seal in seals]


def settle(backlog: Backlog, held: dict[int, int], now: float = 0.0) -> None:
    for _ in backlog.settle(held, now):
        pass


def numbers(batch: Sequence[SealedBlock]) -> list[int]:
    return [block.seal.number for block in batch]


def send(backlog: Backlog, limit: int = LIMIT) -> tuple[list[Seal], list[int], list[int]]:
    """Seals, void and ended of the next batch."""
    batch = backlog.take(limit, 0.0)
    good, void, ended = backlog.confirm(batch)
    return [batch[place].seal for place in good], void, ended


class TestOrder:
    def test_by_number(self) -> None:
        backlog, _ = a_backlog(*(a_seal(number) for number in (3, 1, 2)))
        assert numbers(backlog.take(2, 0.0)) == [1, 2]
        assert numbers(backlog.take(2, 0.0)) == [3]
        assert backlog.take(2, 0.0) == []

    def test_blocks_of_living_owners_first(self) -> None:
        backlog, _ = a_backlog(a_seal(1, owner=1), a_seal(2, owner=2), a_seal(3, owner=1), a_seal(4, owner=2))
        backlog.offer([], [1], 0.0)
        assert numbers(backlog.take(LIMIT, 0.0)) == [2, 4, 1, 3]

    def test_but_not_before_their_parents(self) -> None:
        chain = [a_seal(1, owner=1), a_seal(2, parent=1, owner=1)]
        backlog, _ = a_backlog(*chain, a_seal(3, owner=1), a_seal(4, parent=2, owner=2))
        backlog.offer([], [1], 0.0)
        assert numbers(backlog.take(2, 0.0)) == [1, 2]
        assert numbers(backlog.take(2, 0.0)) == [4, 3]

    def test_a_seal_that_is_its_own_ancestor_ends_nowhere_else(self) -> None:
        backlog, _ = a_backlog(a_seal(1, parent=2), a_seal(2, parent=1), a_seal(3, parent=3))
        assert sorted(numbers(backlog.take(LIMIT, 0.0))) == [1, 2, 3]


class TestCancelling:
    def test_what_is_pending_is_never_sent(self) -> None:
        backlog, tally = a_backlog(a_seal(1), a_seal(2))
        backlog.cancel([1, 99])
        assert send(backlog) == ([a_seal(2)], [], [])
        assert (tally.cancelled_blocks, backlog.lag) == (1, 1)

    def test_what_is_being_read_is_dropped_from_the_batch(self) -> None:
        backlog, tally = a_backlog(a_seal(1), a_seal(2), a_seal(3))
        batch = backlog.take(LIMIT, 0.0)
        backlog.cancel([2])
        assert backlog.confirm(batch) == ([0, 2], [], [])
        assert tally.cancelled_blocks == 1

    @pytest.mark.parametrize("is_answered", [False, True])
    def test_what_was_sent_is_void_in_the_next_batch(self, is_answered: bool) -> None:
        backlog, tally = a_backlog(a_seal(1, block=5))
        seals, _, _ = send(backlog)
        if is_answered:
            backlog.answer(kept_all(seals), 0.0)
        assert backlog.cancel([5])
        if not is_answered:
            backlog.answer(kept_all(seals), 0.0)
        backlog.offer(slotted([a_seal(2, block=5)]), [], 0.0)
        assert send(backlog) == ([a_seal(2, block=5)], [5], [])
        assert (tally.cancelled_blocks, backlog.stored) == (0, 0)
        assert send(backlog) == ([], [], [])

    def test_a_block_that_is_sealed_again_without_a_word_is_void_first(self) -> None:
        backlog, _ = a_backlog(a_seal(1, block=5))
        send(backlog)
        backlog.offer(slotted([a_seal(2, block=5), a_seal(2, block=5)]), [], 0.0)
        assert send(backlog) == ([a_seal(2, block=5)], [5], [])

    def test_a_batch_of_which_nothing_is_left_expects_no_answer(self) -> None:
        backlog, _ = a_backlog(a_seal(1))
        batch = backlog.take(LIMIT, 0.0)
        backlog.cancel([1])
        assert backlog.confirm(batch) == ([], [], [])
        assert backlog.batches_sent == 0


class TestSettling:
    def test_what_the_keeper_has_is_not_sent_again(self) -> None:
        backlog, _ = a_backlog(a_seal(1), a_seal(2), a_seal(3, block=7), held={1: 1, 7: 2, 9: 4})
        assert (backlog.stored, backlog.lag) == (1, 2)
        assert send(backlog) == ([a_seal(2), a_seal(3, block=7)], [7, 9], [])

    def test_it_learns_of_owners_that_ended_before(self) -> None:
        backlog = Backlog(slotted([a_seal(1, owner=4)]), [4, 5], Tally(), has_keeper=True, now=0.0)
        settle(backlog, {})
        assert send(backlog) == ([a_seal(1, owner=4)], [], [4])

    def test_what_was_not_answered_before_a_break_is_pending_again(self) -> None:
        backlog, _ = a_backlog(*(a_seal(number) for number in range(1, 7)))
        send(backlog, 2)
        send(backlog, 2)
        backlog.answer(kept_all([a_seal(1), a_seal(2)]), 0.0)
        backlog.take(1, 0.0)
        backlog.lose(0.0)
        assert (backlog.stored, backlog.pending, backlog.batches_sent) == (2, 4, 0)
        settle(backlog, {1: 1, 3: 3})  # 2 was lost with its keeper, 3 had arrived
        assert send(backlog, 9)[0] == [a_seal(2), a_seal(4), a_seal(5), a_seal(6)]

    def test_the_lock_may_be_let_go_between_slices(self) -> None:
        """And what happens in between counts."""
        count = 2000
        backlog = Backlog(slotted([a_seal(n) for n in range(1, count + 1)]), (), Tally(), has_keeper=True, now=0.0)
        held = {number: number for number in range(1, count + 1)}
        settling = backlog.settle(held, 0.0)
        next(settling)
        backlog.cancel([1, count])
        backlog.offer(slotted([a_seal(count + 1, block=1)]), [], 0.0)
        assert len(list(settling)) > 2
        assert send(backlog) == ([a_seal(count + 1, block=1)], [1, count], [])
        assert backlog.stored == count - 2


class TestAnswers:
    def test_refused_and_dropped_are_neither_stored_nor_lagging(self) -> None:
        backlog, tally = a_backlog(a_seal(1), a_seal(2), a_seal(3))
        send(backlog)
        backlog.answer(ReplicasKept([1, 3], [2], [], [], 0), 0.0)
        assert (backlog.stored, backlog.lag) == (2, 0)
        backlog.offer(slotted([a_seal(4)]), [], 0.0)
        send(backlog)
        backlog.answer(ReplicasKept([4], [], [], [1, 99], 0), 0.0)
        assert (backlog.stored, backlog.lag, tally.refused_blocks) == (2, 0, 3)
        assert backlog.retry_seconds(99.0) is None

    def test_corrupt_is_sent_again(self) -> None:
        backlog, tally = a_backlog(a_seal(1))
        send(backlog)
        backlog.answer(ReplicasKept([], [], [1], [], 9), 0.0)
        assert (backlog.lag, tally.corrupt_blocks) == (1, 1)
        assert send(backlog)[0] == [a_seal(1)]

    def test_what_an_answer_does_not_name_is_not_stored(self) -> None:
        backlog, _ = a_backlog(a_seal(1))
        send(backlog)
        backlog.answer(ReplicasKept([7], [], [], [], 0), 0.0)
        assert (backlog.stored, backlog.lag) == (0, 0)

    def test_an_answer_to_nothing_breaks_the_rules(self) -> None:
        with pytest.raises(ProtocolError, match="not sent"):
            a_backlog()[0].answer(kept_all([]), 0.0)


class TestRetrying:
    def refused(self, *seals: Seal, room: int) -> Backlog:
        backlog, _ = a_backlog(*seals)
        while send(backlog)[0]:
            pass
        while backlog.batches_sent:
            backlog.answer(ReplicasKept([], [], [], [], room), 0.0)
        return backlog

    def retry(self, backlog: Backlog, now: float) -> list[int]:
        backlog.retry(backlog.worth_retrying(backlog.left_out()), now)
        return [seal.number for seal in send(backlog, 99)[0]]

    def test_once_a_second_as_many_as_there_is_room_for(self) -> None:
        backlog = self.refused(*(a_seal(number) for number in range(1, 5)), room=2)
        assert backlog.retry_seconds(0.25) == RETRY_SECONDS - 0.25
        assert backlog.retry_seconds(1.5) == 0.0
        assert self.retry(backlog, 1.5) == [1, 2]
        assert backlog.retry_seconds(1.5) == RETRY_SECONDS

    def test_not_without_room(self) -> None:
        assert self.refused(a_seal(1), room=0).retry_seconds(9.0) is None

    def test_what_is_void_is_room_as_soon_as_it_is_told(self) -> None:
        backlog, _ = a_backlog(a_seal(1), a_seal(2))
        send(backlog)
        backlog.answer(ReplicasKept([1], [2], [], [], 0), 0.0)
        assert backlog.retry_seconds(9.0) is None
        assert backlog.cancel([1])
        assert backlog.retry_seconds(9.0) == 0.0
        backlog.retry(backlog.worth_retrying(backlog.left_out()), 9.0)
        assert send(backlog) == ([a_seal(2)], [1], [])

    def test_living_owners_first_and_nothing_whose_parent_is_gone(self) -> None:
        chain = [a_seal(1, owner=1), a_seal(2, parent=1, owner=1), a_seal(3, parent=2, owner=1)]
        backlog = self.refused(*chain, a_seal(4, owner=2), a_seal(5, owner=3), room=2)
        backlog.offer([], [2], 0.0)
        backlog.cancel([1])
        assert self.retry(backlog, 1.0) == [5, 4]


class TestLag:
    def test_it_counts_from_the_oldest_that_still_waits(self) -> None:
        backlog, _ = a_backlog()
        for number in (1, 2, 3):
            backlog.offer(slotted([a_seal(number)]), [], float(number))
        assert backlog.lag_seconds(10.0) == 9.0
        seals, _, _ = send(backlog, 1)
        assert backlog.lag_seconds(10.0) == 9.0
        backlog.answer(kept_all(seals), 10.0)
        assert backlog.lag_seconds(10.0) == 8.0
        backlog.cancel([2, 3])
        assert (backlog.lag, backlog.lag_seconds(10.0)) == (0, 0.0)

    def test_without_a_keeper_nothing_lags(self) -> None:
        backlog, _ = a_backlog(a_seal(1), has_keeper=False)
        backlog.offer(slotted([a_seal(2)]), [], 0.0)
        assert (backlog.stored, backlog.lag, backlog.pending) == (0, 0, 0)

    def test_a_batch_fills_from_its_first_block_on(self) -> None:
        backlog, _ = a_backlog()
        for number in (1, 2, 3):
            backlog.offer(slotted([a_seal(number)]), [], float(number))
        assert backlog.pending_since == 1.0
        backlog.take(2, 5.0)
        assert backlog.pending_since == 5.0


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_each_block_is_in_one_place_and_arrives_in_the_end(seed: int) -> None:
    rng = random.Random(seed)
    backlog, _ = a_backlog()
    sealed: dict[int, Seal] = {}
    keeper: dict[int, int] = {}
    flying: list[tuple[list[Seal], list[int]]] = []
    reading: list[SealedBlock] | None = None
    number = 0

    def finish_reading() -> None:
        nonlocal reading
        if reading is not None:
            good, void, told = backlog.confirm(reading)
            assert all(sealed.get(reading[place].seal.block) == reading[place].seal for place in good)
            if good or void or told:
                flying.append(([reading[place].seal for place in good], void))
            reading = None

    def answer() -> None:
        seals, void = flying.pop(0)
        for block in void:
            keeper.pop(block, None)
        verdicts = {seal.number: rng.choice(["stored", "refused", "corrupt"]) for seal in seals}
        keeper.update({seal.block: seal.number for seal in seals if verdicts[seal.number] == "stored"})
        gone = rng.choice([[], list(keeper)[:1]])
        dropped = [keeper.pop(block) for block in gone]
        answers = {
            verdict: [n for n, v in verdicts.items() if v == verdict] for verdict in ("stored", "refused", "corrupt")
        }
        backlog.answer(ReplicasKept(**answers, dropped=dropped, room=3), 0.0)

    for _ in range(rng.randint(0, 40)):
        match rng.choice(["seal", "seal", "cancel", "end", "read", "sent", "answer", "lose"]):
            case "seal":
                number += 1
                block = rng.randint(1, 8)
                parent = rng.choice([0, *(s.number for s in sealed.values() if s.block != block)])
                seal = a_seal(number, block, parent, owner=rng.randint(1, 3))
                backlog.cancel([block])
                sealed[block] = seal
                backlog.offer(slotted([seal]), [], 0.0)
            case "cancel":
                block = rng.randint(1, 8)
                sealed.pop(block, None)
                backlog.cancel([block])
            case "end":
                owner = rng.randint(1, 3)
                backlog.offer([], [owner], 0.0)
            case "read" if reading is None:
                reading = backlog.take(rng.randint(1, 5), 0.0)
                assert len(set(numbers(reading))) == len(reading)
                here = {block.seal.number: place for place, block in enumerate(reading)}
                assert all(
                    here.get(block.seal.parent, -1) < place
                    for place, block in enumerate(reading)
                    if block.seal.parent < block.seal.number
                )
            case "sent":
                finish_reading()
            case "answer" if flying:
                answer()
            case "lose":
                reading = None
                flying.clear()
                backlog.lose(0.0)
                settle(backlog, dict(keeper))
        assert backlog._blocks.keys() == sealed.keys()
        assert backlog.stored == sum(keeper.get(block) == seal.number for block, seal in sealed.items()) or flying
        known = [block for block in backlog._blocks.values()]
        assert backlog.pending == sum(block.standing is Standing.PENDING for block in known)
        assert backlog.lag == sum(
            block.standing in (Standing.PENDING, Standing.READING, Standing.SENT) for block in known
        )

    finish_reading()
    while flying:
        answer()
    settle(backlog, dict(keeper))
    while backlog.pending:
        seals, void, _ = send(backlog)
        assert seals, "what is pending is not found"
        for block in void:
            keeper.pop(block, None)
        keeper.update({seal.block: seal.number for seal in seals})
        backlog.answer(kept_all(seals), 0.0)
    assert all(keeper.get(block) == seal.number for block, seal in sealed.items())
    assert backlog.stored == len(sealed)
