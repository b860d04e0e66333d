"""Accepts connections, and lets only those through that prove the token.

Every connection has its own thread, first to authenticate and then to serve, so that a silent or hostile peer holds up
nobody. Strangers cost little: at most `MAX_UNAUTHENTICATED` of them at once. Beyond that the oldest has to go, because
an honest peer needs a round trip for its proof while a stranger may sit there for seconds.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from resilientllm_worker.transport.address import format_address
from resilientllm_worker.transport.auth import authenticate_listener
from resilientllm_worker.transport.connection import PEER_TIMEOUT_SECONDS, Connection
from resilientllm_worker.transport.errors import AuthenticationError, ConnectionClosed, ProtocolError
from resilientllm_worker.transport.frame import Limits

logger = logging.getLogger(__name__)

MAX_UNAUTHENTICATED = 64
_JOIN_SECONDS = 10.0
_RETRY_SECONDS = 0.1


class Listener:
    """Serves ``host:port`` from construction to `close`.

    ``serve`` gets every authenticated connection, in a thread of its own. When it returns or raises, the connection is
    closed. Whatever becomes of one connection, the others and the listener go on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        token: bytes,
        serve: Callable[[Connection], None],
        limits: Limits | None = None,
        peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
    ) -> None:
        """``host`` is an IP address, ``::`` for all of both families; port 0 takes a free one.

        Raises:
            OSError: the address cannot be bound.
            ValueError: the token is empty.
        """
        if not token:
            raise ValueError("the shared token is empty: anyone could prove that")
        self._token = token
        self._serve = serve
        self._limits = limits
        self._peer_timeout_seconds = peer_timeout_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._strangers: dict[threading.Thread, socket.socket] = {}
        """Not authenticated yet, oldest first."""
        self._connections: dict[threading.Thread, Connection] = {}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        self._socket = socket.create_server((host, port), family=family, backlog=128, dualstack_ipv6=both)
        self.address = format_address(host, self._socket.getsockname()[1])
        """``host:port``, with the port that was really bound."""
        self._acceptor = threading.Thread(target=self._accept, name=f"accept {self.address}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Stops to accept, closes all connections, and waits for their threads (up to 10 s in all). Idempotent."""
        with self._lock:
            self._closed = True
            threads = [self._acceptor, *self._strangers, *self._connections]
            connections = list(self._connections.values())
            for sock in (self._socket, *self._strangers.values()):
                _shut_down(sock)
        for connection in connections:
            connection.close()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, address = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                # Out of descriptors, or the peer was gone before we came: neither is a reason to stop listening.
                logger.warning("%s could not accept a connection: %s", self.address, error)
                time.sleep(_RETRY_SECONDS)
                continue
            peer = format_address(*address[:2])
            if not self._start(sock, peer):
                sock.close()

    def _start(self, sock: socket.socket, peer: str) -> bool:
        thread = threading.Thread(target=self._run, args=(sock, peer), name=f"connection {peer}", daemon=True)
        with self._lock:
            if self._closed:
                return False
            if len(self._strangers) >= MAX_UNAUTHENTICATED:
                _shut_down(self._strangers.pop(next(iter(self._strangers))))
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads for us
                logger.warning("refused %s: %s", peer, error)
                return False
            self._strangers[thread] = sock
            return True

    def _run(self, sock: socket.socket, peer: str) -> None:
        """One connection's life, and the one line that the log says of its end."""
        thread = threading.current_thread()
        try:
            connection = self._admit(sock, peer, thread)
        except (AuthenticationError, ConnectionClosed, OSError) as error:
            logger.warning("refused %s: %s", peer, error)
            return
        finally:
            with self._lock:
                self._strangers.pop(thread, None)
        try:
            self._serve(connection)
        except ConnectionClosed as error:
            logger.info("connection ended: %s", error)
        except ProtocolError as error:
            logger.warning("closed a connection: %s", error)
        except Exception:
            logger.exception("closed the connection to %s: serving it failed", peer)
        finally:
            connection.close()
            with self._lock:
                del self._connections[thread]

    def _admit(self, sock: socket.socket, peer: str, thread: threading.Thread) -> Connection:
        """Authenticates; the socket does not outlive a failure."""
        try:
            authenticate_listener(sock, self._token)
            connection = Connection(sock, peer, self._limits, self._peer_timeout_seconds)
        except BaseException:
            with self._lock:  # once out of the table, nobody else touches the socket
                self._strangers.pop(thread, None)
            sock.close()
            raise
        with self._lock:
            self._connections[thread] = connection
            closed = self._closed
        if closed:
            connection.close()
        return connection


def _shut_down(sock: socket.socket) -> None:
    """Wakes the thread that is blocked in ``sock``; that thread closes it."""
    with contextlib.suppress(OSError):  # it is already gone
        sock.shutdown(socket.SHUT_RDWR)
