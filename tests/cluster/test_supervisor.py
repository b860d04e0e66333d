"""The supervisor, as a process: services start in order, come back, and stay down while held."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.cluster import launch
from e2e.cluster.supervisor import hold_folder, ready_folder

# Each service writes its pid, and lives until it is killed.
PROGRAM = """
import sys
from pathlib import Path
from e2e.cluster.supervisor import Service, Supervisor
folder = Path(sys.argv[1])
def service(name, start_when):
    command = ("sh", "-c", f"echo $$ >> {folder / name}; exec sleep 600")
    return Service(name, command, ready=(folder / name).exists, start_when=start_when)
services = [service("second", (folder / "ready" / "first").exists), service("first", lambda: True)]
Supervisor(services, folder).run()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    environment = launch.environment()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment)
    try:
        yield tmp_path
    finally:
        process.kill()
        process.wait()
        for name in ("first", "second"):
            for pid in pids(tmp_path, name):
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, 9)


def pids(folder: Path, name: str) -> list[int]:
    file = folder / name
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_ready(folder: Path, name: str) -> bool:
    return (ready_folder(folder) / name).exists()


def eventually(condition: Callable[[], bool], within_seconds: float = 15.0) -> None:
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen within {within_seconds:g} s"
        time.sleep(0.05)


def test_service_starts_when_what_it_needs_is_ready(folder: Path) -> None:
    eventually(lambda: is_ready(folder, "second"))

    assert is_ready(folder, "first")


def test_killed_service_comes_back(folder: Path) -> None:
    eventually(lambda: is_ready(folder, "first"))
    (first,) = pids(folder, "first")

    os.kill(first, 9)

    eventually(lambda: len(pids(folder, "first")) == 2)
    eventually(lambda: is_ready(folder, "first"))


def test_held_service_ends_and_stays_down_until_released(folder: Path) -> None:
    eventually(lambda: is_ready(folder, "first"))
    hold = hold_folder(folder) / "first"

    hold.touch()
    eventually(lambda: not is_ready(folder, "first"))
    time.sleep(2)
    assert len(pids(folder, "first")) == 1, "it must not be started again while it is held"
    hold.unlink()

    eventually(lambda: len(pids(folder, "first")) == 2)
    eventually(lambda: is_ready(folder, "first"))
