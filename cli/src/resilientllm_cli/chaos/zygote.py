"""A process that has imported torch and vLLM, and forks stages and engines off itself. Run as a script:
``zygote.py FD MODULE…``, with FD one end of a Unix socket of the kind SEQPACKET.

Imports are most of what a stage needs to start, so one that dies is back in a second or two. A fork is safe as long as
there is one thread, which is checked. An order is a JSON object (`Start`, in ``processes.py``), answered with
``{"name", "pid"}``; the end of a child is told as ``{"ended": pid, "code"}``, negative for a signal. When the other end
is closed, this process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ORDER_BYTES = 1 << 16
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1


def main() -> Callable[[], object] | None:
    """Returns what a forked child is to call, when its stack holds nothing of this process any more."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    for module in sys.argv[2:]:
        importlib.import_module(module)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"expected one thread after the imports, found {threads}: nobody can be forked off safely")
    gc.collect()
    gc.freeze()  # what is here is never garbage, so that children share its memory
    awake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    orders.send(b'{"ready": true}')
    while True:
        ready, _, _ = select.select([orders.fileno(), awake], [], [])
        if awake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(awake, 4096)
            _tell_ended(orders)
        if orders.fileno() in ready:
            order = orders.recv(ORDER_BYTES)
            if not order:
                return None
            start = json.loads(order)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (orders.detach(), awake, wake):
                    os.close(descriptor)
                return _become(start)
            orders.send(json.dumps({"name": start["name"], "pid": pid}).encode())


def _tell_ended(orders: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
            orders.send(json.dumps({"ended": ended[0], "code": code}).encode())


def _become(start: dict[str, Any]) -> Callable[[], object]:
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    namespace = os.open(start["namespace"], os.O_RDONLY)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {start['namespace']}")
    os.close(namespace)
    log = os.open(start["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    for descriptor in {nothing, log} - {0, 1, 2}:
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(start["environment"])
    tempfile.tempdir = None  # an import may have asked for it, and TMPDIR is another now
    sys.argv = start["arguments"]
    if (clock := start.get("clock")) is not None:
        ctypes.CDLL(None).chaos_clock_use(os.fsencode(clock))
    module, _, function = start["entry"].partition(":")
    entry: Callable[[], object] = getattr(importlib.import_module(module), function)
    return entry


if __name__ == "__main__":
    if (entry := main()) is not None:
        entry()
