"""`resilientllm local up` with real stages and engines."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from resilientllm_cli.comparison import compare, total
from resilientllm_cli.streams import Sampling, run_streams
from resilientllm_cli.supervise import warden

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

READY_SECONDS = 300


@contextmanager
def local_up(model: Path, directory: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from resilientllm_cli.main import main; main()", "local", "up"]
    options = ["--model", str(model), "--directory", str(directory), "--port", "0"]
    with subprocess.Popen(
        [*command, *options, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as up:
        try:
            yield up
        finally:
            up.terminate()


def state(directory: Path) -> Any:
    return json.loads((directory / "state.json").read_text())


def sessions(now: Any) -> set[int]:
    return {entry["pid"] for entry in (*now["engines"], *now["stages"]) if entry["pid"]}


def wait_ready(directory: Path) -> Any:
    deadline = time.monotonic() + READY_SECONDS
    while not ((directory / "state.json").is_file() and state(directory)["ready"]):
        assert time.monotonic() < deadline, (directory / "state.json").read_text()
        time.sleep(0.2)
    return state(directory)


def test_it_serves_and_stops_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    with local_up(tiny_model, tmp_path) as up:
        now = wait_ready(tmp_path)
        prompts = ["one", "another"]
        first, second = (
            asyncio.run(run_streams(engine["url"], prompts, Sampling(max_tokens=40))) for engine in now["engines"]
        )
        assert total(compare(a.tokens, b.tokens) for a, b in zip(first, second, strict=True)).unharmed
        assert all(len(stream.tokens) == len(stream.text) == 40 for stream in first)
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    assert warden.members(sessions(now)) == []


def test_killing_it_leaves_nothing_either(tiny_model: Path, tmp_path: Path) -> None:
    with local_up(tiny_model, tmp_path, "--instances", "1") as up:
        now = wait_ready(tmp_path)
        assert len(warden.members(sessions(now))) > len(sessions(now))  # An engine has processes of its own.
        up.kill()
        up.wait()
        deadline = time.monotonic() + 10
        while warden.members(sessions(now)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_flag_that_vllm_refuses_is_one_line_and_exit_2(tiny_model: Path, tmp_path: Path) -> None:
    with local_up(tiny_model, tmp_path, "--instances", "1", "--", "--dtype", "nonsense") as up:
        _, errors = up.communicate(timeout=READY_SECONDS)
        assert up.returncode == 2
        assert len(errors.splitlines()) == 1
        assert "nonsense" in errors
