"""Only who knows the token gets in, and a stranger learns nothing and costs nothing."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest
from resilientllm_worker.transport.auth import authenticate_dialer, authenticate_listener
from resilientllm_worker.transport.errors import AuthenticationError

from tests.worker.transport.builders import TOKEN, InThread, tcp_pair

GREETING_BYTES = 38
PROOF_BYTES = 32

Pair = tuple[socket.socket, socket.socket]
Authenticate = Callable[..., None]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = tcp_pair()
    with near, far:
        yield near, far


def exactly(sock: socket.socket, count: int) -> bytes:
    sock.settimeout(5)
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, "closed early"
        data += chunk
    return data


def test_both_ends_pass_with_the_same_token_and_leave_the_stream_clean(pair: Pair) -> None:
    dialer, listener = pair
    listening = InThread(lambda: authenticate_listener(listener, TOKEN))
    authenticate_dialer(dialer, TOKEN)
    listening.result()
    assert dialer.gettimeout() is None and listener.gettimeout() is None
    dialer.sendall(b"first frame")
    assert exactly(listener, 11) == b"first frame"


def test_a_dialer_with_another_token_is_refused_and_told_nothing(pair: Pair) -> None:
    dialer, listener = pair

    def listen() -> None:
        try:
            authenticate_listener(listener, TOKEN)
        finally:
            listener.close()

    listening = InThread(listen)
    with pytest.raises(AuthenticationError, match="closes when the tokens differ"):
        authenticate_dialer(dialer, b"another token")
    with pytest.raises(AuthenticationError, match="does not know our token"):
        listening.result()


def test_a_listener_that_cannot_prove_the_token_is_refused(pair: Pair) -> None:
    dialer, impostor = pair
    dialing = InThread(lambda: authenticate_dialer(dialer, TOKEN))
    impostor.sendall(b"RLLM" + (2).to_bytes(2, "big") + bytes(32))
    exactly(impostor, GREETING_BYTES + PROOF_BYTES)
    impostor.sendall(bytes(PROOF_BYTES))
    with pytest.raises(AuthenticationError, match="does not know our token"):
        dialing.result()


def test_a_listener_that_returns_our_own_proof_is_refused(pair: Pair) -> None:
    dialer, mirror = pair
    dialing = InThread(lambda: authenticate_dialer(dialer, TOKEN))
    mirror.sendall(b"RLLM" + (2).to_bytes(2, "big") + bytes(32))
    mirror.sendall(exactly(mirror, GREETING_BYTES + PROOF_BYTES)[GREETING_BYTES:])
    with pytest.raises(AuthenticationError, match="does not know our token"):
        dialing.result()


def test_a_dialer_that_returns_our_own_greeting_gets_no_proof_from_us(pair: Pair) -> None:
    mirror, listener = pair
    listening = InThread(lambda: authenticate_listener(listener, TOKEN))
    mirror.sendall(exactly(mirror, GREETING_BYTES) + bytes(PROOF_BYTES))
    with pytest.raises(AuthenticationError, match="does not know our token"):
        listening.result()
    mirror.settimeout(0.1)
    with pytest.raises(TimeoutError):
        mirror.recv(1)


def test_a_proof_seen_once_is_worth_nothing_the_next_time() -> None:
    near, far = tcp_pair()
    with near, far:
        dialing = InThread(lambda: authenticate_dialer(near, TOKEN, deadline_seconds=0.5))
        far.sendall(b"RLLM" + (2).to_bytes(2, "big") + bytes(32))
        recorded = exactly(far, GREETING_BYTES + PROOF_BYTES)
        with pytest.raises(AuthenticationError):
            dialing.result()
    near, far = tcp_pair()
    with near, far:
        listening = InThread(lambda: authenticate_listener(far, TOKEN))
        near.sendall(recorded)
        with pytest.raises(AuthenticationError, match="does not know our token"):
            listening.result()


@pytest.mark.parametrize("authenticate", [authenticate_dialer, authenticate_listener])
class TestEitherEnd:
    def test_gives_up_on_a_silent_peer_at_the_deadline(self, pair: Pair, authenticate: Authenticate) -> None:
        started = time.monotonic()
        with pytest.raises(AuthenticationError, match="deadline passed"):
            authenticate(pair[0], TOKEN, deadline_seconds=0.2)
        assert time.monotonic() - started < 4

    def test_is_not_kept_by_a_peer_that_sends_a_byte_now_and_then(self, pair: Pair, authenticate: Authenticate) -> None:
        ours, theirs = pair
        trying = InThread(lambda: authenticate(ours, TOKEN, deadline_seconds=0.3))
        for _ in range(8):
            theirs.sendall(b"R")
            time.sleep(0.05)
        with pytest.raises(AuthenticationError, match="deadline passed"):
            trying.result(within_seconds=4)

    def test_names_what_it_found_in_place_of_our_protocol(self, pair: Pair, authenticate: Authenticate) -> None:
        pair[1].sendall(b"GET / HTTP/1.1\r\nHost: a-stage-or-so:9000\r\n\r\n")
        with pytest.raises(AuthenticationError, match=r"RLLM.*found b'GET '"):
            authenticate(pair[0], TOKEN)

    def test_names_the_version_of_a_peer_that_is_newer(self, pair: Pair, authenticate: Authenticate) -> None:
        pair[1].sendall(b"RLLM" + (3).to_bytes(2, "big") + bytes(64))
        with pytest.raises(AuthenticationError, match="version 2, found version 3"):
            authenticate(pair[0], TOKEN)

    def test_says_that_the_peer_closed(self, pair: Pair, authenticate: Authenticate) -> None:
        pair[1].close()
        with pytest.raises(AuthenticationError, match=r"closed the connection|went away|broke"):
            authenticate(pair[0], TOKEN)

    def test_refuses_to_run_without_a_token(self, pair: Pair, authenticate: Authenticate) -> None:
        with pytest.raises(ValueError, match="empty"):
            authenticate(pair[0], b"")
