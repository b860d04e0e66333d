"""EngineCore's end of the control socket: plans come in, the engine's state goes out. JSON lines, one machine.

The API server process has the other end and outlives an EngineCore, so a new one finds the plan there at once.
"""

from __future__ import annotations

import logging
import socket
import threading
from pathlib import Path

from pydantic import ValidationError

from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.plan import Plan
from resilientllm_worker.engine.pipeline import Pipeline

logger = logging.getLogger(__name__)

STATE_SECONDS = 0.1


class ControlLink:
    def __init__(self, path: Path, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(str(path))
        self._sending = threading.Lock()
        self._stopping = threading.Event()
        threading.Thread(target=self._read, name="plans", daemon=True).start()
        threading.Thread(target=self._write, name="state", daemon=True).start()

    def report_failure(self, message: str) -> None:
        """The engine gives up; the API server process says why and exits."""
        self._stopping.set()
        self._send(self._pipeline.state().model_copy(update={"phase": EnginePhase.FAILED, "message": message}))

    def close(self) -> None:
        self._stopping.set()
        self._socket.close()

    def _read(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines:
            try:
                for line in lines:
                    try:
                        self._pipeline.set_plan(Plan.model_validate_json(line))
                    except ValidationError as error:
                        logger.error("a plan that is none: %s", error)
            except OSError as error:
                if not self._stopping.is_set():
                    logger.error("the control socket broke: %s", error)

    def _write(self) -> None:
        last = ""
        while not self._stopping.wait(STATE_SECONDS):
            state = self._pipeline.state()
            if (text := state.model_dump_json(by_alias=True)) != last:
                last = text
                if not self._send(state):
                    return

    def _send(self, state: EngineState) -> bool:
        line = state.model_dump_json(by_alias=True) + "\n"
        try:
            with self._sending:
                self._socket.sendall(line.encode())
        except OSError:
            return False
        return True
