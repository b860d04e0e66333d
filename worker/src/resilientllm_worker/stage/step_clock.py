"""How long the step at hand has been in the runner, and how long it may be. Written by the runner, read by heartbeats.

It stands still while the runner waits for an earlier step's hidden states to leave: a link that is slow, or whose other
end is stopped, is no fault of this stage, and no part of how long its steps take.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class _Reading:
    started: float
    allowed: float
    stood: float = 0.0
    stands_since: float | None = None

    def seconds(self, now: float) -> float:
        until = now if self.stands_since is None else self.stands_since
        return max(0.0, until - self.started - self.stood)


class StepClock:
    """All times in seconds. The reading is replaced as a whole, so readers in other threads need no lock."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._reading: _Reading | None = None

    def begin(self, allowed: float) -> None:
        self._reading = _Reading(self._now(), allowed)

    def end(self) -> float:
        """Returns how long the step took."""
        reading, self._reading = self._reading, None
        return reading.seconds(self._now()) if reading is not None else 0.0

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        """Time that does not count. In the runner's thread; nothing happens while there is no step."""
        reading, now = self._reading, self._now()
        if reading is None:
            yield
            return
        self._reading = replace(reading, stands_since=now)
        try:
            yield
        finally:
            self._reading = replace(reading, stood=reading.stood + self._now() - now)

    def read(self) -> tuple[float, float]:
        """How long the step at hand has been running, and how long it may; zeros when there is none."""
        reading = self._reading
        return (reading.seconds(self._now()), reading.allowed) if reading is not None else (0.0, 0.0)
