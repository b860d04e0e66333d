"""A TCP relay in front of a stage that can slow down or cut what carries replicas, and passes all else as it comes.

Which connection is which, its first message says: nothing on the wire is encrypted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType
from typing import Self

CHUNK_BYTES = 16 << 10
"""Also what kernels may hold back in between, or a slow path would not be slow until they are full."""
_REPLICAS, _OTHERS = b"ReplicaHello", (b"EngineHello", b"LinkHello")


class Relay:
    """``bytes_per_second`` and ``cut`` may be set at any time, and are for replicas only."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, CHUNK_BYTES)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes_per_second = float("inf")
        self._lock = threading.Lock()
        self._cut = False
        self._all: set[socket.socket] = set()
        self._replicas: set[socket.socket] = set()
        """The dialers' ends of these connections."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name=f"relay {self.address}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sockets = list(self._all)
        _shut_down(sockets)

    def cut(self) -> int:
        """Break what carries replicas now, and whatever else is to carry any, until `mend`. Returns how many broke."""
        with self._lock:
            self._cut = True
            broken = list(self._replicas)
        _shut_down(broken)
        return len(broken)

    def mend(self) -> None:
        with self._lock:
            self._cut = False

    def _accept(self) -> None:
        while True:
            try:
                dialer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(dialer,), daemon=True).start()

    def _carry(self, dialer: socket.socket) -> None:
        with contextlib.suppress(OSError), dialer:
            listener = socket.create_connection(self._target)
            with listener:
                ends = {dialer, listener}
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._all |= ends
                back = threading.Thread(target=self._copy, args=(listener, dialer), daemon=True)
                back.start()
                try:
                    self._forward(dialer, listener)
                finally:
                    _shut_down(ends)
                    back.join()
                    with self._lock:
                        self._all -= ends
                        self._replicas.discard(dialer)

    def _forward(self, dialer: socket.socket, listener: socket.socket) -> None:
        beginning = b""
        while data := dialer.recv(CHUNK_BYTES):
            beginning += data
            if _REPLICAS in beginning:
                with self._lock:
                    self._replicas.add(dialer)
                    if self._cut:
                        return
                listener.sendall(data)
                self._copy(dialer, listener, shaped=True)
                return
            listener.sendall(data)
            if any(hello in beginning for hello in _OTHERS):
                self._copy(dialer, listener)
                return

    def _copy(self, source: socket.socket, sink: socket.socket, shaped: bool = False) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if shaped:
                    time.sleep(len(data) / self.bytes_per_second)
                sink.sendall(data)
        _shut_down([source, sink])


def _shut_down(sockets: list[socket.socket] | set[socket.socket]) -> None:
    for each in sockets:
        with contextlib.suppress(OSError):  # it is already gone
            each.shutdown(socket.SHUT_RDWR)
