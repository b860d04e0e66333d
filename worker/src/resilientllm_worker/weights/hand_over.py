"""Rank 0 of a stage has its connections, every rank its own weights: each answers the twin's rank of its number.

The other rank is another process of this machine. It gets the stream itself, so that weights pass through no third.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Callable

import msgspec

from resilientllm_worker.protocol.messages import WeightsHello
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.errors import ConnectionClosed

logger = logging.getLogger(__name__)

_HELLO_BYTES = 1 << 16
_hellos = msgspec.msgpack.Decoder(WeightsHello)


def hand_over(connection: Connection, hello: WeightsHello, to: socket.socket) -> None:
    """Has the process at the other end of ``to`` answer ``hello``. Returns when the connection has ended."""
    connection.hand_over(to, msgspec.msgpack.encode(hello))
    with contextlib.suppress(ConnectionClosed):
        connection.receive()  # who takes weights says nothing more


def serve_handed_over(sock: socket.socket, give: Callable[[Connection, WeightsHello], None]) -> None:
    """Serves, each in a thread, the connections that come in over ``sock``, until rank 0 goes. Returns at once."""

    def serve(connection: Connection, hello: WeightsHello) -> None:
        try:
            give(connection, hello)
        except ConnectionClosed as error:
            logger.info("connection ended: %s", error)
        finally:
            connection.close()

    def accept() -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(sock, _HELLO_BYTES, 1)
            if not data:
                return
            hello = _hellos.decode(data)
            connection = Connection(socket.socket(fileno=descriptors[0]), f"rank {hello.rank} of a twin")
            threading.Thread(target=serve, args=(connection, hello), name="weights", daemon=True).start()

    threading.Thread(target=accept, name="handed over", daemon=True).start()
