"""`resilientllm local up` with real stages and engines."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
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


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The user's TMPDIR: short, so that it is used, and checked for what is left in it."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def local_up(
    model: Path, directory: Path, *words: str, temporary: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from resilientllm_cli.main import main; main()", "local", "up"]
    options = ["--model", str(model), "--directory", str(directory), "--port", "0"]
    environment = {**os.environ, **({"TMPDIR": str(temporary)} if temporary else {})}
    with subprocess.Popen(
        [*command, *options, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
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


def test_it_serves_and_stops_and_leaves_nothing(tiny_model: Path, tmp_path: Path, temporary: Path) -> None:
    with local_up(tiny_model, tmp_path, temporary=temporary) as up:
        now = wait_ready(tmp_path)
        prompts = ["one", "another"]
        first, second = (
            asyncio.run(run_streams(engine["url"], prompts, Sampling(max_tokens=40))) for engine in now["engines"]
        )
        assert total(compare(a.tokens, b.tokens) for a, b in zip(first, second, strict=True)).unharmed
        assert all(len(stream.tokens) == len(stream.text) == 40 for stream in first)
        assert any(temporary.rglob("vllm_dist_*")), "stages keep their files elsewhere: nothing is shown below"
        assert any(path.is_socket() for path in temporary.rglob("*")), "so do engines"
        os.kill(now["stages"][0]["pid"], signal.SIGKILL)  # It has no chance to tidy up.
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
    assert warden.members(sessions(now)) == []
    assert list(temporary.iterdir()) == []


def test_killing_it_leaves_nothing_either(tiny_model: Path, tmp_path: Path, temporary: Path) -> None:
    with local_up(tiny_model, tmp_path, "--instances", "1", temporary=temporary) as up:
        now = wait_ready(tmp_path)
        assert len(warden.members(sessions(now))) > len(sessions(now))  # An engine has processes of its own.
        up.kill()
        up.wait()
        deadline = time.monotonic() + 10
        while warden.members(sessions(now)) or any(temporary.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_flag_that_vllm_refuses_is_one_line_and_exit_2(tiny_model: Path, tmp_path: Path) -> None:
    with local_up(tiny_model, tmp_path, "--instances", "1", "--", "--dtype", "nonsense") as up:
        _, errors = up.communicate(timeout=READY_SECONDS)
        assert up.returncode == 2
        assert len(errors.splitlines()) == 1
        assert "nonsense" in errors
