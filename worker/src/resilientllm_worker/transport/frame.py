"""What goes over a connection: header, message in msgpack, and the memory that some messages describe.

TCP's own checksum has 16 bits, and hosts and switches make errors where it does not look. So nothing is believed before
its checksum was compared, and the header first: with one wrong length we would wait for bytes that never come.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import xxhash

from resilientllm_worker.protocol.messages import Activation, Message, Replicas, Weights
from resilientllm_worker.transport.errors import CorruptFrame, ProtocolError

if TYPE_CHECKING:
    from typing_extensions import Buffer

_FIELDS = struct.Struct("!IQQQ")
_CHECK = struct.Struct("!I")
HEADER_BYTES = _FIELDS.size + _CHECK.size

WithBody = Activation | Replicas | Weights
"""Memory follows these; nothing follows any other message."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_NO_HEADER = bytes(HEADER_BYTES)


class Header(NamedTuple):
    """All checksums are XXH3. The header's own are 32 bits, of all that is before it."""

    message_bytes: int
    body_bytes: int
    message_checksum: int
    body_checksum: int = 0
    """Of hidden states. Blocks and weights have checksums of their own, in the message, which say which part is bad."""

    def pack(self) -> bytes:
        fields = _FIELDS.pack(*self)
        return fields + _CHECK.pack(_short(fields))

    @classmethod
    def unpack(cls, data: memoryview) -> Header:
        """Raises `CorruptFrame` unless these ``HEADER_BYTES`` are as they were packed."""
        (check,) = _CHECK.unpack_from(data, _FIELDS.size)
        if check != _short(data[: _FIELDS.size]):
            raise CorruptFrame("a header arrived corrupt, or what came is no frame of ours")
        return cls(*_FIELDS.unpack_from(data))


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
    message_bytes = len(frame) - HEADER_BYTES
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
    body_checksum = checksum(parts[1:]) if isinstance(message, Activation) else 0
    frame[:HEADER_BYTES] = Header(message_bytes, body_bytes, checksum([parts[0][HEADER_BYTES:]]), body_checksum).pack()
    return parts


def checksum(parts: Sequence[Buffer]) -> int:
    """Of ``parts`` as if they were one."""
    if len(parts) == 1:
        return xxhash.xxh3_64_intdigest(parts[0])
    whole = xxhash.xxh3_64()
    for part in parts:
        whole.update(part)
    return whole.intdigest()


def _short(data: Buffer) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFF_FFFF


def check_message(data: bytearray | memoryview, header: Header) -> None:
    """Raises `CorruptFrame` unless ``data`` is the message that was sent."""
    if checksum([data]) != header.message_checksum:
        raise CorruptFrame(f"a message of {header.message_bytes} bytes arrived corrupt")


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


def check_content(message: Message, body: Sequence[memoryview], header: Header) -> None:
    """Raises `CorruptFrame` unless the hidden states in ``body`` are those that were sent."""
    if isinstance(message, Activation) and checksum(body) != header.body_checksum:
        raise CorruptFrame(f"hidden states of {header.body_bytes} bytes arrived corrupt")


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
