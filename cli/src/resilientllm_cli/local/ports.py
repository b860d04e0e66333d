"""Ports that stay ours while the process behind them is dead."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

HOST = "127.0.0.1"
LOWEST = 10_000
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(count: int, candidates: Iterable[int], free: Callable[[int], bool] = is_free) -> list[int]:
    """The first ``count`` free ones, each once."""
    chosen = list(islice(filter(free, candidates), count))
    if len(chosen) < count:
        raise OSError(f"expected {count} free ports, found {len(chosen)}: close programs that listen on {HOST}")
    return chosen


def candidates() -> list[int]:
    """Below the range that the kernel takes for outgoing connections: such a connection could otherwise hold the port
    of a stage that is being restarted. In random order, so that two runs that start together rarely meet."""
    lowest_ephemeral = int(EPHEMERAL_RANGE.read_text().split()[0])
    ports = list(range(LOWEST, max(lowest_ephemeral, LOWEST + 10_000)))
    random.shuffle(ports)
    return ports
