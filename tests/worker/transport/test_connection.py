"""Messages and tensors arrive as they were sent, and whatever breaks ends in one of our own errors."""

import socket
import time
import tracemalloc
from collections.abc import Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import Activation, Failed, LinkHello, Message, Stamp, Step, TensorHeader
from resilientllm_worker.transport.connection import (
    Connection,
    ConnectionClosed,
    ConnectionFailed,
    Limits,
    ProtocolError,
    dial,
)
from resilientllm_worker.transport.errors import AuthenticationError, PeerTimedOut
from resilientllm_worker.transport.frame import HEADER_BYTES

from tests.worker.transport.builders import (
    STAMP,
    TOKEN,
    InThread,
    a_frame,
    a_step,
    allocate,
    an_activation,
    connected,
    half_connected,
    listening,
    received,
)

LARGE = Failed(1, "x" * (1 << 20))


def send_all(connection: Connection, messages: Sequence[Message]) -> None:
    for message in messages:
        connection.send(message)


class TestCommands:
    def test_arrive_in_order(self) -> None:
        with connected() as (near, far):
            sent = [a_step(requests, step=requests) for requests in range(20)]
            for message in sent:
                near.send(message)
            assert [received(far) for _ in sent] == sent

    def test_larger_than_every_buffer_arrive_whole_and_leave_the_next_one_alone(self) -> None:
        large, small = Failed(1, "x" * (5 << 20)), Failed(2, "")
        with connected() as (near, far):
            sending = InThread(lambda: send_all(near, [large, small, large]))
            assert [received(far) for _ in range(3)] == [large, small, large]
            sending.result()

    @settings(max_examples=30, deadline=None)
    @given(sizes=st.lists(st.integers(0, 200_000), max_size=6))
    def test_of_any_size_keep_their_borders(self, sizes: list[int]) -> None:
        sent = [Failed(place, "x" * size) for place, size in enumerate(sizes)]
        with connected() as (near, far):
            sending = InThread(lambda: send_all(near, sent))
            assert [received(far) for _ in sent] == sent
            sending.result()

    def test_are_counted_by_the_byte_before_they_are_whole(self) -> None:
        with half_connected() as (connection, peer):
            frame = b"".join(connection.encode(Failed(1, "x" * 1000)))
            before = connection.received_bytes
            peer.sendall(frame[:100])
            while connection.received_bytes < before + 100:
                """On its way."""
            assert connection.received_bytes == before + 100
            reading = InThread(connection.receive)
            peer.sendall(frame[100:])
            reading.result()
            assert connection.received_bytes == before + len(frame)
            connection.close()
            assert connection.received_bytes == 0

    def test_may_come_in_single_bytes(self) -> None:
        with half_connected() as (connection, peer):
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            frame = b"".join(connection.encode(a_step()))
            reading = InThread(connection.receive)
            for byte in frame:
                peer.sendall(bytes([byte]))
            assert reading.result() == a_step()

    def test_of_many_threads_do_not_mix(self) -> None:
        with connected() as (near, far):
            writers = [
                InThread(partial(send_all, near, [Failed(writer, "x" * (n * 997)) for n in range(50)]))
                for writer in range(8)
            ]
            found = [received(far) for _ in range(8 * 50)]
            for sending in writers:
                sending.result()
        for writer in range(8):
            mine = [m.reason for m in found if isinstance(m, Failed) and m.call == writer]
            assert mine == ["x" * (n * 997) for n in range(50)]


