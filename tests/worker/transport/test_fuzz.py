"""Arbitrary bytes never raise anything but our own errors, and never stop the listener."""

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import (
    Activation,
    Array,
    CachedRequests,
    Grammar,
    KVDescription,
    Logprobs,
    Message,
    NewRequest,
    Step,
    StepResult,
)
from resilientllm_worker.transport.connection import Connection, ConnectionClosed, ProtocolError, dial
from resilientllm_worker.transport.errors import CorruptFrame, TransportError
from resilientllm_worker.transport.frame import HEADER_BYTES, Limits, decode_message, encode_frame
from resilientllm_worker.transport.listener import Listener

from tests.worker.transport.builders import (
    STAMP,
    TOKEN,
    InThread,
    a_frame,
    a_step,
    allocate,
    an_activation,
    half_connected,
    listening,
    received,
)

_ARRAY = Array("float32", (1, 2), bytes(8))
_LOGPROBS = Logprobs(_ARRAY, _ARRAY, _ARRAY, [0, 1])
RICH: list[Message] = [
    a_step(3),
    Step(
        STAMP,
        1,
        [NewRequest("a", [1, 2], [1, 2, 3], b"\x80", ([1, 2], [0]), 2)],
        CachedRequests(["b"], [[5]], [([7], [])], [9], [1]),
        [("a", 1), ("b", 1)],
        ["c"],
        ["d"],
        [7],
        [(1, 7)],
        Grammar(["b"], bytes(8), 2),
    ),
    StepResult(STAMP, 1, ["a"], [[5]], _LOGPROBS, [("a", _LOGPROBS)], [("a", 0)]),
    KVDescription(1, [[("layer.0", b"\x01")]], [["LBNHC"]], [1 << 40], ["generate"]),
    an_activation(3, 4),
]
FRAMES = [
    b"".join(encode_frame(message, [b"xyz", b"1234"] if message is RICH[-1] else (), Limits())) for message in RICH
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid frame of which some bytes were changed, dropped or added."""
    frame = bytearray(draw(st.sampled_from(FRAMES)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(frame) - 1))
        match draw(st.sampled_from(["change", "drop", "add"])):
            case "change":
                frame[place] = draw(st.integers(0, 255))
            case "drop" if len(frame) > 1:
                del frame[place]
            case _:
                frame.insert(place, draw(st.integers(0, 255)))
    return bytes(frame)


@given(data=st.binary(max_size=200) | mutated().map(lambda frame: frame[HEADER_BYTES:]))
@settings(max_examples=500)
def test_decoding_yields_a_message_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode_message(memoryview(data))


@st.composite
def forged(draw: st.DrawFn) -> bytes:
    """Not corrupt, and still no frame of ours: a peer that breaks the rules."""
    message, body = draw(mutated())[HEADER_BYTES:], draw(st.binary(max_size=20))
    return a_frame(message, draw(st.sampled_from([len(body), 0, 7]))) + body


@given(data=st.binary(max_size=200) | mutated() | forged())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("kind", ["command", "link"])
def test_a_connection_yields_messages_until_one_of_our_errors(kind: str, data: bytes) -> None:
    with half_connected(limits=Limits(message_bytes=10_000, body_bytes=10_000)) as (connection, peer):
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises(TransportError):
            while True:
                if kind == "command":
                    connection.receive()
                else:
                    connection.receive_into(allocate)


@given(number=st.integers(0, len(FRAMES) - 1), place=st.floats(0, 1, exclude_max=True), flipped=st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_frame_of_which_one_byte_is_another_is_corrupt(number: int, place: float, flipped: int) -> None:
    """Wherever that is: in the header, the message or the hidden states."""
    frame = bytearray(FRAMES[number])
    frame[int(place * len(frame))] ^= flipped
    with half_connected() as (connection, peer):
        peer.sendall(bytes(frame) + bytes(4096))
        with pytest.raises(CorruptFrame):
            receive(connection, RICH[number])
        assert connection.closed


@given(number=st.integers(0, len(FRAMES) - 1), place=st.floats(0, 1, exclude_max=True), lost=st.integers(1, 40))
@settings(max_examples=300, deadline=None)
def test_a_frame_of_which_bytes_are_lost_is_never_taken_for_a_whole_one(number: int, place: float, lost: int) -> None:
    frame, at = FRAMES[number], int(place * len(FRAMES[number]))
    stream = frame[:at] + frame[at + lost :] + FRAMES[0]
    assume(not stream.startswith(frame))  # what follows may begin with just the bytes that were lost
    with half_connected() as (connection, peer):
        peer.sendall(stream)
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises((CorruptFrame, ConnectionClosed)):
            receive(connection, RICH[number])


def receive(connection: Connection, message: Message) -> object:
    if isinstance(message, Activation):
        return connection.receive_into(allocate)
    return connection.receive()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with listening() as serving:
        yield serving


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_listener_serves_on_whatever_strangers_send(listener: Listener, data: bytes, seed: int) -> None:
    host, port = listener.address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=5) as stranger:
        greeting = b"RLLM" + (2).to_bytes(2, "big") if random.Random(seed).random() < 0.5 else b""
        stranger.sendall(greeting + data)
    assert_serves(listener)


@given(data=st.binary(max_size=200) | mutated() | forged())
@settings(max_examples=60, deadline=None)
def test_the_listener_serves_on_whatever_authenticated_peers_send(listener: Listener, data: bytes) -> None:
    connection = dial(listener.address, TOKEN, 5)
    with contextlib.suppress(ConnectionClosed):
        connection.send_parts([memoryview(data)] if data else [])
    connection.close()
    assert_serves(listener)


def assert_serves(listener: Listener) -> None:
    connection = dial(listener.address, TOKEN, 5)
    connection.send(a_step())
    assert received(connection) == a_step()
    connection.close()


def test_a_reader_that_waits_sees_each_prefix_of_a_stream_as_unfinished() -> None:
    stream = FRAMES[1] + FRAMES[2]
    for end in range(0, len(stream), 7):
        with half_connected() as (connection, peer):
            peer.sendall(stream[:end])
            peer.close()
            whole = sum(end >= edge for edge in (len(FRAMES[1]), len(stream)))
            for place in range(whole):
                assert InThread(connection.receive).result() == RICH[1 + place]
            with pytest.raises(ConnectionClosed):
                InThread(connection.receive).result()
