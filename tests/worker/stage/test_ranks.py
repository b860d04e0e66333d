"""The ranks of a stage hear the same orders in the same order, and when one of them ends, all end."""

from __future__ import annotations

import logging
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, WeightsHello
from resilientllm_worker.stage import ranks
from resilientllm_worker.stage.model import KVNeeds, Model
from resilientllm_worker.stage.ranks import Allocate, Followers, LeadingModel, Order, RankGone, ReportNeeds, Run, follow
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.weights.taker import take

from tests.worker.stage.builders import (
    BLOCK_SIZE,
    GROUPS,
    HOME_BLOCKS,
    MALFORMED,
    PATIENCE_SECONDS,
    POOL_BLOCKS,
    FakeModel,
    a_step,
)
from tests.worker.transport.builders import TOKEN, InThread, listening
from tests.worker.weights.builders import DIGEST, ByteWeights

INIT_METHOD = "file:///tmp/of:this:stage"
ALLOCATE = Allocate("LBHNC", HOME_BLOCKS, POOL_BLOCKS, GROUPS)

FOLLOWER = """
import socket, sys
rank, descriptor, handed_over, init_method = sys.argv[-1].removeprefix("--follow=").split(":", 3)
sock = socket.socket(fileno=int(descriptor))
with sock.makefile("rb") as orders:
    heard = 0
    while length := orders.read(8):
        order = orders.read(int.from_bytes(length, "big"))
        heard += 1
        if b"Run" not in order:
            answer = f"{rank} of {init_method} heard {heard}".encode()
            sock.sendall(len(answer).to_bytes(8, "big") + answer)
"""
"""Another rank as a process that needs no torch: it counts, and answers what is answered."""

STUCK = "import signal; signal.pause()"


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> queue.SimpleQueue[int]:
    """The exit codes that this process would have ended with."""
    codes: queue.SimpleQueue[int] = queue.SimpleQueue()
    monkeypatch.setattr(os, "_exit", codes.put)
    return codes


def test_every_rank_hears_every_order_and_answers_in_order_of_rank(exits: queue.SimpleQueue[int]) -> None:
    with closing(Followers(python(FOLLOWER), 3, INIT_METHOD)) as followers:
        assert len({os.getpid(), *followers.pids}) == 3
        followers.tell(ReportNeeds())
        assert followers.answers() == [f"{rank} of {INIT_METHOD} heard 1".encode() for rank in (1, 2)]
        for number in range(5):
            followers.tell(Run(a_step(number, epoch=1)))
        followers.tell(ALLOCATE)
        assert followers.answers() == [f"{rank} of {INIT_METHOD} heard 7".encode() for rank in (1, 2)]
    assert exits.empty()


