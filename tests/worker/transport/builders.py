"""Messages and sockets, of which a test states only what it is about."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import Queue
from typing import Any

from resilientllm_worker.protocol.messages import Activation, CachedRequests, Message, Stamp, Step, TensorHeader
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.frame import Header, checksum
from resilientllm_worker.transport.listener import Listener

TOKEN = b"a token that both ends know"
STAMP = Stamp(3, 7)
PATIENCE_SECONDS = 20.0
"""For what should take milliseconds, on a machine that is busy with other things."""


def a_step(requests: int = 2, step: int = 1) -> Step:
    """A batch of decoding requests."""
    ids = [f"request-{number}" for number in range(requests)]
    cached = CachedRequests(
        ids, [[number] for number in range(requests)], [None] * requests, [9] * requests, [4] * requests
    )
    return Step(STAMP, step, [], cached, [(request, 1) for request in ids], [], [], [], [], None)


def an_activation(*sizes: int, step: int = 1) -> Activation:
    """An activation of one-dimensional byte tensors."""
    return Activation(STAMP, step, [TensorHeader(f"t{place}", "uint8", (n,), n) for place, n in enumerate(sizes)])


def a_frame(message: bytes, body_bytes: int = 0, message_bytes: int | None = None) -> bytes:
    """A frame that is not corrupt, whatever else is wrong with it, but for its body."""
    announced = len(message) if message_bytes is None else message_bytes
    return Header(announced, body_bytes, checksum([message])).pack() + message


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


@contextlib.contextmanager
def connected(**settings: Any) -> Iterator[tuple[Connection, Connection]]:
    """Two ends of one connection, without authentication."""
    near, far = tcp_pair()
    ends = Connection(near, "far", **settings), Connection(far, "near", **settings)
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


@contextlib.contextmanager
def half_connected(**settings: Any) -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and a bare socket as its peer, to break rules with."""
    near, far = tcp_pair()
    connection = Connection(near, "far", **settings)
    try:
        with far:
            yield connection, far
    finally:
        connection.close()


@contextlib.contextmanager
def listening(serve: Callable[[Connection], None] | None = None, **settings: Any) -> Iterator[Listener]:
    """A listener that echoes commands unless told otherwise."""
    listener = Listener("127.0.0.1", 0, TOKEN, serve or echo, **settings)
    try:
        yield listener
    finally:
        listener.close()


def echo(connection: Connection) -> None:
    while True:
        connection.send(connection.receive())


def allocate(activation: Activation) -> list[memoryview]:
    return [memoryview(bytearray(tensor.nbytes)) for tensor in activation.tensors]


class InThread:
    """Runs ``work`` beside the test, which then asks for its outcome."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._outcome: Queue[tuple[object, BaseException | None]] = Queue()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], object]) -> None:
        try:
            self._outcome.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks
            self._outcome.put((None, error))

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, within_seconds: float = PATIENCE_SECONDS) -> Any:
        value, error = self._outcome.get(timeout=within_seconds)
        if error is not None:
            raise error
        return value


def eventually(condition: Callable[[], bool], within_seconds: float = PATIENCE_SECONDS) -> bool:
    deadline = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def received(connection: Connection) -> Message:
    """The next message, with an end to waiting."""
    message: Message = InThread(connection.receive).result()
    return message
