"""Remembered processes: the right ones are ended, and no other."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import pidfile


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_remembered_process_is_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    pidfile.remember(tmp_path, sleeper.pid)

    pidfile.end_all(tmp_path)

    assert sleeper.wait(timeout=10) == -9
    assert list(tmp_path.iterdir()) == []


def test_other_process_that_was_given_the_same_pid_is_spared(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    (tmp_path / f"{sleeper.pid}.pid").write_text("1")

    pidfile.end_all(tmp_path)

    assert sleeper.poll() is None


def test_process_that_has_ended_is_no_error(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"{ended.pid}.pid").write_text("1")

    pidfile.end_all(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_start_time_is_a_processs_own() -> None:
    assert pidfile.start_time(os.getpid()) != pidfile.start_time(1)
    assert pidfile.start_time(2**22 + 1) is None
