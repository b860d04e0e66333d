"""The baseline: stock ``vllm serve`` on the same layout, under the same supervisor.

Its workers are those of vLLM's own multiprocess executor. When one is killed, the server gives up and ends, and the
supervisor starts it again, as a kubelet would.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from resilientllm_cli.local import ports
from resilientllm_cli.supervise import warden
from resilientllm_cli.supervise.supervisor import Phase, Program, Supervisor

NAME = "stock"
WORKER_TITLE = "VLLM::Worker_PP{stage}"
"""What a worker of the multiprocess executor calls itself."""


class StockServer:
    def __init__(
        self, programs: Path, model: Path, stages: int, flags: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        [port] = ports.choose(1, ports.candidates())
        self.url = f"http://{ports.HOST}:{port}"
        self._log = log
        self._hit: int | None = None
        """The process that lost a worker: it still answers for a moment."""
        self._program = Program(
            name=NAME,
            arguments=[
                *(sys.executable, str(programs / "stock_serve.py"), "serve", str(model)),
                *("--host", ports.HOST, "--port", str(port), "--pipeline-parallel-size", str(stages)),
                *("--distributed-executor-backend", "mp", "--worker-cls", "stock_worker.Worker"),
                *flags,
            ],
            environment=environment,
            log=log,
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._supervisor = stack.enter_context(Supervisor([self._program]))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def wait_ready(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while (status := self._supervisor.status()[NAME]).pid == self._hit or not self._answers():
            if status.phase is Phase.REFUSED or time.monotonic() > deadline:
                raise TimeoutError(
                    f"expected stock vLLM to serve within {timeout_seconds:g} s, found {status}: see {self._log}"
                )
            time.sleep(0.2)
        self._supervisor.report_useful(NAME)

    def kill_worker(self, stage: int) -> None:
        """kill -9 of the process of one stage, and of nothing else."""
        session = self._supervisor.status()[NAME].pid
        title = WORKER_TITLE.format(stage=stage)
        for pid in warden.members({session} if session else set()):
            if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode() == title:
                os.kill(pid, signal.SIGKILL)
                self._hit = session
                return
        raise ProcessLookupError(f"expected a process {title} of stock vLLM, found none")

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return True
        except OSError:
            return False
