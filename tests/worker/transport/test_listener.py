"""Whatever knocks, the listener serves on, and says once what it refused."""

import logging
import socket
import threading
import time
from collections.abc import Callable

import pytest
from resilientllm_worker.protocol.messages import Failed
from resilientllm_worker.transport import listener as listener_module
from resilientllm_worker.transport.address import parse_address
from resilientllm_worker.transport.connection import Connection, ConnectionClosed, Limits, dial
from resilientllm_worker.transport.listener import Listener

from tests.worker.transport.builders import (
    PATIENCE_SECONDS,
    TOKEN,
    InThread,
    a_frame,
    a_step,
    echo,
    eventually,
    listening,
    received,
)


def knock(listener: Listener) -> socket.socket:
    return socket.create_connection(parse_address(listener.address), timeout=5)


def serves(listener: Listener) -> bool:
    connection = dial(listener.address, TOKEN, 5)
    connection.send(a_step())
    try:
        return received(connection) == a_step()
    finally:
        connection.close()


def closed_by_peer(sock: socket.socket) -> bool:
    sock.settimeout(5)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def garbage(listener: Listener) -> None:
    with knock(listener) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10)
        assert closed_by_peer(sock)


def wrong_token(listener: Listener) -> None:
    with pytest.raises(Exception, match="tokens differ"):
        dial(listener.address, b"another", 5)


def gone_at_once(listener: Listener) -> None:
    knock(listener).close()


def reflection(listener: Listener) -> None:
    with knock(listener) as sock:
        sock.sendall(sock.recv(38) + bytes(32))
        assert closed_by_peer(sock)


def oversized(listener: Listener) -> None:
    connection = dial(listener.address, TOKEN, 5)
    connection.send_parts([memoryview(a_frame(b"", message_bytes=(64 << 20) + 1))])
    with pytest.raises(ConnectionClosed):
        InThread(connection.receive).result()


def no_message(listener: Listener) -> None:
    connection = dial(listener.address, TOKEN, 5)
    connection.send_parts([memoryview(a_frame(b"\xc1\xc1\xc1"))])
    with pytest.raises(ConnectionClosed):
        InThread(connection.receive).result()


@pytest.mark.parametrize("attack", [garbage, wrong_token, gone_at_once, reflection, oversized, no_message])
def test_a_bad_peer_costs_one_line_in_the_log_and_nobody_else(
    attack: Callable[[Listener], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with listening() as listener:
        bystander = dial(listener.address, TOKEN, 5)
        attack(listener)
        assert eventually(lambda: len(caplog.records) == 1)
        bystander.send(a_step())
        assert received(bystander) == a_step()
        assert serves(listener)
        bystander.close()
    assert len(caplog.records) == 1, [record.getMessage() for record in caplog.records]


def test_silent_strangers_are_bounded_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "MAX_UNAUTHENTICATED", 4)
    with listening() as listener:
        strangers = [knock(listener) for _ in range(20)]
        assert serves(listener)
        assert closed_by_peer(strangers[0])
        assert eventually(lambda: sum(t.name.startswith("connection") for t in threading.enumerate()) <= 4)
        for stranger in strangers:
            stranger.close()


def test_an_error_in_serving_ends_that_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    def serve(connection: Connection) -> None:
        message = connection.receive()
        if isinstance(message, Failed):
            raise RuntimeError("cannot serve this")
        connection.send(message)

    with listening(serve) as listener:
        connection = dial(listener.address, TOKEN, 5)
        connection.send(Failed(1, ""))
        with pytest.raises(ConnectionClosed):
            InThread(connection.receive).result()
        assert serves(listener)
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.levelno == logging.ERROR and record.exc_info


def test_a_connection_ends_when_serving_returns() -> None:
    with listening(lambda connection: None) as listener:
        connection = dial(listener.address, TOKEN, 5)
        with pytest.raises(ConnectionClosed):
            InThread(connection.receive).result()


def test_connections_can_have_limits_of_their_own() -> None:
    with listening(limits=Limits(message_bytes=10)) as listener:
        connection = dial(listener.address, TOKEN, 5)
        connection.send(a_step())
        with pytest.raises(ConnectionClosed):
            InThread(connection.receive).result()


class TestClosing:
    def test_ends_all_connections_and_threads(self) -> None:
        listener = Listener("127.0.0.1", 0, TOKEN, echo)
        authenticated, stranger = dial(listener.address, TOKEN, 5), knock(listener)
        assert eventually(lambda: sum(t.name.startswith("connection") for t in threading.enumerate()) == 2)
        started = time.monotonic()
        listener.close()
        assert time.monotonic() - started < 8
        with pytest.raises(ConnectionClosed):
            InThread(authenticated.receive).result()
        assert closed_by_peer(stranger)
        assert not [t for t in threading.enumerate() if t.name.startswith(("connection", "accept"))]
        with pytest.raises(ConnectionRefusedError):
            knock(listener)
        listener.close()

    def test_frees_the_port_for_a_successor(self) -> None:
        first = Listener("127.0.0.1", 0, TOKEN, echo)
        dial(first.address, TOKEN, 5)
        first.close()
        host, port = parse_address(first.address)
        second = Listener(host, port, TOKEN, lambda connection: connection.send(connection.receive()))
        assert serves(second)
        second.close()

    def test_may_come_from_a_connection_s_own_thread(self) -> None:
        closed = threading.Event()

        def serve(connection: Connection) -> None:
            listener.close()
            closed.set()

        listener = Listener("127.0.0.1", 0, TOKEN, serve)
        dial(listener.address, TOKEN, 5)
        assert closed.wait(PATIENCE_SECONDS)


def test_listens_on_ipv6_too() -> None:
    try:
        listener = Listener("::1", 0, TOKEN, lambda connection: connection.send(connection.receive()))
    except OSError:
        pytest.skip("no IPv6 here")
    assert listener.address.startswith("[::1]:")
    assert serves(listener)
    listener.close()


def test_an_address_that_is_taken_and_an_empty_token_are_told_at_once() -> None:
    with listening() as listener:
        host, port = parse_address(listener.address)
        with pytest.raises(OSError, match="in use"):
            Listener(host, port, TOKEN, lambda connection: None)
        with pytest.raises(ValueError, match="empty"):
            Listener(host, 0, b"", lambda connection: None)
