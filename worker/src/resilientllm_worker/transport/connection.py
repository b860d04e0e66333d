"""One authenticated connection: whole messages in both directions, from and to any thread."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from resilientllm_worker.protocol.messages import Activation, Message, Replicas, Weights
from resilientllm_worker.transport.address import parse_address
from resilientllm_worker.transport.auth import DEADLINE_SECONDS, authenticate_dialer
from resilientllm_worker.transport.errors import (
    AuthenticationError,
    ConnectionClosed,
    ConnectionFailed,
    PeerTimedOut,
    ProtocolError,
)
from resilientllm_worker.transport.frame import Limits, WithBody, drop_sent, encode_frame
from resilientllm_worker.transport.reader import FrameReader
from resilientllm_worker.transport.shared_socket import SharedSocket

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Connection", "ConnectionClosed", "ConnectionFailed", "Limits", "ProtocolError", "dial"]

PEER_TIMEOUT_SECONDS = 5.0
"""After this long without a sign of the peer's host, the kernel breaks the connection.

Linux also counts time in which a living peer does not read and its window is full. A receiver therefore has to read on
while it is busy: one that is slower to take a tensor than this loses its link.
"""

_MAX_PARTS = 1024  # IOV_MAX
# struct tcp_info of linux/tcp.h, which only ever grows at its end.
_TCPI_BYTES_RECEIVED = slice(128, 136)
_TCP_INFO_BYTES = 136

_Described = TypeVar("_Described", Activation, Replicas, Weights)
_Counted = TypeVar("_Counted", Replicas, Weights)


class Connection:
    """Frames over a socket that has been authenticated. Takes the socket over.

    Any number of threads may send; one at a time may receive; any may close. After an error the connection is closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        limits: Limits | None = None,
        peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
    ) -> None:
        self.peer = peer
        """Who is at the other end, for logs."""
        self._limits = limits or Limits()
        _configure(sock, peer_timeout_seconds)
        self._socket = SharedSocket(sock, peer)
        self._sending = threading.Lock()
        self._reader = FrameReader(self._limits)
        self._timed_out = False

    @property
    def closed(self) -> bool:
        return self._socket.closed

    @property
    def received_bytes(self) -> int:
        """What the kernel has received of the stream, whether it was read or not; 0 once the connection is closed."""
        try:
            with self._socket as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except (ConnectionClosed, OSError):
            return 0
        return int.from_bytes(info[_TCPI_BYTES_RECEIVED], sys.byteorder)

    def allow_silence(self, peer_timeout_seconds: float) -> None:
        """From now on the kernel breaks the connection after so long without a sign of the peer's host."""
        with contextlib.suppress(ConnectionClosed), self._socket as sock:
            _set_peer_timeout(sock, peer_timeout_seconds)

    def send(self, message: Message, buffers: Sequence[Buffer] = ()) -> None:
        """Sends a whole frame; waits while the peer is slower than we.

        Raises:
            ConnectionClosed: it could not be sent, or only in part.
            ProtocolError: the frame breaks the limits, or its buffers are not what the message announces. Nothing was
                sent, and the connection is as before.
        """
        self.send_parts(self.encode(message, buffers))

    def tell(self, message: Message) -> bool:
        """Sends what nobody waits for here. False if the peer has gone, which whoever receives from it notices."""
        try:
            self.send(message)
        except ConnectionClosed:
            return False
        return True

    def encode(self, message: Message, buffers: Sequence[Buffer] = ()) -> list[memoryview]:
        """The frame that `send` would send, for `send_parts` and `send_some`. It refers to the buffers."""
        return encode_frame(message, buffers, self._limits)

    def send_parts(self, parts: list[memoryview]) -> None:
        """Sends and consumes ``parts``, one or more frames or the rest of one."""
        with self._sending, self._socket as sock:
            try:
                while parts:
                    drop_sent(parts, sock.sendmsg(parts[:_MAX_PARTS]))
            except OSError as error:
                raise self._broken(error) from error

    def send_some(self, parts: list[memoryview]) -> bool:
        """Sends what the socket takes at once, and leaves the rest in ``parts``; true if all went.

        Does not try again while the peer drains: the time is that of one copy into the kernel's buffer. The rest must
        go before anything else does, so this is for a caller that alone sends here.
        """
        with self._sending, self._socket as sock:
            try:
                drop_sent(parts, sock.sendmsg(parts[:_MAX_PARTS], (), socket.MSG_DONTWAIT))
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._broken(error) from error
        return not parts

    def receive(self) -> Message:
        """The next message that has no body.

        Raises:
            ConnectionClosed: the peer closed, `close` was called, or the network failed.
            ProtocolError: the frame breaks the rules, or has a body. The connection is now closed.
            CorruptFrame: it did not arrive as it was sent; a `ProtocolError` too.
        """
        with self._socket as sock:
            try:
                message, _ = self._reader.read_message(sock)
            except (ConnectionClosed, ProtocolError, OSError) as error:
                raise self._broken(error) from error
            if isinstance(message, WithBody):
                self.close()
                raise ProtocolError(f"{self.peer} sent {type(message).__name__} where only commands belong")
            return message

    def receive_into(self, allocate: Callable[[Activation], list[memoryview]]) -> Activation:
        """The next activation of a link, its tensors read into the memory that ``allocate`` gives.

        ``allocate`` returns one writable, contiguous view for every tensor, of exactly its ``nbytes``. Their sum is
        within the limits, but whether ``nbytes`` agrees with dtype and shape is for ``allocate`` to check. If it
        raises, the connection is closed and the error goes on to the caller.

        Raises:
            ConnectionClosed, ProtocolError: as `receive` does; here any other message breaks the rules.
        """

        def views(header: Activation) -> list[memoryview]:
            given = allocate(header)
            found, expected = [view.nbytes for view in given], [tensor.nbytes for tensor in header.tensors]
            if found != expected:
                raise ValueError(f"expected memory of {expected} bytes for the tensors, found {found}")
            return given

        return self._receive_body(Activation, views)

    def receive_replicas(self, allocate: Callable[[Replicas], memoryview]) -> Replicas:
        """The next batch of a replica channel, its content read into the memory that ``allocate`` gives.

        ``allocate`` returns one writable, contiguous view of exactly ``body_bytes``, which are within the limits. If it
        raises, the connection is closed and the error goes on to the caller.

        Raises:
            ConnectionClosed, ProtocolError: as `receive` does; here any other message breaks the rules.
        """

        return self._receive_counted(Replicas, allocate)

    def receive_weights(self, allocate: Callable[[Weights], memoryview]) -> Weights:
        """The next run of a twin's weights, read into the memory that ``allocate`` gives; as `receive_replicas`."""
        return self._receive_counted(Weights, allocate)

    def _receive_counted(self, kind: type[_Counted], allocate: Callable[[_Counted], memoryview]) -> _Counted:
        def views(header: _Counted) -> list[memoryview]:
            given = allocate(header)
            if given.nbytes != header.body_bytes:
                raise ValueError(f"expected memory of {header.body_bytes} bytes, found {given.nbytes}")
            return [given]

        return self._receive_body(kind, views)

    def _receive_body(self, kind: type[_Described], allocate: Callable[[_Described], list[memoryview]]) -> _Described:
        with self._socket as sock:
            try:
                message, header = self._reader.read_message(sock)
                if not isinstance(message, kind):
                    raise ProtocolError(f"expected {kind.__name__}, found {type(message).__name__}")
                views = [view.cast("B") for view in allocate(message) if view.nbytes]
                self._reader.read_body(sock, message, header, views)
            except (ConnectionClosed, ProtocolError, OSError) as error:
                raise self._broken(error) from error
            except BaseException:
                self.close()
                raise
            return message

    def hand_over(self, to: socket.socket, note: bytes) -> None:
        """Gives the stream to another process, over the Unix socket ``to``, with ``note`` as its message.

        The peer must have nothing more to say: what was received ahead stays here. `close` ends the stream for both.

        Raises:
            ConnectionClosed: this connection is closed.
            OSError: nobody takes it at the other end of ``to``.
        """
        with self._socket as sock:
            socket.send_fds(to, [note], [sock.fileno()])

    def close(self) -> None:
        """Ends all sending and receiving with `ConnectionClosed`. From any thread, any number of times."""
        self._socket.close()

    def _broken(self, error: Exception) -> ConnectionClosed | ProtocolError:
        """Closes, and says why under the peer's name."""
        ours = self.closed
        self._timed_out |= isinstance(error, OSError) and error.errno == errno.ETIMEDOUT
        self.close()
        if isinstance(error, ProtocolError):
            return type(error)(f"{self.peer}: {error}")
        # The first to touch the socket is told, be it who sends or who receives.
        kind = PeerTimedOut if self._timed_out else ConnectionClosed
        return kind(f"the connection to {self.peer} is closed" if ours else f"{self.peer}: {error}")


