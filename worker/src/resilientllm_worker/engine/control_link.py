"""EngineCore's end of the control socket: plans come in, the engine's state goes out. JSON lines, one machine.

The API server process has the other end and outlives an EngineCore, so a new one finds the plan there at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.plan import Plan

from resilientllm_worker.engine.pipeline import Pipeline

logger = logging.getLogger(__name__)

STATE_SECONDS = 0.1
STATE_AT_LEAST_SECONDS = 1.0
"""Said so often though nothing has changed, so that silence means something."""


class ControlLink:
    def __init__(self, path: Path, pipeline: Pipeline, on_orphaned: Callable[[], None] | None = None) -> None:
        self._pipeline = pipeline
        self._on_orphaned = on_orphaned or _end_process
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        threading.Thread(target=self._read, name="plans", daemon=True).start()
        threading.Thread(target=self._write, name="state", daemon=True).start()

    def report_failure(self, message: str) -> None:
        """The engine gives up; the API server process says why and exits."""
        self._say(
            self._pipeline.state().model_copy(update={"phase": EnginePhase.FAILED, "message": message}), last=True
        )

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                try:
                    self._pipeline.set_plan(Plan.model_validate_json(line))
                except ValidationError as error:
                    logger.error("a plan that is none: %s", error)
        if not self._stopping.is_set():
            self._on_orphaned()

    def _write(self) -> None:
        last: EngineState | None = None
        said = 0.0
        while not self._stopping.wait(STATE_SECONDS):
            now = time.monotonic()
            if (state := self._pipeline.state()) != last or now - said >= STATE_AT_LEAST_SECONDS:
                last, said = state, now
                if not self._say(state):
                    return

    def _say(self, state: EngineState, last: bool = False) -> bool:
        """Send ``state``, unless the last word has been said."""
        line = state.model_dump_json(by_alias=True) + "\n"
        with self._sending:
            if self._stopping.is_set():
                return False
            if last:
                self._stopping.set()
            try:
                self._socket.sendall(line.encode())
            except OSError:
                return False
        return True


def _end_process() -> None:
    """Without its API server an EngineCore has no clients, and would only vie with the next one for the stages."""
    logger.error("the API server process has gone; so does EngineCore")
    os._exit(1)