class TestActivations:
    def test_land_in_the_memory_that_the_receiver_gives(self) -> None:
        hidden, residual = bytes(range(256)) * 4000, b"r" * 300
        landed: list[memoryview] = []

        def give(activation: Activation) -> list[memoryview]:
            landed.extend(allocate(activation))
            return landed

        header = an_activation(len(hidden), 0, len(residual))
        with connected() as (near, far):
            sending = InThread(lambda: near.send(header, [hidden, b"", bytearray(residual)]))
            assert InThread(lambda: far.receive_into(give)).result() == header
            sending.result()
        assert [bytes(view) for view in landed] == [hidden, b"", residual]

    @settings(max_examples=30, deadline=None)
    @given(frames=st.lists(st.lists(st.integers(0, 150_000), max_size=4), max_size=4))
    def test_of_any_size_keep_their_borders(self, frames: list[list[int]]) -> None:
        headers = [an_activation(*sizes, step=place) for place, sizes in enumerate(frames)]
        bodies = [[bytes([place]) * size for place, size in enumerate(sizes)] for sizes in frames]
        landed: list[list[memoryview]] = []

        def give(activation: Activation) -> list[memoryview]:
            landed.append(allocate(activation))
            return landed[-1]

        def send(connection: Connection) -> None:
            for header, body in zip(headers, bodies, strict=True):
                connection.send(header, body)

        with connected() as (near, far):
            sending = InThread(lambda: send(near))
            for header in headers:
                assert InThread(lambda: far.receive_into(give)).result() == header
            sending.result()
        assert [[bytes(view) for view in views] for views in landed] == bodies

    def test_take_views_of_other_item_sizes(self) -> None:
        import numpy as np

        tensor = np.arange(12, dtype=np.float32).reshape(3, 4)
        landed = np.zeros((3, 4), dtype=np.float32)
        header = Activation(STAMP, 1, [TensorHeader("h", "float32", (3, 4), tensor.nbytes)])
        with connected() as (near, far):
            near.send(header, [tensor.data])
            InThread(lambda: far.receive_into(lambda _: [landed.data])).result()
        assert (landed == tensor).all()

    def test_may_be_of_more_tensors_than_one_system_call_takes(self) -> None:
        header = an_activation(*[1] * 3000)
        with connected() as (near, far):
            near.send(header, [b"x"] * 3000)
            assert InThread(lambda: far.receive_into(allocate)).result() == header

    def test_of_other_memory_than_announced_are_not_sent_and_harm_nothing(self) -> None:
        with connected() as (near, far):
            with pytest.raises(ProtocolError, match="announces a body of 8 bytes, found 7"):
                near.send(an_activation(8), [bytes(7)])
            with pytest.raises(ProtocolError, match="body of 0 bytes, found 1"):
                near.send(a_step(), [b"x"])
            with pytest.raises(ValueError, match="not contiguous"):
                near.send(an_activation(4), [memoryview(bytes(8))[::2]])
            near.send(a_step())
            assert received(far) == a_step()

    def test_close_the_connection_when_no_memory_is_given_for_them(self) -> None:
        class NoRoom(Exception):
            pass

        def refuse(_: Activation) -> list[memoryview]:
            raise NoRoom

        with connected() as (near, far):
            near.send(an_activation(8), [bytes(8)])
            with pytest.raises(NoRoom):
                far.receive_into(refuse)
            assert far.closed

    def test_are_not_written_beyond_the_memory_given(self) -> None:
        with connected() as (near, far):
            near.send(an_activation(8, 8), [bytes(8), bytes(8)])
            with pytest.raises(ValueError, match=r"expected memory of \[8, 8\] bytes for the tensors, found \[8, 9\]"):
                far.receive_into(lambda _: [memoryview(bytearray(8)), memoryview(bytearray(9))])
            assert far.closed