def dial(
    address: str,
    token: bytes,
    timeout_seconds: float,
    limits: Limits | None = None,
    peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
) -> Connection:
    """Connects to the listener at ``host:port`` and authenticates both ways.

    Raises:
        ConnectionFailed: nobody answered within ``timeout_seconds``, or the peer did not prove the token; the cause
            is then an `AuthenticationError`.
        ValueError: the address has no host or port.
    """
    host_port = parse_address(address)
    try:
        sock = socket.create_connection(host_port, timeout_seconds)
    except OSError as error:
        raise ConnectionFailed(
            f"expected a listener at {address} within {timeout_seconds:g} s, found: {error}"
        ) from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        authenticate_dialer(sock, token, min(timeout_seconds, DEADLINE_SECONDS))
        return Connection(sock, address, limits, peer_timeout_seconds)
    except AuthenticationError as error:
        sock.close()
        raise ConnectionFailed(f"could not authenticate with {address}: {error}") from error
    except BaseException:
        sock.close()
        raise


def _configure(sock: socket.socket, peer_timeout_seconds: float) -> None:
    """Small frames leave at once, and a host that vanished is noticed whether we wait for it or send to it."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _set_peer_timeout(sock, peer_timeout_seconds)


def _set_peer_timeout(sock: socket.socket, peer_timeout_seconds: float) -> None:
    probe_seconds = max(1, round(peer_timeout_seconds / 5))
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_seconds),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(peer_timeout_seconds * 1000)),
    ):
        sock.setsockopt(level, option, value)
