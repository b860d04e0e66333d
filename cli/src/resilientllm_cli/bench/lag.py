"""How far copies are behind, sampled while streams run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from resilientllm_api.engine_state import EngineState

POLL_SECONDS = 0.1
"""As often as an engine tells its state; stages report to it four times a second."""


class LagSampler:
    """While entered, asks ``state`` in a thread. Every sample is of one place of the pipeline.

    What an engine says twice counts twice: samples are evenly spaced in time, and so is their distribution.
    """

    def __init__(self, state: Callable[[], EngineState | None]) -> None:
        self._state = state
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag sampler")
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns when nothing is asked any more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            if (state := self._state()) is None:
                continue
            for place in state.replication:
                self.tokens.append(place.lag_tokens)
                self.seconds.append(place.lag_seconds)
