"""``host:port`` as text, with IPv6 hosts in brackets."""

from __future__ import annotations


def parse_address(address: str) -> tuple[str, int]:
    """Splits ``host:port`` or ``[v6]:port``.

    Raises:
        ValueError: there is no host, or no port within 1..65535.
    """
    host, separator, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"expected host:port or [v6]:port, found {address!r}: an IPv6 host needs brackets")
    if not (separator and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"expected host:port with a port within 1..65535, found {address!r}")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
