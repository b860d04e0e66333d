"""Proof, over a fresh TCP connection, that both ends know the shared token. The token itself never travels.

    listener -> dialer    greeting: magic, version, listener's nonce
    dialer   -> listener  greeting: magic, version, dialer's nonce; dialer's proof
    listener -> dialer    listener's proof

A proof is HMAC-SHA256 over the role of its maker, the version and both nonces. The role keeps anyone from returning
our own proof to us, the nonces from replaying an old one. The dialer proves first, so a stranger who dials learns
nothing that the token went into. All frames have a fixed size: before the proof there is no length to believe and
nothing to parse.

This says who the peer is, not that nobody listens or meddles later on: privacy of the wire is the network's.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import time

from resilientllm_worker.transport.errors import AuthenticationError

DEADLINE_SECONDS = 5.0
"""For the whole exchange, so that a peer that sends a byte now and then gains nothing."""

_MAGIC = b"RLLM"
_VERSION = 2
"""Of the exchange and of the frames after it; what their messages mean has a version of its own."""
_GREETING = struct.Struct("!4sH32s")
_PROOF_BYTES = hashlib.sha256().digest_size
_DIALER = b"resilientllm dialer"
_LISTENER = b"resilientllm listener"


def authenticate_dialer(sock: socket.socket, token: bytes, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """Proves the token to the listener at the other end of ``sock``, then has it prove the same.

    On return ``sock`` blocks without a timeout, and holds no byte beyond the exchange.

    Raises:
        AuthenticationError: the peer is silent, gone, of another version, or does not know the token. Close ``sock``.
        ValueError: the token is empty.
    """
    exchange = _Exchange(sock, token, deadline_seconds)
    theirs = exchange.receive_greeting()
    ours = _new_greeting()
    exchange.send(ours + exchange.proof(_DIALER, theirs, ours))
    found = exchange.receive(_PROOF_BYTES, "the listener's proof (it closes when the tokens differ)")
    if not hmac.compare_digest(found, exchange.proof(_LISTENER, theirs, ours)):
        raise AuthenticationError("the listener does not know our token")
    sock.settimeout(None)


def authenticate_listener(sock: socket.socket, token: bytes, deadline_seconds: float = DEADLINE_SECONDS) -> None:
    """The other half of `authenticate_dialer`, for the socket that a listener accepted."""
    exchange = _Exchange(sock, token, deadline_seconds)
    ours = _new_greeting()
    exchange.send(ours)
    theirs = exchange.receive_greeting()
    found = exchange.receive(_PROOF_BYTES, "the dialer's proof")
    if not hmac.compare_digest(found, exchange.proof(_DIALER, ours, theirs)):
        raise AuthenticationError("the dialer does not know our token")
    exchange.send(exchange.proof(_LISTENER, ours, theirs))
    sock.settimeout(None)


def _new_greeting() -> bytes:
    return _GREETING.pack(_MAGIC, _VERSION, secrets.token_bytes(32))


class _Exchange:
    """The steps that both roles take, under one deadline."""

    def __init__(self, sock: socket.socket, token: bytes, deadline_seconds: float) -> None:
        if not token:
            raise ValueError("the shared token is empty: anyone could prove that")
        self._sock = sock
        self._token = token
        self._deadline = time.monotonic() + deadline_seconds

    def proof(self, role: bytes, listener_greeting: bytes, dialer_greeting: bytes) -> bytes:
        return hmac.digest(self._token, role + listener_greeting + dialer_greeting, hashlib.sha256)

    def receive_greeting(self) -> bytes:
        greeting = self.receive(_GREETING.size, "a greeting")
        magic, version, _ = _GREETING.unpack(greeting)
        if magic != _MAGIC:
            raise AuthenticationError(f"expected a greeting that starts with {_MAGIC!r}, found {magic!r}")
        if version != _VERSION:
            raise AuthenticationError(f"expected a peer of version {_VERSION}, found version {version}")
        return greeting

    def send(self, data: bytes) -> None:
        self._sock.settimeout(self._remaining_seconds("to send"))
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise AuthenticationError(f"the peer went away during authentication: {error}") from error

    def receive(self, count: int, what: str) -> bytes:
        received = bytearray()
        while len(received) < count:
            self._sock.settimeout(self._remaining_seconds(what))
            try:
                chunk = self._sock.recv(count - len(received))
            except TimeoutError:
                continue
            except OSError as error:
                raise AuthenticationError(f"expected {what}, but the connection broke: {error}") from error
            if not chunk:
                raise AuthenticationError(f"expected {what}, but the peer closed the connection")
            received += chunk
        return bytes(received)

    def _remaining_seconds(self, what: str) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise AuthenticationError(f"expected {what}, but the deadline passed")
        return remaining
