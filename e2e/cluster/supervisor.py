"""Pid 1 of a node or of the control plane: starts services, restarts them, and reaps orphans.

It stands in for systemd, of which a cluster for tests needs three things: start a service when what
it needs is there, start it again when it dies, and leave it down while a test holds it down.

Talking to it takes only files, which anyone can read and write from outside of its namespaces:
``ready/<service>`` exists while a service is ready; while ``hold/<service>`` exists, it stays down.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

Probe = Callable[[], bool]

_POLL_SECONDS = 0.1
_RESTART_SECONDS = 1.0
_PROBE_TIMEOUT_SECONDS = 1.0


class State(Enum):
    DOWN = "down"
    STARTING = "starting"
    READY = "ready"


@dataclass(frozen=True)
class Service:
    name: str
    command: tuple[str, ...]
    ready: Probe
    start_when: Probe = lambda: True
    before_start: Callable[[], None] = lambda: None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Running:
    service: Service
    state: State = State.DOWN
    pid: int = 0
    not_before: float = 0.0


class Supervisor:
    """Keeps services running; ``folder`` holds their logs and the files to talk to it."""

    def __init__(self, services: Sequence[Service], folder: Path) -> None:
        self._services = [_Running(service) for service in services]
        self._ready, self._hold, self._logs = ready_folder(folder), hold_folder(folder), folder / "log"
        for made in (self._ready, self._hold, self._logs):
            made.mkdir(parents=True, exist_ok=True)
        for stale in self._ready.iterdir():
            stale.unlink()

    def run(self) -> None:
        while True:
            self._reap()
            for running in self._services:
                self._step(running)
            time.sleep(_POLL_SECONDS)

    def _step(self, running: _Running) -> None:
        service = running.service
        held = (self._hold / service.name).exists()
        match running.state:
            case State.DOWN:
                if not held and time.monotonic() >= running.not_before and service.start_when():
                    service.before_start()
                    running.pid = self._start(service)
                    running.state = State.STARTING
            case State.STARTING | State.READY if held:
                os.kill(running.pid, signal.SIGKILL)
            case State.STARTING:
                if service.ready():
                    running.state = State.READY
                    (self._ready / service.name).touch()
            case State.READY:
                pass

    def _start(self, service: Service) -> int:
        with (self._logs / f"{service.name}.log").open("ab") as log:
            child = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **service.environment},
                start_new_session=True,
            )
        # As pid 1 we collect every child below, ours and orphans alike; Popen must not do it too.
        child.returncode = 0
        return child.pid

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for running in self._services:
                if running.pid == pid:
                    self._ended(running, status)

    def _ended(self, running: _Running, status: int) -> None:
        name = running.service.name
        print(f"{name} ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        running.state, running.pid = State.DOWN, 0
        running.not_before = time.monotonic() + _RESTART_SECONDS
        (self._ready / name).unlink(missing_ok=True)


def ready_folder(folder: Path) -> Path:
    return folder / "ready"


def hold_folder(folder: Path) -> Path:
    return folder / "hold"


def http_ok(url: str, authority: Path | None = None) -> Probe:
    """Whether a GET is answered with 200."""
    context = ssl.create_default_context(cafile=str(authority)) if authority else None

    def probe() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=_PROBE_TIMEOUT_SECONDS, context=context) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    return probe


def socket_accepts(path: str) -> Probe:
    """Whether a unix socket takes connections."""

    def probe() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PROBE_TIMEOUT_SECONDS)
            try:
                client.connect(path)
            except OSError:
                return False
            return True

    return probe
