"""A socket that one thread may close while others are blocked in it.

Closing a descriptor under a blocked thread does not wake that thread, and lets the kernel give the number to the next
connection, which the thread would then read. So `SharedSocket.close` shuts the stream down, which wakes everyone, and
the last one out closes the descriptor.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from resilientllm_worker.transport.errors import ConnectionClosed


class SharedSocket:
    """``with shared as sock:`` lends the socket; it stays open until the block is left."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self._sock = sock
        self._peer = peer
        self._lock = threading.Lock()
        self._inside = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> socket.socket:
        """Raises `ConnectionClosed` once `close` was called."""
        with self._lock:
            if self._closed:
                raise ConnectionClosed(f"the connection to {self._peer} is closed")
            self._inside += 1
        return self._sock

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            last = self._closed and not self._inside
        if last:
            self._sock.close()

    def close(self) -> None:
        """Wakes all who are inside, and admits no more. May be called from anywhere, any number of times."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            idle = not self._inside
            with contextlib.suppress(OSError):  # the peer was faster
                self._sock.shutdown(socket.SHUT_RDWR)
        if idle:
            self._sock.close()
