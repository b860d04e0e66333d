"""Kills what a dead supervisor left behind, and removes its temporary files. Run as a script: ``warden.py FOLDER``,
with the read end of a pipe as stdin.

A supervisor that is killed with SIGKILL cannot clean up, and PR_SET_PDEATHSIG reaches children only, not the worker
processes that they start. So every child leads a session of its own, which its descendants stay in, and this process
outlives the supervisor just long enough to kill these sessions. Lines of the pipe: ``+PID`` a session began, ``-PID``
it is gone (before its number can be used again). FOLDER goes last, also when the supervisor ends well.
Imports nothing but the standard library: the supervisor starts it first of all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path


def open_sessions(lines: Iterable[str]) -> set[int]:
    sessions: set[int] = set()
    for line in lines:
        session = int(line[1:])
        if line[0] == "+":
            sessions.add(session)
        else:
            sessions.discard(session)
    return sessions


def members(sessions: set[int]) -> list[int]:
    """Pids of living processes in these sessions. ``stat``: pid (name) state parent group session …"""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # It ended while we looked.
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) in sessions and state not in "ZX":
                pids.append(int(entry.name))
    return pids


def kill_sessions(sessions: set[int]) -> None:
    """SIGKILL until none is left: a process may fork while its session is being killed."""
    while pids := members(sessions):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def main() -> None:
    # Ctrl-C in a terminal and a polite end of the whole group are the supervisor's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kill_sessions(open_sessions(sys.stdin))
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
