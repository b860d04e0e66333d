"""Posting never waits for the next stage, and nobody waits for ever for a link that is gone."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Activation, LinkHello
from resilientllm_worker.transport.connection import Connection, ProtocolError
from resilientllm_worker.transport.link import LinkClosed, LinkSender

from tests.worker.transport.builders import (
    PATIENCE_SECONDS,
    STAMP,
    InThread,
    a_step,
    allocate,
    an_activation,
    connected,
    eventually,
    half_connected,
    received,
)

LARGE = 16 << 20
"""More than a socket takes at once."""
BODY = bytes(LARGE)


class Losses:
    """Counts what a link reports."""

    def __init__(self) -> None:
        self.details: list[str] = []

    def __call__(self, detail: str) -> None:
        self.details.append(detail)

    def once(self) -> bool:
        return len(self.details) == 1


@pytest.fixture
def losses() -> Iterator[Losses]:
    yield Losses()


def test_a_small_activation_goes_out_at_once_without_a_writer() -> None:
    with connected() as (near, far):
        near.send(LinkHello(1, 0, 0, STAMP, 0))
        link = LinkSender(near)
        posted = link.post(an_activation(5), [b"small"])
        assert posted.done
        posted.wait()
        assert link._writer is None
        assert isinstance(received(far), LinkHello)
        assert InThread(lambda: far.receive_into(allocate)).result() == an_activation(5)
        link.close()


@settings(max_examples=20, deadline=None)
@given(frames=st.lists(st.lists(st.integers(0, 3 << 20), max_size=3), max_size=6))
def test_activations_arrive_in_order_and_whole(frames: list[list[int]]) -> None:
    landed: list[list[memoryview]] = []

    def give(activation: Activation) -> list[memoryview]:
        landed.append(allocate(activation))
        return landed[-1]

    headers = [an_activation(*sizes, step=place) for place, sizes in enumerate(frames)]
    bodies = [[bytes([place + 1]) * size for size in sizes] for place, sizes in enumerate(frames)]
    with connected() as (near, far):
        link = LinkSender(near)
        posted = [link.post(header, body) for header, body in zip(headers, bodies, strict=True)]
        assert InThread(lambda: [far.receive_into(give) for _ in headers]).result() == headers
        for one in posted:
            one.wait()
        link.close()
    assert [[bytes(view) for view in views] for views in landed] == bodies


class TestAPeerThatDoesNotRead:
    def test_does_not_hold_up_posting(self) -> None:
        with half_connected() as (near, _):
            link = LinkSender(near)
            posting = InThread(lambda: [link.post(an_activation(LARGE, step=step), [BODY]) for step in range(4)])
            posted = posting.result()
            assert not any(one.done for one in posted)
            link.close()

    def test_does_not_hold_up_those_who_wait_once_the_link_is_closed(self, losses: Losses) -> None:
        with half_connected() as (near, _):
            link = LinkSender(near, losses)
            posted = [link.post(an_activation(LARGE, step=step), [BODY]) for step in range(3)]
            waiting = [InThread(one.wait) for one in posted]
            time.sleep(0.1)
            assert all(one.running for one in waiting)
            link.close()
            for one in waiting:
                with pytest.raises(LinkClosed, match="the link was closed"):
                    one.result()
        assert losses.details == []

    def test_frees_the_buffers_when_it_reads_at_last(self) -> None:
        with connected() as (near, far):
            link = LinkSender(near)
            posted = link.post(an_activation(LARGE), [BODY])
            waiting = InThread(posted.wait)
            time.sleep(0.1)
            assert waiting.running
            InThread(lambda: far.receive_into(allocate)).result()
            waiting.result()
            assert posted.done
            link.close()

    def test_costs_its_own_link_only_after_the_peer_timeout(self, losses: Losses) -> None:
        """Linux counts a full window of a living peer like silence: so a receiver has to read while it is busy."""
        with half_connected(peer_timeout_seconds=1.0) as (near, _):
            link = LinkSender(near, losses)
            posted = link.post(an_activation(LARGE), [BODY])
            with pytest.raises(LinkClosed):
                InThread(posted.wait).result(within_seconds=30)
            assert eventually(losses.once)
            link.close()


class TestALinkThatBreaks:
    def test_is_told_once_even_when_nothing_is_sent(self, losses: Losses) -> None:
        with half_connected() as (near, peer):
            link = LinkSender(near, losses)
            peer.close()
            assert eventually(losses.once)
            assert losses.details == ["far: the peer closed the connection"]
            for step in range(3):
                with pytest.raises(LinkClosed):
                    link.post(an_activation(1, step=step), [b"x"]).wait()
            link.close()
        assert len(losses.details) == 1

    def test_is_told_once_however_it_is_noticed(self) -> None:
        for _ in range(20):
            losses = Losses()
            with half_connected() as (near, peer):
                link = LinkSender(near, losses)
                posted = link.post(an_activation(LARGE), [BODY])
                peer.close()
                with pytest.raises(LinkClosed):
                    InThread(posted.wait).result()
                link.post(an_activation(1), [b"x"])
                assert eventually(losses.once)
                link.close()
            assert len(losses.details) == 1

    def test_ends_when_its_receiver_talks_back(self, losses: Losses) -> None:
        with connected() as (near, far):
            link = LinkSender(near, losses)
            far.send(a_step())
            assert eventually(losses.once)
            assert "one direction" in losses.details[0]
            link.close()

    def test_may_be_closed_from_the_report(self) -> None:
        closed = threading.Event()
        links: list[LinkSender] = []

        def on_lost(_: str) -> None:
            links[0].close()
            closed.set()

        with half_connected() as (near, peer):
            links.append(LinkSender(near, on_lost))
            waiting = InThread(links[0].post(an_activation(LARGE), [BODY]).wait)
            peer.close()
            with pytest.raises(LinkClosed):
                waiting.result()
            assert closed.wait(PATIENCE_SECONDS)


def test_a_post_on_a_closed_link_does_not_raise_but_waiting_does() -> None:
    with connected() as (near, _):
        link = LinkSender(near)
        link.close()
        link.close()
        posted = link.post(an_activation(1), [b"x"])
        assert not posted.done
        with pytest.raises(LinkClosed, match="the link was closed"):
            posted.wait()


def test_buffers_that_are_not_what_the_header_says_are_refused_and_harm_nothing() -> None:
    with connected() as (near, far):
        link = LinkSender(near)
        with pytest.raises(ProtocolError, match="announces a body of 4 bytes, found 3"):
            link.post(an_activation(4), [b"xyz"])
        link.post(an_activation(4), [b"xyzw"]).wait()
        assert InThread(lambda: far.receive_into(allocate)).result() == an_activation(4)
        link.close()


def test_closing_leaves_no_thread() -> None:
    with half_connected() as (near, _):
        link = LinkSender(near)
        link.post(an_activation(LARGE), [BODY])
        link.close()
        assert eventually(lambda: not [one for one in threading.enumerate() if one.name.startswith("link")])


def test_closing_does_not_wait_for_a_report_that_wants_the_closer_s_lock() -> None:
    lock, reporting, told = threading.Lock(), threading.Event(), threading.Event()

    def on_lost(_: str) -> None:
        reporting.set()
        with lock:
            told.set()

    with half_connected() as (near, peer):
        link = LinkSender(near, on_lost)
        with lock:
            peer.close()
            assert reporting.wait(PATIENCE_SECONDS)
            InThread(link.close).result()
        assert told.wait(PATIENCE_SECONDS)


def test_closing_while_posting_and_waiting_never_hangs() -> None:
    for delay in range(20):
        with connected() as (near, far):
            link = LinkSender(near)

            def read(end: Connection = far) -> None:
                for _ in range(1000):
                    end.receive_into(allocate)

            def stream(link: LinkSender = link) -> None:
                for step in range(1000):
                    link.post(an_activation(1 << 20, step=step), [BODY[: 1 << 20]]).wait()

            reading = InThread(read)
            streaming = InThread(stream)
            time.sleep(delay / 500)
            link.close()
            for ended in (streaming, reading):
                with pytest.raises(Exception, match=r"closed|did not go out"):
                    ended.result()
