"""Keeps a world's processes running, as a kubelet keeps containers: starts them through the zygote, and again when
they end, unless they are held down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from resilientllm_cli.chaos import zygote
from resilientllm_cli.supervise.warden import kill_sessions, members

IMPORT_SECONDS = 300.0
"""For the zygote, on a machine that does other things too."""
ENDS_WITHIN_SECONDS = 10.0
"""A process that got SIGKILL, and is told to have ended."""
RESTART_SECONDS = 0.2
CRASH_SECONDS = 1.0
"""Before the next start of a process that did not live for `GOOD_RUN_SECONDS`."""
GOOD_RUN_SECONDS = 3.0


@dataclass(frozen=True)
class Start:
    """What the zygote needs to know to become this program."""

    name: str
    entry: str
    """``module:function``"""
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    namespace: str
    """The file of its network namespace."""
    log: str
    clock: str | None = None
    """The file by which its wall clock is stepped, where the zygote has the shim (``clock.py``)."""


@dataclass
class _Process:
    start: Start
    pid: int | None = None
    since: float = 0.0
    restart_at: float | None = None
    held: bool = False
    starts: int = 0
    asked: bool = False
    """The zygote has been asked for it and has not answered."""


class Processes:
    """Use as a context manager: leaving it kills everything."""

    def __init__(
        self, starts: Sequence[Start], modules: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self._processes = {start.name: _Process(start) for start in starts}
        self._modules = modules
        self._environment = environment
        self._log = log
        self._changed = threading.Condition()
        self._codes: dict[int, int] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="processes")

    def __enter__(self) -> Self:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._log.open("ab") as log, theirs:
            self._zygote = subprocess.Popen(
                [sys.executable, zygote.__file__, str(theirs.fileno()), *self._modules],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self._environment),
                start_new_session=True,
            )
        self._socket.settimeout(IMPORT_SECONDS)
        if not self._socket.recv(zygote.ORDER_BYTES):
            self._zygote.wait()
            raise RuntimeError(f"the zygote ended with {self._zygote.returncode}: {self._log.read_text()[-500:]}")
        self._socket.settimeout(0.05)
        with self._changed:
            for process in self._processes.values():
                process.restart_at = 0.0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close()
        pids = {process.pid for process in self._processes.values() if process.pid is not None}
        kill_sessions(pids)
        self._zygote.kill()
        self._zygote.wait()

    def pid(self, name: str) -> int | None:
        with self._changed:
            return self._processes[name].pid

    def pids(self) -> dict[str, int]:
        with self._changed:
            return {name: each.pid for name, each in self._processes.items() if each.pid is not None}

    def starts(self, name: str) -> int:
        with self._changed:
            return self._processes[name].starts

    def family(self, name: str) -> list[int]:
        """Its pid and those of all that it started."""
        pid = self.pid(name)
        return members({pid}) if pid is not None else []

    def signal(self, name: str, number: int) -> int:
        """Raises ProcessLookupError if it does not run now."""
        with self._changed:
            pid = self._processes[name].pid
            if pid is None:
                raise ProcessLookupError(f"{name} does not run")
            os.kill(pid, number)
            return pid

    def kill(self, name: str) -> dict[str, object]:
        """kill -9; returns the evidence when the end was seen."""
        pid = self.signal(name, signal.SIGKILL)
        return {"pid": pid, "ended_with": self.ended(pid)}

    def ended(self, pid: int, timeout_seconds: float = ENDS_WITHIN_SECONDS) -> int:
        """How it ended, negative for a signal. Raises TimeoutError if it has not."""
        with self._changed:
            if not self._changed.wait_for(lambda: pid in self._codes, timeout_seconds):
                raise TimeoutError(f"process {pid} has not ended within {timeout_seconds:g} s")
            return self._codes[pid]

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """It is not started again meanwhile."""
        with self._changed:
            self._processes[name].held = True
        try:
            yield
        finally:
            with self._changed:
                self._processes[name].held = False

    def _run(self) -> None:
        while not self._closing:
            self._start_due()
            try:
                told = self._socket.recv(zygote.ORDER_BYTES)
            except TimeoutError:
                continue
            if not told:
                return
            self._hear(json.loads(told))

    def _start_due(self) -> None:
        now = time.monotonic()
        with self._changed:
            for process in self._processes.values():
                due = process.restart_at is not None and process.restart_at <= now
                if due and not process.held and not process.asked:
                    process.asked, process.restart_at = True, None
                    self._socket.send(json.dumps(asdict(process.start)).encode())

    def _hear(self, told: dict[str, int | str]) -> None:
        with self._changed:
            if "name" in told:
                process = self._processes[str(told["name"])]
                process.pid, process.since = int(told["pid"]), time.monotonic()
                process.starts += 1
                process.asked = False
            else:
                pid = int(told["ended"])
                self._codes[pid] = int(told["code"])
                for process in self._processes.values():
                    if process.pid == pid:
                        good = time.monotonic() - process.since >= GOOD_RUN_SECONDS
                        process.pid = None
                        process.restart_at = time.monotonic() + (RESTART_SECONDS if good else CRASH_SECONDS)
            self._changed.notify_all()
