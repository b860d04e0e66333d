"""A control plane without nodes: a real API server and etcd, and what a test or a benchmark asks for besides.

It lives in a network namespace of the calling thread alone (:func:`own_network`), in which every pod's address is the
namespace's own: whoever listens there on all addresses is every pod at once. What kubelets would say, the caller
says.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from . import build, control_plane, pki
from .commands import run, wait_until
from .layout import API_ADDRESS, POD_NETWORK, Layout
from .supervisor import Probe, Service
from .timings import PATIENT, Timings

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: however the thread ends that starts it, it does not stay behind."""
_CLONE_NEWNET = 0x40000000
_START_TIMEOUT_SECONDS = 120.0
_END_TIMEOUT_SECONDS = 10.0


def own_network() -> None:
    """Gives the calling thread, and all that it starts from now on, a network of its own. It ends with them."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET): are you root?")
    run("ip", "link", "set", "lo", "up")
    run("ip", "address", "add", f"{API_ADDRESS}/32", "dev", "lo")
    run("ip", "route", "add", "local", str(POD_NETWORK), "dev", "lo")


class LoneControlPlane:
    """``with`` it, in a thread that has its :func:`own_network`."""

    def __init__(
        self, folder: Path, *, extra: Sequence[str] = ("kube-controller-manager",), timings: Timings = PATIENT
    ) -> None:
        """``folder``: for all its files. ``extra``: further services by name, such as ``kube-scheduler``."""
        self.layout = Layout(
            name=f"lone-{os.getpid()}",
            folder=folder,
            binaries=build.binaries(),
            mounts=(),
            node_names=("none",),
            host_port=0,
            timings=timings,
        )
        self._services: dict[str, Service] = {}
        self._wanted = ("etcd", "kube-apiserver", *extra)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def kubeconfig(self) -> Path:
        """An administrator's; for those in the same network."""
        return self.layout.kubeconfig("admin")

    def __enter__(self) -> Self:
        pki.make(self.layout)
        self._services = {each.name: each for each in control_plane.services(self.layout)}
        with ExitStack() as whole:
            whole.callback(self._end)
            for name in self._wanted:
                self.start(name)
            whole.pop_all()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        for name in list(self._running):
            self.stop(name)
        shutil.rmtree(self.layout.control_plane / "etcd", ignore_errors=True)

    def start(self, name: str) -> None:
        """Start a service; returns when it is ready."""
        service = self._services[name]
        log = self.layout.control_plane / "log" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._wait(service.start_when, service, log)
        with log.open("ab") as output:
            self._running[name] = subprocess.Popen(
                [*DIES_WITH_US, *service.command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._wait(service.ready, service, log)

    def stop(self, name: str) -> None:
        """Kill a service."""
        process = self._running.pop(name)
        process.kill()
        process.wait(_END_TIMEOUT_SECONDS)

    def pid(self, name: str) -> int:
        return self._running[name].pid

    def kubectl(self, *arguments: str, stdin: str | None = None, timeout_seconds: float = 60.0) -> str:
        cache = self.layout.folder / "kubectl-cache"
        program = self.layout.binaries / "kubectl"
        ours = (f"--kubeconfig={self.kubeconfig}", f"--cache-dir={cache}")
        return run(program, *ours, *arguments, stdin=stdin, timeout_seconds=timeout_seconds)

    def _wait(self, condition: Probe, service: Service, log: Path) -> None:
        wait_until(
            condition, f"{service.name} to be ready", timeout_seconds=_START_TIMEOUT_SECONDS, where_to_look=[log]
        )
