"""Starts processes, restarts those that end, stops them all. One thread owns them; its methods may be called from any.

The thread sleeps in ``poll`` on one pidfd a process, so an end is noticed at once and without polling. What to do about
it is ``restart_policy``'s decision.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from resilientllm_cli.supervise import leash, scratch, warden
from resilientllm_cli.supervise.restart_policy import Ended, GiveUp, History, Policy, after_exit

STOP_SECONDS = 10.0
"""How long a process may take to end after SIGTERM before SIGKILL."""


@dataclass(frozen=True)
class Program:
    """What to run. ``environment`` is all of it: nothing is inherited behind the caller's back.

    But TMPDIR, if it names none, is a folder of its own, which is removed when the program ends.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    """stdout and stderr, appended, over all restarts."""
    stop_order: int = 0
    """Lower ones are stopped, and gone, before higher ones are asked to."""


class Phase(StrEnum):
    RUNNING = "Running"
    BACK_OFF = "BackOff"
    REFUSED = "Refused"
    """Its first start ended with exit code 2."""
    STOPPED = "Stopped"


@dataclass(frozen=True)
class Status:
    """A snapshot of one process."""

    name: str
    phase: Phase
    pid: int | None
    restarts: int
    last_exit_code: int | None


@dataclass
class _Process:
    program: Program
    popen: subprocess.Popen[bytes] | None = None
    pidfd: int = -1
    useful_since: float | None = None
    restart_at: float | None = None
    phase: Phase = Phase.BACK_OFF
    history: History = field(default_factory=History)
    last_exit_code: int | None = None

    def status(self) -> Status:
        pid = self.popen.pid if self.popen and self.phase is Phase.RUNNING else None
        return Status(self.program.name, self.phase, pid, self.history.restarts, self.last_exit_code)


class Supervisor:
    """Use as a context manager: leaving it stops everything."""

    def __init__(
        self,
        programs: Sequence[Program],
        policy: Policy | None = None,
        on_change: Callable[[Status], None] = lambda status: None,
        stop_seconds: float = STOP_SECONDS,
    ) -> None:
        """``on_change`` is called on the supervisor's thread, once for every change of a process's phase."""
        self._policy = policy or Policy()
        self._on_change = on_change
        self._stop_seconds = stop_seconds
        self._processes = {program.name: _Process(program, restart_at=0.0) for program in programs}
        self._changed = threading.Condition()
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="supervisor")
        self._failure: BaseException | None = None

    def __enter__(self) -> Self:
        read_end, self._lifeline = os.pipe()
        self._scratch = scratch.make()
        self._warden = subprocess.Popen(
            [sys.executable, "-I", "-S", warden.__file__, str(self._scratch)], stdin=read_end, start_new_session=True
        )
        os.close(read_end)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        if self._failure and error is None:
            raise RuntimeError("the supervisor's thread failed") from self._failure

    def stop(self) -> None:
        """Stops all in order and returns when none is left. May be called twice."""
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        self._warden.wait()

    def status(self) -> dict[str, Status]:
        with self._changed:
            return {name: process.status() for name, process in self._processes.items()}

    def report_useful(self, name: str) -> None:
        """Its present run does what it is for: from now on its time counts as useful."""
        with self._changed:
            process = self._processes[name]
            process.useful_since = process.useful_since or time.monotonic()

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Signals the process and, for SIGKILL, returns its pid when the supervisor has seen it end."""
        with self._changed:
            process = self._processes[name]
            popen = process.popen
            if popen is None or process.phase is not Phase.RUNNING:
                raise ProcessLookupError(f"{name} is not running: {process.phase}")
            os.kill(popen.pid, number)
            if number == signal.SIGKILL:
                self._changed.wait_for(lambda: process.popen is not popen or process.phase is not Phase.RUNNING)
            return popen.pid

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._start_due()
                self._sleep(self._seconds_to_next_start())
                self._reap()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._stop_all()

    def _start_due(self) -> None:
        now = time.monotonic()
        for process in self._processes.values():
            if process.restart_at is not None and process.restart_at <= now:
                self._start(process)

    def _start(self, process: _Process) -> None:
        program = process.program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._scratch / program.name
        temporary.mkdir(exist_ok=True)
        with program.log.open("ab") as log:
            popen = subprocess.Popen(
                [sys.executable, "-I", "-S", leash.__file__, str(self._lifeline), *program.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"TMPDIR": str(temporary), **program.environment},
                pass_fds=(self._lifeline,),
                start_new_session=True,
            )
        with self._changed:
            process.popen, process.pidfd = popen, os.pidfd_open(popen.pid)
            process.useful_since, process.restart_at = None, None
            self._enter(process, Phase.RUNNING)

    def _seconds_to_next_start(self) -> float | None:
        due = [process.restart_at for process in self._processes.values() if process.restart_at is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _sleep(self, seconds: float | None) -> None:
        """Until a process ends, somebody calls, or the time is over."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for process in self._processes.values():
            if process.phase is Phase.RUNNING:
                poll.register(process.pidfd, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _reap(self) -> None:
        for process in self._processes.values():
            if process.phase is Phase.RUNNING and process.popen and process.popen.poll() is not None:
                self._ended(process, process.popen)

    def _ended(self, process: _Process, popen: subprocess.Popen[bytes]) -> None:
        self._bury(process, popen)
        useful_since = process.useful_since
        ended = Ended(popen.returncode, None if useful_since is None else time.monotonic() - useful_since)
        with self._changed:
            process.last_exit_code = popen.returncode
            if self._stopping:
                self._enter(process, Phase.STOPPED)
                return
            process.history, action = after_exit(process.history, ended, self._policy)
            if isinstance(action, GiveUp):
                self._enter(process, Phase.REFUSED)
                return
            process.restart_at = time.monotonic() + action.delay_seconds
            self._enter(process, Phase.BACK_OFF)

    def _bury(self, process: _Process, popen: subprocess.Popen[bytes]) -> None:
        """What it started dies with it, as in a container, before its address is used again. So do temporary files."""
        os.close(process.pidfd)
        warden.kill_sessions({popen.pid})
        # What cannot be removed must not end the supervisor; the warden tries again.
        shutil.rmtree(self._scratch / process.program.name, ignore_errors=True)
        os.write(self._lifeline, f"-{popen.pid}\n".encode())

    def _enter(self, process: _Process, phase: Phase) -> None:
        process.phase = phase
        self._changed.notify_all()
        self._on_change(process.status())

    def _stop_all(self) -> None:
        self._stopping = True
        for process in self._processes.values():
            process.restart_at = None
        for order in sorted({process.program.stop_order for process in self._processes.values()}):
            self._stop_those([p for p in self._processes.values() if p.program.stop_order == order])

    def _stop_those(self, processes: list[_Process]) -> None:
        running = [(p, p.popen) for p in processes if p.popen and p.phase is Phase.RUNNING]
        for _, popen in running:
            popen.terminate()
        deadline = time.monotonic() + self._stop_seconds
        for process, popen in running:
            try:
                popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                popen.kill()
                popen.wait()
            self._ended(process, popen)
        with self._changed:
            for process in processes:
                if process.phase is Phase.BACK_OFF:
                    self._enter(process, Phase.STOPPED)
