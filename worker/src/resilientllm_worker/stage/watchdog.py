"""Ends a stage that is stuck in a step for good: it is of no use to anybody, and a new process may be.

Engines have gone on without it by then. Nothing gentler would end it, since its runner does not come back.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
LOOKS = 3
"""So many looks in a row must find the same step: a process that was stopped within a step ends it soon after."""
OVERDUE = 3.0
"""Times of what the step may take."""
EXIT_STUCK = 75
"""Another try may help (EX_TEMPFAIL of sysexits.h)."""


class Watchdog:
    """Pure, but for the clock that it is given: how often in a row it has seen one step that is far overdue."""

    def __init__(self) -> None:
        self._seen = 0
        self._steps_done = -1

    def bites(self, steps_done: int, seconds: float, allowed: float) -> bool:
        if not seconds or seconds <= OVERDUE * allowed:
            self._seen = 0
            return False
        self._seen = self._seen + 1 if steps_done == self._steps_done else 1
        self._steps_done = steps_done
        return self._seen >= LOOKS


def watch(read: Callable[[], tuple[int, float, float]], end: Callable[[str], None]) -> None:
    """In a thread of its own. ``read``: steps done, how long the one at hand has been running, and how long it may."""

    def look() -> None:
        watchdog, pause = Watchdog(), threading.Event()
        while not pause.wait(LOOK_SECONDS):
            steps_done, seconds, allowed = read()
            if watchdog.bites(steps_done, seconds, allowed):
                end(f"a step has been running for {seconds:.0f} s, {allowed:.0f} s are allowed")

    threading.Thread(target=look, name="watchdog", daemon=True).start()


def end_process(reason: str) -> None:
    logger.error("stuck: %s; ends itself", reason)
    logging.shutdown()
    os._exit(EXIT_STUCK)
