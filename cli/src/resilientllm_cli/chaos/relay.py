"""In the path to one stage: passes everything as it comes, but for one frame that it is told to spoil.

Which connection is which, its first message says: nothing on the wire is encrypted.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from resilientllm_cli.chaos.network import Network

RELAY_PORT = 7900
CHUNK_BYTES = 64 << 10
HELLOS = {b"EngineHello": "commands", b"LinkHello": "link", b"ReplicaHello": "replicas", b"WeightsHello": "weights"}


@dataclass(frozen=True)
class Spoil:
    """What to do to the next bytes that go this way."""

    carries: str
    """One of the values of `HELLOS`."""
    inbound: bool
    """Towards the stage; else from it."""
    truncate: bool
    """The first of them only, and then the end of the connection. Else one byte is another."""
    at: float
    """Where, as a fraction of their number."""


class Relay:
    def __init__(self, network: Network, host: str, target: str) -> None:
        address, _, port = target.rpartition(":")
        self._target = address, int(port)
        self._network, self._host = network, host
        self._lock = threading.Lock()
        self._spoil: Spoil | None = None
        self._done = threading.Event()
        self._evidence: dict[str, object] = {}
        self._all: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._listener = self._network.inside(self._host, lambda: socket.create_server(("0.0.0.0", RELAY_PORT)))
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            _shut_down(self._all)

    def spoil(self, spoil: Spoil, timeout_seconds: float) -> dict[str, object]:
        """Returns the evidence when it was done. Raises TimeoutError if nothing came that way."""
        self._done.clear()
        with self._lock:
            self._spoil = spoil
        try:
            if not self._done.wait(timeout_seconds):
                raise TimeoutError(f"nothing came that could be spoilt: {spoil}")
        finally:
            with self._lock:
                self._spoil = None
        return self._evidence

    def _accept(self) -> None:
        while True:
            try:
                dialer, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(dialer,), daemon=True).start()

    def _carry(self, dialer: socket.socket) -> None:
        with contextlib.suppress(OSError), dialer:
            listener = self._network.inside(self._host, lambda: socket.create_connection(self._target))
            with listener:
                ends = {dialer, listener}
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._all |= ends
                carries: list[str] = []
                back = threading.Thread(target=self._copy, args=(listener, dialer, carries, False), daemon=True)
                back.start()
                try:
                    self._copy(dialer, listener, carries, True)
                finally:
                    _shut_down(ends)
                    back.join()
                    with self._lock:
                        self._all -= ends

    def _copy(self, source: socket.socket, sink: socket.socket, carries: list[str], inbound: bool) -> None:
        beginning = b""
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if inbound and not carries:
                    beginning += data
                    carries += [what for hello, what in HELLOS.items() if hello in beginning]
                elif carries and (spoil := self._claim(carries[0], inbound)) is not None:
                    sink.sendall(self._spoilt(data, spoil))
                    if spoil.truncate:
                        break
                    continue
                sink.sendall(data)
        _shut_down([source, sink])

    def _claim(self, carries: str, inbound: bool) -> Spoil | None:
        with self._lock:
            spoil = self._spoil
            if spoil is None or (spoil.carries, spoil.inbound) != (carries, inbound):
                return None
            self._spoil = None
            return spoil

    def _spoilt(self, data: bytes, spoil: Spoil) -> bytes:
        place = min(int(spoil.at * len(data)), len(data) - 1)
        if spoil.truncate:
            spoilt = data[:place]
            self._evidence = {"truncated": spoil.carries, "bytes": len(data), "passed": len(spoilt)}
        else:
            spoilt = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
            self._evidence = {"corrupted": spoil.carries, "bytes": len(data), "at": place}
        self._evidence["way"] = "to the stage" if spoil.inbound else "from the stage"
        self._done.set()
        return spoilt


def _shut_down(sockets: Iterable[socket.socket]) -> None:
    for each in tuple(sockets):
        with contextlib.suppress(OSError):  # it is already gone
            each.shutdown(socket.SHUT_RDWR)
