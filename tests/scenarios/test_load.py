"""Clients that never stop asking, of a server that is none of ours."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from e2e.cluster.errors import ClusterError
from e2e.scenarios.load import MIDDLE_TOKENS, TOKENS, Load, Target

BOUND_SECONDS = 30.0


class Server:
    """Streams token ids 0, 1, 2, … to everybody, up to a token of the test's choice."""

    def __init__(self) -> None:
        self.token_seconds = 0.0
        self.goes_until = TOKENS
        self.breaks = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                for token in range(TOKENS):
                    time.sleep(server.token_seconds)
                    while token >= server.goes_until:
                        time.sleep(0.005)
                    if server.breaks:
                        return
                    last = "length" if token == TOKENS - 1 else None
                    choice = {"index": 0, "text": "x", "finish_reason": last, "token_ids": [token]}
                    self._say({"id": "1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})
                self.wfile.write(b"data: [DONE]\n\n")

            def _say(self, chunk: object) -> None:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())

            def log_message(self, *_: object) -> None:
                """Silence."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.goes_until, self.breaks = TOKENS, True
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def targets(server: Server) -> list[Target]:
    return [Target("service", server.url, (0, 1)), Target("engine 0", server.url, (2,))]


def test_a_number_of_rounds_ends_by_itself(server: Server) -> None:
    with Load("m", targets(server), rounds=2) as load:
        load.finish(BOUND_SECONDS)

    assert sorted((sent.target, sent.round, sent.stream.index) for sent in load.sent) == [
        *(("engine 0", number, 2) for number in (0, 1)),
        *(("service", number, prompt) for number in (0, 1) for prompt in (0, 1)),
    ]
    assert all(sent.over and sent.stream.complete for sent in load.sent)
    assert all(sent.stream.tokens == list(range(TOKENS)) for sent in load.sent)


def test_all_streams_are_in_the_middle_at_once(server: Server) -> None:
    server.token_seconds = 0.005
    with Load("m", targets(server)) as load:
        met = load.reach_the_middle(BOUND_SECONDS)
        middle = time.monotonic()
        server.token_seconds = 0.0
        load.finish(BOUND_SECONDS)

    cut = [sent for sent in load.sent if sent.asked_seconds < middle and (sent.ended_seconds or 0) > middle]
    assert met == len(cut) == 3
    assert all(sent.stream.arrivals_seconds[MIDDLE_TOKENS - 1] < middle for sent in cut)


def test_nobody_waits_for_the_end_of_a_pause(server: Server) -> None:
    with Load("m", targets(server), pause_seconds=10 * BOUND_SECONDS) as load:
        load.reach_the_middle(BOUND_SECONDS)
        deadline = time.monotonic() + BOUND_SECONDS
        while not all(sent.over for sent in load.sent) and time.monotonic() < deadline:
            time.sleep(0.01)
        before = len(load.sent)
        load.reach_the_middle(BOUND_SECONDS)
        load.finish(BOUND_SECONDS)

    assert len(load.sent) == before + 3
    assert all(sent.stream.complete for sent in load.sent)


def test_a_stream_that_breaks_is_a_result_and_the_next_round_comes(server: Server) -> None:
    server.breaks = True
    with Load("m", targets(server), rounds=2) as load:
        load.finish(BOUND_SECONDS)

    assert len(load.sent) == 6
    assert all(sent.over and sent.stream.error for sent in load.sent)


def test_streams_that_never_get_there_are_an_error_that_says_how_far_they_came(server: Server) -> None:
    server.goes_until = 3
    with Load("m", targets(server)) as load:
        with pytest.raises(ClusterError, match="of the streams within 2 s"):
            load.reach_the_middle(2.0)
        with pytest.raises(ClusterError, match=r"service: \d tokens"):
            load.finish(0.1)