@pytest.mark.parametrize(
    ("program", "code"), [("import sys; sys.exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 1)], ids=["3", "kill"]
)
def test_when_a_rank_ends_the_stage_ends(program: str, code: int, exits: queue.SimpleQueue[int]) -> None:
    with closing(Followers(python(program), 2, INIT_METHOD)) as followers:
        assert exits.get(timeout=PATIENCE_SECONDS) == code
        with pytest.raises(RankGone):
            while True:  # The first frames may still fit into the socket of one that has just gone.
                followers.tell(ReportNeeds())
                followers.answers()


def test_a_rank_that_refused_its_configuration_has_the_last_word(
    exits: queue.SimpleQueue[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), closing(Followers(python("import sys; sys.exit(2)"), 2, INIT_METHOD)):
        assert exits.get(timeout=PATIENCE_SECONDS) == 2
    assert caplog.text == ""


def test_a_rank_that_does_not_end_is_ended(exits: queue.SimpleQueue[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STOP_SECONDS", 0.1)
    followers = Followers(python(STUCK), 2, INIT_METHOD)
    followers.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in followers.pids)
    assert exits.empty()


class Following:
    """`follow` in a thread, and rank 0's end of its socket."""

    def __init__(self) -> None:
        self.model = FakeModel(stage=1, has_kv=False)
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(PATIENCE_SECONDS)
        self._thread = threading.Thread(target=follow, args=(self.model, theirs), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.ours.close()
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "it ends when rank 0 has gone"


@pytest.fixture
def following() -> Iterator[Following]:
    with closing(Following()) as it:
        yield it


def framed(order: Order) -> bytes:
    frame = msgspec.msgpack.encode(order)
    return len(frame).to_bytes(8) + frame


def answer(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as answers:
        return answers.read(int.from_bytes(answers.read(8)))


def test_a_follower_does_as_it_is_told(following: Following) -> None:
    following.ours.sendall(framed(ReportNeeds()))
    assert msgspec.msgpack.decode(answer(following.ours), type=KVNeeds) == following.model.kv_needs()
    following.ours.sendall(framed(ALLOCATE))
    assert answer(following.ours) == b""
    assert following.model.kv is not None
    assert (following.model.kv.home_blocks, following.model.kv.pool_blocks) == (HOME_BLOCKS, POOL_BLOCKS)
    assert following.model.kv.block_size == BLOCK_SIZE
    long = a_step(7, epoch=3, zero_block_ids=list(range(200_000)))  # far more than a socket's buffer
    following.ours.sendall(framed(Run(long)))
    assert following.model.ran.get(timeout=PATIENCE_SECONDS) == long
    assert following.model.inbound == [None], "hidden states come from rank 0, over the stage's own collectives"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=20))
def test_orders_arrive_whole_however_they_are_cut(cuts: list[int]) -> None:
    steps = [a_step(number, epoch=1) for number in range(4)]
    left = b"".join(framed(Run(step)) for step in steps)
    with closing(Following()) as following:
        for cut in cuts:
            following.ours.sendall(left[:cut])
            left = left[cut:]
        following.ours.sendall(left)
        assert [following.model.ran.get(timeout=PATIENCE_SECONDS) for _ in steps] == steps


def test_a_step_that_no_rank_can_read_is_left_to_rank_0_to_answer(following: Following) -> None:
    following.ours.sendall(framed(Run(a_step(0, epoch=1, params=MALFORMED))) + framed(Run(a_step(1, epoch=1))))
    assert following.model.ran.get(timeout=PATIENCE_SECONDS).step == 1
    assert [step.step for step in following.model.steps] == [1]


def test_an_order_that_breaks_off_is_not_followed(following: Following) -> None:
    following.ours.sendall(framed(Run(a_step(0, epoch=1)))[:-1])
    following.close()
    assert following.model.steps == []


class Book:
    """Stands in for `Followers`: keeps what was told, and what rank 0 itself did, in one order."""

    def __init__(self) -> None:
        self.entries: list[object] = []

    def tell(self, order: Order) -> None:
        self.entries.append(order)

    def answers(self) -> list[bytes]:
        self.entries.append("answers")
        return [msgspec.msgpack.encode(KVNeeds([("layer", b"of rank 1")], [], 1, []))]


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def leading(book: Book, monkeypatch: pytest.MonkeyPatch) -> LeadingModel:
    """Rank 0 whose own work is a `FakeModel`'s, written into the book."""
    fake = FakeModel(stage=1, has_kv=False)

    def construct(self: Model, config: object, stage: int, rank: int) -> None:
        self.kv = None

    def own(name: str) -> Any:
        def method(self: Model, *args: Any) -> Any:
            book.entries.append(name)
            result = getattr(fake, name)(*args)
            self.kv = fake.kv
            return result

        return method

    monkeypatch.setattr(Model, "__init__", construct)
    for name in ("kv_needs", "allocate", "run"):
        monkeypatch.setattr(Model, name, own(name))
    return LeadingModel(None, 1, book)  # type: ignore[arg-type]


def test_rank_0_tells_the_others_before_it_does_a_thing_itself(leading: LeadingModel, book: Book) -> None:
    step = a_step(0, epoch=1)
    leading.run(step, None, None)
    assert book.entries == [Run(step), "run"]


def test_needs_are_those_of_all_ranks_in_order(leading: LeadingModel, book: Book) -> None:
    needs = leading.kv_needs_of_ranks()
    assert [spec for need in needs for spec in need.specs] == [("layer", b"spec"), ("layer", b"of rank 1")]
    assert book.entries == [ReportNeeds(), "kv_needs", "answers"]


def test_the_cache_is_allocated_on_all_ranks_once(leading: LeadingModel, book: Book) -> None:
    """Warming up runs collectives, so the others must be at it while rank 0 is; and a second order changes nothing."""
    first = leading.allocate("LBHNC", HOME_BLOCKS, POOL_BLOCKS, GROUPS)
    assert book.entries == [ALLOCATE, "allocate", "answers"]
    assert leading.allocate("LBHNC", HOME_BLOCKS, POOL_BLOCKS, GROUPS) == first
    assert book.entries == [ALLOCATE, "allocate", "answers", "allocate"]


def test_what_follow_says_is_read_again() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        handed_over = os.memfd_create("not a socket yet")
        os.dup2(theirs.fileno(), handed_over)
        rank, orders, second, init_method = ranks.parse_follow(f"3:{theirs.detach()}:{handed_over}:{INIT_METHOD}")
        with orders, second:
            ours.sendall(b"xy")
            assert (rank, orders.recv(1), second.recv(1), init_method) == (3, b"x", b"y", INIT_METHOD)


GIVING = """
import signal, socket, sys
from resilientllm_worker.weights.giver import give
from resilientllm_worker.weights.hand_over import serve_handed_over
from tests.worker.weights.builders import DIGEST, ByteWeights
rank, _, handed_over, _ = sys.argv[-1].removeprefix("--follow=").split(":", 3)
memory = ByteWeights([1000, 70], content_seed=int(rank))
handed_over = socket.socket(fileno=int(handed_over))
serve_handed_over(handed_over, lambda connection, hello: give(connection, hello, DIGEST, memory))
signal.pause()
"""
"""A rank that lends weights, of which its number is the seed."""


def test_a_twin_gets_the_weights_of_the_rank_of_its_number(exits: queue.SimpleQueue[int]) -> None:
    """Rank 0 has the connection, and the other rank answers on it; several times, and several at once."""
    with closing(Followers([sys.executable, "-c", GIVING], 3, INIT_METHOD)) as followers:

        def serve(connection: Connection) -> None:
            hello = connection.receive()
            assert isinstance(hello, WeightsHello)
            assert hello.rank in followers.ranks
            followers.give(connection, hello)

        with listening(serve) as listener:
            for rank in (1, 2, 1):
                targets = [ByteWeights([1000, 70]) for _ in range(2)]
                hello = WeightsHello(PROTOCOL_VERSION, 1, rank, DIGEST)
                for each in [InThread(partial(take, [listener.address], TOKEN, hello, target)) for target in targets]:
                    each.result()
                expected = ByteWeights([1000, 70], content_seed=rank).content
                assert [target.content for target in targets] == [expected, expected]
    assert exits.empty()


LEAD_AND_WAIT = """
import os, signal
from resilientllm_worker.stage.ranks import end_with_parent
if os.fork() == 0:
    end_with_parent()
    print(os.getpid(), flush=True)
signal.pause()
"""


def test_a_rank_that_is_stuck_ends_with_rank_0() -> None:
    """Inside a collective it reads no socket: the kernel has to do it."""
    with subprocess.Popen([sys.executable, "-c", LEAD_AND_WAIT], stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        stuck = os.pidfd_open(int(leader.stdout.readline()))
        try:
            leader.kill()
            assert select.select([stuck], [], [], PATIENCE_SECONDS)[0], "rank 0 has gone, and the other is still there"
        finally:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(stuck, signal.SIGKILL)
            os.close(stuck)
