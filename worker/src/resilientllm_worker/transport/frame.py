"""What goes over a connection: header, message in msgpack, and the memory that some messages describe."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from resilientllm_worker.protocol.messages import Activation, Message, Replicas, Weights
from resilientllm_worker.transport.errors import ProtocolError

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEADER = struct.Struct("!IQ")
"""Bytes of the message, bytes of the body."""

WithBody = Activation | Replicas | Weights
"""Memory follows these; nothing follows any other message."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_NO_HEADER = bytes(HEADER.size)


@dataclass(frozen=True)
class Limits:
    """The largest frame that a connection sends or takes."""

    message_bytes: int = 64 << 20
    body_bytes: int = 1 << 30


def encode_frame(message: Message, buffers: Sequence[Buffer], limits: Limits) -> list[memoryview]:
    """The parts of a frame in order, for scatter-gather. The buffers are referred to, not copied.

    Raises:
        ProtocolError: the frame is above ``limits``, or the buffers are not what the message announces.
        ValueError: a buffer is not contiguous.
    """
    frame = bytearray(_NO_HEADER)
    _encoder.encode_into(message, frame, -1)
    message_bytes = len(frame) - HEADER.size
    parts = [memoryview(frame)]
    body_bytes = 0
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise ValueError(f"cannot send a buffer of shape {view.shape} and strides {view.strides}: not contiguous")
        if view.nbytes:
            parts.append(view.cast("B"))
            body_bytes += view.nbytes
    if message_bytes > limits.message_bytes:
        raise ProtocolError(
            f"cannot send a {type(message).__name__} of {message_bytes} bytes, limit {limits.message_bytes}"
        )
    if body_bytes or isinstance(message, WithBody):
        check_body(message, body_bytes, limits)
    HEADER.pack_into(frame, 0, message_bytes, body_bytes)
    return parts


def decode_message(data: bytearray | memoryview) -> Message:
    """Raises `ProtocolError` if ``data`` is not exactly one message."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise ProtocolError(f"not a message of our protocol: {error}") from error


def check_body(message: Message, body_bytes: int, limits: Limits) -> None:
    """Raises `ProtocolError` unless ``body_bytes`` is what the message announces, and within ``limits``."""
    expected = 0
    if isinstance(message, Activation):
        for tensor in message.tensors:
            if tensor.nbytes < 0:
                raise ProtocolError(f"tensor {tensor.name!r} claims {tensor.nbytes} bytes")
            expected += tensor.nbytes
    elif isinstance(message, Replicas | Weights):
        expected = message.body_bytes
    if body_bytes != expected:
        raise ProtocolError(f"{type(message).__name__} announces a body of {expected} bytes, found {body_bytes}")
    if body_bytes > limits.body_bytes:
        raise ProtocolError(f"a body of {body_bytes} bytes is above the limit of {limits.body_bytes}")


def drop_sent(parts: list[memoryview], sent_bytes: int) -> None:
    """Removes the first ``sent_bytes`` from ``parts``, in place."""
    done = 0
    for part in parts:
        if sent_bytes < len(part):
            break
        sent_bytes -= len(part)
        done += 1
    del parts[:done]
    if sent_bytes:
        parts[0] = parts[0][sent_bytes:]
