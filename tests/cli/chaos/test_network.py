"""What the harness does to a network, seen by two hosts in it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from resilientllm_cli.chaos.network import Network
from resilientllm_cli.chaos.relay import RELAY_PORT, Relay, Spoil

from tests.cli.chaos.enclosed import enclosed, possible

pytestmark = pytest.mark.skipif(not possible(), reason="namespaces of its own are not allowed here")

PORT = 7000
SECONDS = 0.4
HEALED_SECONDS = 10.0
"""A kernel that could not reach a neighbour asks for it again only every second."""


@dataclass
class Stand:
    """``near`` and ``server`` are on one node, ``far`` on another. The server sends back what it gets."""

    network: Network

    def asks(self, host: str, data: bytes = b"hello") -> bytes | None:
        """None: no answer."""
        address = self.network.address("server")

        def ask() -> bytes:
            with socket.create_connection((address, PORT), SECONDS) as connection:
                connection.sendall(data)
                got = b""
                while len(got) < len(data) and (more := connection.recv(1 << 16)):
                    got += more
                return got

        try:
            return self.network.inside(host, ask)
        except OSError:
            return None

    def healed(self, host: str) -> bool:
        deadline = time.monotonic() + HEALED_SECONDS
        while self.asks(host) is None and time.monotonic() < deadline:
            pass
        return self.asks(host) == b"hello"


@contextmanager
def stand() -> Iterator[Stand]:
    network = Network()
    for host, node in (("near", 0), ("server", 0), ("far", 1)):
        network.add(host, node)
    listener = network.inside("server", lambda: socket.create_server((network.address("server"), PORT)))

    def answer(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def serve() -> None:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield Stand(network)


def check_one_way() -> None:
    with stand() as at:
        for sender, receiver in (("far", "server"), ("server", "far")):
            with at.network.dropped(sender, receiver) as packets:
                assert at.asks("far") is None
                assert at.asks("near") == b"hello"
                assert packets() > 0
            assert at.healed("far")


def check_node() -> None:
    with stand() as at:
        with at.network.unplugged(0):
            assert at.asks("far") is None
            assert at.asks("near") == b"hello"
        assert at.healed("far")


def check_slow() -> None:
    with stand() as at, at.network.shaped("far", "server", 8000) as held_up:
        data = b"." * 200_000
        assert at.asks("far", data) == data
        assert held_up() > 0


def check_relay() -> None:
    with stand() as at:
        relay = Relay(at.network, "server", f"{at.network.address('server')}:{PORT}")
        with relay, at.network.redirected("server", PORT, RELAY_PORT):
            assert at.asks("far", b"LinkHello 1") == b"LinkHello 1"
            spoilt: list[bytes | None] = []
            for truncate in (False, True):
                asking = threading.Timer(0.05, lambda: spoilt.append(at.asks("far", b"LinkHello 2")))
                asking.start()
                evidence = relay.spoil(Spoil("link", False, truncate, 0.5), timeout_seconds=5)
                asking.join()
                assert evidence["bytes"] == 11
            changed, cut_short = spoilt
            assert changed is not None and len(changed) == 11 and changed != b"LinkHello 2"
            assert cut_short == b"LinkH"


def check_again() -> None:
    """A socket that is still open somewhere keeps its namespace, but not what the next world needs."""
    network = Network()
    sockets = []
    for _ in range(3):
        for host in range(2):
            network.add(f"host{host}", node=host)
            sockets.append(network.inside(f"host{host}", socket.socket))
        network.remove_all()


@pytest.mark.parametrize(
    "check", [check_one_way, check_node, check_slow, check_relay, check_again], ids=lambda each: each.__name__
)
def test_a_fault_of_the_network_does_what_it_says_and_nothing_else(check: Callable[[], None]) -> None:
    enclosed(check, __file__)
