"""How a connection can fail. Callers tell a peer that is gone from one that must not be trusted."""

from __future__ import annotations


class TransportError(Exception):
    """Base of all that this package raises on account of a peer or the network."""


class AuthenticationError(TransportError):
    """The peer did not prove that it knows the token, in time and in our protocol."""


class ConnectionFailed(TransportError):
    """No authenticated connection could be made."""


class ConnectionClosed(TransportError):
    """The connection is gone: closed by either side, or broken."""


class PeerTimedOut(ConnectionClosed):
    """The peer's host has acknowledged nothing for the peer timeout, whatever its processes do."""


class ProtocolError(TransportError):
    """A frame broke the rules. What follows it cannot be found, so a receiver also closes the connection."""


class CorruptFrame(ProtocolError):
    """What arrived is not what was sent: a loss like any other, whatever it says."""


class LinkClosed(TransportError):
    """The link was closed or broke before all that was posted had gone out."""
