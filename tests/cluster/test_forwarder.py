"""The forwarder, as a process: what happens to one side of a connection happens to the other."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator

import pytest

from e2e.cluster import launch

TIMEOUT_SECONDS = 20.0


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_SECONDS)
        yield server


@pytest.fixture
def client(target: socket.socket) -> Iterator[socket.socket]:
    """A connection to a forwarder that leads to ``target``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        descriptor = listener.fileno()
        command = launch.module("forwarder", str(descriptor), "127.0.0.1", str(target.getsockname()[1]))
        process = subprocess.Popen(command, env=launch.environment(), pass_fds=[descriptor])
    try:
        with socket.create_connection(address, timeout=TIMEOUT_SECONDS) as connection:
            yield connection
    finally:
        process.kill()
        process.wait()


def test_bytes_go_both_ways(client: socket.socket, target: socket.socket) -> None:
    there, _ = target.accept()
    with there:
        client.sendall(b"question")
        assert there.recv(100) == b"question"
        there.sendall(b"answer")
        assert client.recv(100) == b"answer"


def test_end_of_input_leaves_the_other_direction_open(client: socket.socket, target: socket.socket) -> None:
    there, _ = target.accept()
    with there:
        client.shutdown(socket.SHUT_WR)
        assert there.recv(100) == b""
        there.sendall(b"late answer")
        assert client.recv(100) == b"late answer"


def test_orderly_end_is_seen_as_one(client: socket.socket, target: socket.socket) -> None:
    there, _ = target.accept()
    there.sendall(b"all")
    there.close()

    assert client.recv(100) == b"all"
    assert client.recv(100) == b""


def test_reset_is_seen_as_one(client: socket.socket, target: socket.socket) -> None:
    there, _ = target.accept()
    client.sendall(b"question")
    there.recv(100)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()

    with pytest.raises(ConnectionResetError):
        client.recv(100)


def test_refusing_target_resets_the_client(client: socket.socket, target: socket.socket) -> None:
    there, _ = target.accept()
    there.close()
    address = client.getpeername()
    target.close()

    # The reset may come before the client's own connect has returned.
    with pytest.raises(ConnectionResetError):  # noqa: SIM117
        with socket.create_connection(address, timeout=TIMEOUT_SECONDS) as refused:
            refused.recv(100)
