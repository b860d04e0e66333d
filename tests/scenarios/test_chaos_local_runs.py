"""`resilientllm chaos` as part of `make chaos`: its exit status, and that it tidies up when both are interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.cluster.launch import REPOSITORY

BOUND_SECONDS = 30.0

RUN = """
import sys
sys.executable = sys.argv[1]
from e2e.chaos import local_runs
sys.exit(local_runs.run(["--runs=1"]))
"""


def start(folder: Path, body: str) -> subprocess.Popen[str]:
    """With a `resilientllm` that does this instead."""
    program = folder / "resilientllm"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    command = [sys.executable, "-c", RUN, str(folder / "python")]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("status", [0, 1, 2])
def test_its_exit_status_is_returned(tmp_path: Path, status: int) -> None:
    process = start(tmp_path, f'test "$*" = "chaos --runs=1" && exit {status}')
    _, said = process.communicate(timeout=BOUND_SECONDS)
    assert process.returncode == status, said


def test_it_tidies_up_when_it_is_interrupted(tmp_path: Path) -> None:
    up, tidied = tmp_path / "up", tmp_path / "tidied"
    process = start(tmp_path, f"trap 'touch {tidied}; exit 130' TERM; touch {up}; while :; do sleep 0.05; done")
    deadline = time.monotonic() + BOUND_SECONDS
    while not up.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=BOUND_SECONDS)
    assert tidied.exists()
    assert "KeyboardInterrupt" in said
