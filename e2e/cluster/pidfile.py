"""Remembering processes where control groups cannot, as on a machine with an ordinary Docker.

A pid alone may mean another program later. With its start time it means one process for ever.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path


def remember(folder: Path, pid: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{pid}.pid").write_text(start_time(pid) or "")


def end_all(folder: Path) -> None:
    """End every remembered process that is still the one that was remembered."""
    for file in sorted(folder.glob("*.pid")) if folder.exists() else []:
        _end(int(file.stem), file.read_text())
        file.unlink()


def start_time(pid: int) -> str | None:
    """When a process started, in the kernel's clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the program's name, which may contain anything but ends at the last bracket.
    return stat.rpartition(")")[2].split()[19]


def _end(pid: int, started: str) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if start_time(pid) == started:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)
