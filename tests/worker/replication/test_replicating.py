"""From one stage's KV cache to another's, over real sockets, while steps overwrite blocks and connections break."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from resilientllm_worker.protocol.messages import ReplicaHello, ReplicasKept, Seal, Stamp
from resilientllm_worker.replication.channel import ReplicaChannel
from resilientllm_worker.replication.tcp import connect

from tests.worker.replication.builders import Keeper, Source, keeping, serving
from tests.worker.transport.builders import TOKEN, eventually


def test_what_is_sealed_is_kept_byte_for_byte() -> None:
    with serving() as source, keeping() as keeper:
        source.compute(1, 2, 3)
        source.redirect(keeper)
        source.compute(*range(4, 30))
        assert eventually(lambda: source.is_kept_by(keeper))
        report = source.replicator.report()
    assert keeper.contents().keys() == source.numbers
    assert (report.address, report.connected, report.sealed_blocks) == (keeper.address, True, 29)
    assert (report.sent_blocks, report.sent_bytes) == (29, 29 * report.block_bytes)
    assert (report.cancelled_blocks, report.refused_blocks, report.corrupt_blocks) == (0, 0, 0)


def test_there_is_no_thread_without_a_target() -> None:
    # Those of the test before may still be ending.
    assert eventually(lambda: not any("replicas" in thread.name for thread in threading.enumerate()))
    before = set(threading.enumerate())
    with serving() as source:
        source.compute(1, 2)
        source.redirect(None)
        source.overwrite(1)
        assert set(threading.enumerate()) == before
        report = source.replicator.report()
        assert (report.address, report.stored_blocks, report.lag_blocks) == ("", 0, 0)


def test_its_threads_end_with_it() -> None:
    with keeping() as keeper:
        before = set(threading.enumerate())
        with serving() as source:
            source.compute(1)
            source.redirect(keeper)
            assert eventually(lambda: source.is_kept_by(keeper))
            assert any("replicas" in thread.name for thread in threading.enumerate())
        assert eventually(lambda: not any("replicas" in thread.name for thread in set(threading.enumerate()) - before))
        source.redirect(keeper)  # of no effect any more
        assert source.replicator.report().address == ""


class TestOverwriting:
    def test_what_is_overwritten_while_it_is_read_is_not_sent(self) -> None:
        with serving() as source, keeping() as keeper:
            source.cache.read_gate.close()
            seals = source.compute(1, 2)
            source.redirect(keeper)
            source.cache.read_gate.await_someone()
            source.overwrite(2)
            source.cache.read_gate.open()
            assert eventually(lambda: source.is_kept_by(keeper))
            assert keeper.contents().keys() == {seals[0].number}
            assert source.replicator.report().cancelled_blocks == 1

    def test_without_the_word_of_the_runner_it_would_be(self) -> None:
        """The control: the test above can see what it looks for."""
        with serving() as source, keeping() as keeper:
            source.cache.read_gate.close()
            seals = source.compute(1, 2)
            source.redirect(keeper)
            source.cache.read_gate.await_someone()
            source.cache.compute(2)
            source.cache.read_gate.open()
            assert eventually(lambda: source.replicator.report().stored_blocks == 2)
            assert keeper.contents()[seals[1].number] != source.truth[seals[1].number]

    def test_what_was_stored_is_given_up_with_the_next_batch(self) -> None:
        with serving() as source, keeping() as keeper:
            source.redirect(keeper)
            source.compute(1, 2)
            assert eventually(lambda: source.is_kept_by(keeper))
            source.overwrite(2)
            source.compute(3)
            assert eventually(lambda: keeper.contents().keys() == source.numbers)

    def test_neither_a_read_nor_a_slow_keeper_holds_up_the_runner(self) -> None:
        with serving(width=1 << 14) as source, keeping(width=1 << 14) as keeper:
            keeper.cache.write_gate.close()
            source.redirect(keeper)
            source.compute(*range(1, 40))
            keeper.cache.write_gate.await_someone()
            source.cache.read_gate.close()
            for _ in range(3):
                source.compute(1, *range(5, 40))
                source.overwrite(2)
            report = source.replicator.report()
            assert report.lag_blocks > 0 and report.stored_blocks == 0
            source.cache.read_gate.open()
            keeper.cache.write_gate.open()
            assert eventually(lambda: source.is_kept_by(keeper))


class TestKeepers:
    def test_another_keeper_gets_everything(self) -> None:
        with serving() as source, keeping() as first, keeping() as second:
            source.redirect(first)
            source.compute(*range(1, 20))
            assert eventually(lambda: source.is_kept_by(first))
            source.redirect(second, Stamp(3, 8))
            source.compute(20)
            assert eventually(lambda: source.is_kept_by(second))
            assert [hello.stamp for hello in second.hellos] == [Stamp(3, 8)]
            assert source.truth.keys() - first.contents().keys() == {20}

    def test_the_same_one_under_a_new_stamp_gets_nothing_again(self) -> None:
        with serving() as source, keeping() as keeper:
            source.redirect(keeper)
            source.compute(*range(1, 20))
            assert eventually(lambda: source.is_kept_by(keeper))
            source.redirect(None)
            source.overwrite(3)
            source.redirect(keeper, Stamp(3, 8))
            source.compute(20)
            assert eventually(lambda: source.is_kept_by(keeper))
            assert source.replicator.report().sent_blocks == 20
            assert keeper.contents().keys() == source.numbers

    def test_a_broken_connection_is_made_again(self) -> None:
        with serving() as source, keeping() as keeper:
            source.redirect(keeper)
            for breaks in range(3):
                source.compute(*range(10 * breaks + 1, 10 * breaks + 10))
                assert eventually(lambda: source.is_kept_by(keeper))
                source.compute(10 * breaks + 10)
                keeper.cut()

                def greeted_again(known: int = breaks + 1) -> bool:
                    return len(keeper.hellos) > known

                assert eventually(greeted_again)
            assert eventually(lambda: source.is_kept_by(keeper))

    def test_one_that_is_not_there_yet_is_dialled_again(self) -> None:
        class Calls:
            def __init__(self) -> None:
                self.count = 0

            def __call__(self, address: str, hello: ReplicaHello) -> ReplicaChannel:
                self.count += 1
                return connect("127.0.0.1:1" if self.count < 3 else address, TOKEN, hello)

        calls = Calls()
        with serving(dial=calls) as source, keeping() as keeper:
            source.compute(1)
            source.redirect(keeper)
            assert eventually(lambda: source.is_kept_by(keeper))
            assert calls.count == 3

    def test_one_of_another_layout_refuses_and_gets_nothing(self) -> None:
        with serving(width=8) as source, keeping() as keeper:
            source.compute(1)
            source.redirect(keeper)
            assert eventually(lambda: len(keeper.hellos) > 1)
            report = source.replicator.report()
            assert (report.connected, report.lag_blocks, report.sent_blocks) == (False, 1, 0)
            assert keeper.untouched()

    def test_one_with_little_room_gets_the_beginnings(self) -> None:
        with serving() as source, keeping(capacity=5) as keeper:
            source.redirect(keeper)
            seals = source.compute(*range(1, 10))
            assert eventually(lambda: source.replicator.report().refused_blocks == 4)
            assert keeper.contents().keys() == {seal.number for seal in seals[:5]}
            report = source.replicator.report()
            assert (report.stored_blocks, report.lag_blocks) == (5, 0)

    def test_what_it_gave_up_is_offered_again_when_there_is_room(self) -> None:
        with serving() as source, keeping() as keeper:
            source.redirect(keeper)
            source.compute(1, 2)
            assert eventually(lambda: source.is_kept_by(keeper))
            keeper.drop(2)
            source.compute(3)
            assert eventually(lambda: source.replicator.report().refused_blocks == 1)
            assert eventually(lambda: source.is_kept_by(keeper))


class Corrupting:
    """A channel that changes one bit of the first batch."""

    def __init__(self, address: str, hello: ReplicaHello) -> None:
        self._channel = connect(address, TOKEN, hello)
        self._sent = 0
        self.welcome = self._channel.welcome
        self.close = self._channel.close

    def send(
        self,
        seals: Sequence[Seal],
        checksums: Sequence[int],
        void: Sequence[int],
        ended: Sequence[int],
        content: memoryview,
    ) -> None:
        if not self._sent:
            content[5] ^= 1
        self._sent += 1
        self._channel.send(seals, checksums, void, ended, content)

    def receive(self) -> ReplicasKept:
        return self._channel.receive()


class TestIntegrity:
    def test_a_changed_bit_is_noticed_and_the_block_sent_again(self) -> None:
        with serving(dial=Corrupting) as source, keeping() as keeper:
            source.compute(1, 2)
            source.redirect(keeper)
            assert eventually(lambda: source.is_kept_by(keeper))
            report = source.replicator.report()
            assert (report.corrupt_blocks, report.stored_blocks) == (1, 2)

    def test_without_looking_at_checksums_it_would_be_stored(self) -> None:
        """The control: the bit was changed."""
        with serving(dial=Corrupting) as source, keeping(verify=False) as keeper:
            seals = source.compute(1, 2)
            source.redirect(keeper)
            assert eventually(lambda: source.replicator.report().stored_blocks == 2)
            contents = keeper.contents()
            assert contents[seals[0].number] != source.truth[seals[0].number]
            assert contents[seals[1].number] == source.truth[seals[1].number]


@pytest.mark.parametrize("seed", range(8))
def test_under_random_traffic_no_number_ever_names_other_content(seed: int) -> None:
    """Blocks large enough for a copy to take as long as a step here, so that many are overwritten within."""
    rng = random.Random(seed)
    with (
        serving(width=1 << 12, linger_seconds=rng.choice([0.0, 0.002])) as source,
        keeping(capacity=rng.choice([20, 40]), width=1 << 12) as first,
        keeping(width=1 << 12) as second,
    ):
        keeper = first
        source.redirect(keeper)
        for owner in range(150):
            blocks = rng.sample(range(1, 40), rng.randint(1, 6))
            match rng.choice(["compute"] * 6 + ["overwrite"] * 4 + ["end", "cut", "redirect", "drop"]):
                case "compute":
                    source.compute(*blocks, owner=owner)
                case "overwrite":
                    source.overwrite(*blocks)
                case "end":
                    source.replicator.offer([], [rng.randrange(owner + 1)])
                case "cut":
                    keeper.cut()
                case "redirect":
                    keeper = rng.choice([first, second])
                    source.redirect(keeper)
                case "drop":
                    keeper.drop(rng.randrange(1, 40))
            if owner % 10 == 0:
                assert_true(source, [first, second])
        source.redirect(second)
        assert eventually(
            lambda: source.replicator.report().lag_blocks == 0 and whole(source) <= second.contents().keys()
        )
        assert_true(source, [first, second])


def assert_true(source: Source, keepers: Sequence[Keeper]) -> None:
    for keeper in keepers:
        for number, content in keeper.contents().items():
            assert content == source.truth[number]


def whole(source: Source) -> set[int]:
    """Numbers of sealed blocks of which all before them are sealed, too."""
    found: set[int] = set()
    for seal in sorted(source.sealed.values(), key=lambda seal: seal.number):
        if not seal.parent or seal.parent in found:
            found.add(seal.number)
    return found
