"""Reads frames from a stream socket: small ones in one or two system calls, tensors straight to where they belong."""

from __future__ import annotations

import socket

from resilientllm_worker.protocol.messages import Message
from resilientllm_worker.transport.errors import ConnectionClosed, ProtocolError
from resilientllm_worker.transport.frame import (
    HEADER_BYTES,
    Header,
    Limits,
    check_body,
    check_content,
    check_message,
    decode_message,
)

_BUFFER_BYTES = 64 << 10


class FrameReader:
    """The receiving half of a connection; for one thread at a time.

    After any error but a timeout the position in the stream is lost, and the connection is of no more use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = 0
        self._end = 0

    def read_message(self, sock: socket.socket) -> tuple[Message, Header]:
        """The next message, and the header that says what its body is, which is still to be read.

        Raises:
            ConnectionClosed: the stream ended.
            CorruptFrame: header or message are not as they were sent.
            ProtocolError: header, message or announced body break the rules or the limits.
            OSError: the stream broke.
        """
        self._fill(sock, HEADER_BYTES)
        header = Header.unpack(self._buffer[self._start : self._start + HEADER_BYTES])
        message_bytes = header.message_bytes
        if message_bytes > self._limits.message_bytes:
            raise ProtocolError(
                f"a message of {message_bytes} bytes is above the limit of {self._limits.message_bytes}"
            )
        self._start += HEADER_BYTES
        if message_bytes <= _BUFFER_BYTES:
            self._fill(sock, message_bytes)
            end = self._start + message_bytes
            data: memoryview | bytearray = self._buffer[self._start : end]
            self._start = end
        else:
            data = self._gather(sock, message_bytes)
        check_message(data, header)
        message = decode_message(data)
        check_body(message, header.body_bytes, self._limits)
        return message, header

    def read_body(self, sock: socket.socket, message: Message, header: Header, views: list[memoryview]) -> None:
        """Fills ``views`` one after the other. They must be byte views that together have the length of the body.

        Raises:
            CorruptFrame: they are filled with something else than was sent.
            ConnectionClosed, OSError: as `read_message`.
        """
        self._fill_views(sock, views)
        check_content(message, views, header)

    def _fill_views(self, sock: socket.socket, views: list[memoryview]) -> None:
        for view in views:
            filled = self._take(view)
            while filled < len(view):
                received = sock.recv_into(view[filled:], 0, socket.MSG_WAITALL)
                if not received:
                    raise ConnectionClosed("the peer closed the connection within a tensor")
                filled += received

    def _fill(self, sock: socket.socket, count: int) -> None:
        """Has at least ``count`` bytes in the buffer, contiguous from ``_start``."""
        if self._end - self._start >= count:
            return
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start + count > _BUFFER_BYTES:
            self._buffer[: self._end - self._start] = bytes(self._buffer[self._start : self._end])
            self._start, self._end = 0, self._end - self._start
        while self._end - self._start < count:
            received = sock.recv_into(self._buffer[self._end :])
            if not received:
                within = " within a frame" if self._end > self._start or count != HEADER_BYTES else ""
                raise ConnectionClosed(f"the peer closed the connection{within}")
            self._end += received

    def _gather(self, sock: socket.socket, count: int) -> bytearray:
        """A message larger than the buffer. Memory is taken as bytes arrive: a length alone costs us nothing."""
        gathered = bytearray(self._buffer[self._start : self._end])
        self._start = self._end = 0
        while len(gathered) < count:
            start = len(gathered)
            step = min(count - start, max(start, _BUFFER_BYTES))
            gathered += bytes(step)
            self._fill_views(sock, [memoryview(gathered)[start:]])
        return gathered

    def _take(self, view: memoryview) -> int:
        """Moves what the buffer holds of ``view``."""
        count = min(len(view), self._end - self._start)
        if count:
            view[:count] = self._buffer[self._start : self._start + count]
            self._start += count
        return count