class TestBrokenRules:
    """A peer that breaks them is cut off, before it costs memory."""

    def raises(self, frame: bytes, match: str, **limits: int) -> None:
        with half_connected(limits=Limits(**limits)) as (connection, peer):
            peer.sendall(frame)
            with pytest.raises(ProtocolError, match=match):
                InThread(connection.receive).result()
            with pytest.raises(ConnectionClosed):
                connection.send(a_step())

    def test_a_message_above_the_limit(self) -> None:
        self.raises(a_frame(b"", message_bytes=1001), "1001 bytes is above the limit of 1000", message_bytes=1000)

    def test_a_body_that_the_message_does_not_announce(self) -> None:
        with half_connected() as (connection, _):
            message = b"".join(connection.encode(a_step()))[HEADER_BYTES:]
        self.raises(a_frame(message, 5), "announces a body of 0 bytes, found 5")

    def test_a_body_above_the_limit_although_announced(self) -> None:
        with half_connected() as (connection, _):
            message = b"".join(connection.encode(an_activation(300), [bytes(300)]))[HEADER_BYTES:-300]
        self.raises(a_frame(message, 300), "300 bytes is above the limit of 299", body_bytes=299)

    def test_tensors_of_negative_size(self) -> None:
        with half_connected() as (connection, _):
            message = b"".join(connection.encode(an_activation(0, 0), []))[HEADER_BYTES:]
        message = message.replace(b"\x91\x00\x00", b"\x91\x00\xff", 1)  # shape (0,), nbytes 0 -> -1
        self.raises(a_frame(message), "claims -1 bytes")

    def test_an_activation_on_a_command_channel(self) -> None:
        with half_connected() as (connection, _):
            frame = b"".join(connection.encode(an_activation(1), [b"x"]))
        self.raises(frame, "Activation where only commands belong")

    def test_a_command_on_a_link(self) -> None:
        with connected() as (near, far):
            near.send(a_step())
            with pytest.raises(ProtocolError, match="expected Activation, found Step"):
                far.receive_into(allocate)

    @pytest.mark.parametrize(
        "message",
        [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x92\xa4Step\x01", b"\x92\xa7Unknown\x01", b"\x91\xa9Heartbeat"],
    )
    def test_something_that_is_no_message(self, message: bytes) -> None:
        self.raises(a_frame(message), "not a message of our protocol")

    def test_text_that_is_no_text(self) -> None:
        message = b"\x92\xacStageFailing\xa2\xff\xfe"
        self.raises(a_frame(message), "not a message of our protocol")

    def test_nesting_without_end(self) -> None:
        message = b"\x91" * 100_000
        self.raises(a_frame(message), "not a message of our protocol")

    def test_the_length_of_a_message_that_never_comes_takes_no_memory(self) -> None:
        with half_connected() as (connection, peer):
            tracemalloc.start()
            try:
                reading = InThread(connection.receive)
                peer.sendall(a_frame(bytes(100_000), message_bytes=60 << 20))
                time.sleep(0.2)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert reading.running
            assert peak < 2 << 20

    def test_a_sender_does_not_break_the_limit_either(self) -> None:
        with connected(limits=Limits(message_bytes=1000)) as (near, far):
            with pytest.raises(ProtocolError, match="cannot send a Failed of"):
                near.send(Failed(1, "x" * 1000))
            near.send(Failed(2, ""))
            assert received(far) == Failed(2, "")


class TestTheEnd:
    def test_wakes_a_reader_and_a_writer_that_wait(self) -> None:
        with connected() as (near, _):
            reading = InThread(near.receive)
            writing = InThread(lambda: near.send(an_activation(64 << 20), [bytes(64 << 20)]))
            time.sleep(0.2)
            assert reading.running and writing.running
            near.close()
            for waiting in (reading, writing):
                with pytest.raises(ConnectionClosed, match="the connection to far is closed"):
                    waiting.result()

    def test_can_come_from_many_threads_and_any_number_of_times(self) -> None:
        with connected() as (near, far):
            reading = InThread(far.receive)
            for closing in [InThread(near.close) for _ in range(8)]:
                closing.result()
            near.close()
            with pytest.raises(ConnectionClosed, match="near: the peer closed the connection"):
                reading.result()

    def test_can_come_from_within_a_receive(self) -> None:
        with connected() as (near, far):
            near.send(an_activation(4), [bytes(4)])

            def give(activation: Activation) -> list[memoryview]:
                far.close()
                return allocate(activation)

            with pytest.raises(ConnectionClosed):
                InThread(lambda: far.receive_into(give)).result()
                far.receive_into(allocate)

    def test_in_the_middle_of_a_frame_is_told_apart(self) -> None:
        with half_connected() as (connection, peer):
            peer.sendall(a_frame(b"x", message_bytes=100))
            peer.close()
            with pytest.raises(ConnectionClosed, match="within a frame"):
                connection.receive()
        with half_connected() as (connection, peer):
            peer.sendall(b"".join(connection.encode(an_activation(1000), [bytes(1000)]))[:-1])
            peer.close()
            with pytest.raises(ConnectionClosed, match="within a tensor"):
                connection.receive_into(allocate)

    def test_by_the_peer_is_seen_by_a_sender(self) -> None:
        with half_connected() as (connection, peer):
            peer.close()
            with pytest.raises(ConnectionClosed, match="far: "):
                for _ in range(100):
                    connection.send(a_step())
                    time.sleep(0.001)

    def test_leaves_what_was_sent_before_readable(self) -> None:
        with connected() as (near, far):
            near.send(a_step())
            near.close()
            assert received(far) == a_step()
            with pytest.raises(ConnectionClosed):
                far.receive()

    def test_does_not_give_the_descriptor_away_under_a_reader(self) -> None:
        """The kernel hands out the lowest free number: it must not be the one that a thread still reads."""
        with connected() as (near, _):
            sock = near._socket._sock
            with near._socket:
                near.close()
                assert sock.fileno() >= 0
            assert sock.fileno() == -1


def test_a_peer_host_that_vanishes_is_noticed_within_about_five_seconds() -> None:
    with connected() as (near, _):
        tcp = {
            name: near._socket._sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
            for name in ("TCP_NODELAY", "TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT")
        }
        assert near._socket._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert tcp["TCP_NODELAY"]
    assert tcp["TCP_USER_TIMEOUT"] == 5000
    assert tcp["TCP_KEEPIDLE"] + tcp["TCP_KEEPINTVL"] * tcp["TCP_KEEPCNT"] == 5


class TestAPeerThatAcknowledgesNothing:
    """As Linux takes one that does not read, once its window is full."""

    def test_is_told_from_one_that_closed_to_whoever_sends_and_receives(self) -> None:
        with half_connected(peer_timeout_seconds=0.5) as (connection, _):
            receiving = InThread(connection.receive)
            with pytest.raises(PeerTimedOut):
                send_all(connection, [LARGE] * 40)
            with pytest.raises(PeerTimedOut):
                receiving.result()

    def test_may_be_given_more_time(self) -> None:
        with half_connected(peer_timeout_seconds=600) as (connection, _):
            sending = InThread(lambda: send_all(connection, [LARGE] * 40))
            connection.allow_silence(0.5)
            with pytest.raises(PeerTimedOut):
                sending.result()


class TestDialling:
    def test_gives_a_connection_to_the_listener(self) -> None:
        with listening() as listener:
            connection = dial(listener.address, TOKEN, 2)
            connection.send(a_step())
            assert received(connection) == a_step()
            assert connection.peer == listener.address
            connection.close()

    def test_says_that_nobody_listens(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        with pytest.raises(ConnectionFailed, match=f"expected a listener at 127.0.0.1:{port} within 2 s.*refused"):
            dial(f"127.0.0.1:{port}", TOKEN, 2)

    def test_says_that_the_tokens_differ(self) -> None:
        with listening() as listener, pytest.raises(ConnectionFailed, match="tokens differ") as failure:
            dial(listener.address, b"another", 2)
        assert isinstance(failure.value.__cause__, AuthenticationError)

    def test_gives_up_on_a_listener_that_stays_silent(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            started = time.monotonic()
            with pytest.raises(ConnectionFailed, match="deadline passed"):
                dial(f"127.0.0.1:{server.getsockname()[1]}", TOKEN, 0.3)
            assert time.monotonic() - started < 4

    def test_refuses_an_address_without_port(self) -> None:
        with pytest.raises(ValueError, match="expected host:port"):
            dial("stage-0", TOKEN, 1)


def test_every_message_survives_the_wire() -> None:
    sent: list[Message] = [LinkHello(1, 2, 3, Stamp(4, 5), 6), a_step()]
    with connected() as (near, far):
        for message in sent:
            near.send(message)
            found = received(far)
            assert found == message and type(found) is type(message)
            assert isinstance(found, (LinkHello, Step)) and type(found.stamp) is Stamp
