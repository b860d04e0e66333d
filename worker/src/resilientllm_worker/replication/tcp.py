"""Replica channels over the connections that stages and engines use for everything else.

The receiving end needs nothing here: a `Connection` is a `ReplicaInlet`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from resilientllm_worker.protocol.messages import ReplicaHello, Replicas, ReplicasKept, ReplicaWelcome, Seal
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed, ProtocolError

CONNECT_SECONDS = 5.0
WELCOME_SECONDS = 10.0
"""Lists of blocks have to be made for it, by a stage that serves."""
PEER_TIMEOUT_SECONDS = 30.0
"""Longer than that of other connections: a keeper reads when serving leaves it time, and nobody waits for a replica."""


def connect(address: str, token: bytes, hello: ReplicaHello) -> ReplicaSender:
    """Dials the keeper, says hello and waits for its welcome, which may be a refusal.

    Raises:
        ConnectionFailed: nobody proved the token at ``address`` in time, or it is no address.
        ConnectionClosed: there was no welcome in time.
        ProtocolError: there was something else.
    """
    try:
        connection = dial(address, token, CONNECT_SECONDS, peer_timeout_seconds=PEER_TIMEOUT_SECONDS)
    except ValueError as error:
        raise ConnectionFailed(str(error)) from error
    deadline = threading.Timer(WELCOME_SECONDS, connection.close)
    deadline.daemon = True
    deadline.start()
    try:
        connection.send(hello)
        welcome = connection.receive()
        if not isinstance(welcome, ReplicaWelcome):
            raise ProtocolError(f"expected a ReplicaWelcome from {address}, found {type(welcome).__name__}")
    except (ConnectionClosed, ProtocolError):
        connection.close()
        raise
    finally:
        deadline.cancel()
    return ReplicaSender(connection, welcome)


class ReplicaSender:
    """A `ReplicaChannel`. Takes the connection over."""

    def __init__(self, connection: Connection, welcome: ReplicaWelcome) -> None:
        self.welcome = welcome
        self._connection = connection

    def send(
        self,
        seals: Sequence[Seal],
        checksums: Sequence[int],
        void: Sequence[int],
        ended: Sequence[int],
        content: memoryview,
    ) -> None:
        message = Replicas(list(seals), list(checksums), list(void), list(ended), content.nbytes)
        self._connection.send(message, [content])

    def receive(self) -> ReplicasKept:
        kept = self._connection.receive()
        if not isinstance(kept, ReplicasKept):
            self.close()
            raise ProtocolError(f"expected ReplicasKept, found {type(kept).__name__}")
        return kept

    def close(self) -> None:
        self._connection.close()
