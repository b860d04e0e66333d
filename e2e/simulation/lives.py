"""Operator processes that may be killed again and again: each is forked from one that has imported everything.

Importing takes a second or two, and a test that kills the operator at every write would do nothing else. Otherwise the
process is the operator as it is shipped.

Usage of the parent: python -m e2e.simulation.lives; one line of JSON on stdin for each operator, its pid on stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

_END_SECONDS = 15.0


class Lives:
    """``with`` it: no operator outlives the block."""

    def __init__(self) -> None:
        self.pid = 0
        """Of the operator that was started last; 0 when it was ended."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", __spec__.name]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(_END_SECONDS)

    def start(self, log: Path, *arguments: str) -> None:
        """One more operator, and where to what it says is added."""
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write(json.dumps([str(log), *arguments]) + "\n")
        self._parent.stdin.flush()
        self.pid = int(self._parent.stdout.readline())

    def alive(self) -> bool:
        return self.pid != 0 and Path(f"/proc/{self.pid}").exists()

    def kill(self) -> None:
        """At once, and without a word; returns when it is gone."""
        deadline = time.monotonic() + _END_SECONDS
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        while self.alive():
            assert time.monotonic() < deadline, f"operator {self.pid} was killed and still is there"
            time.sleep(0.005)
        self.pid = 0


def main() -> None:
    import kubernetes.client
    import kubernetes.config  # noqa: F401
    from resilientllm_operator import main as operator

    # The kernel buries the dead.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        log, *arguments = json.loads(line)
        if (pid := os.fork()) == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(0)
            sys.argv = ["resilientllm-operator", *arguments]
            os._exit(operator.main())
        print(pid, flush=True)


if __name__ == "__main__":
    main()
