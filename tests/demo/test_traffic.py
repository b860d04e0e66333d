"""Clients of a server that is not there."""

from __future__ import annotations

import socket

import pytest
from resilientllm_cli.streams import Sampling

from e2e.cluster.errors import ClusterError
from e2e.demo.traffic import Traffic


def test_nobody_answers_is_an_error_for_whoever_waits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    traffic = Traffic(f"http://127.0.0.1:{port}", ["one", "two"], Sampling(max_tokens=1))

    with pytest.raises(ClusterError, match="an answer of the Service"):
        traffic.wait(30)
    assert not traffic.running
    assert (traffic.tokens, traffic.least_tokens, len(traffic.streams)) == (0, 0, 2)
