"""For how long an instance has had work, or could not take any, and nothing has moved. Pure.

What moves is a result of a step, and nothing else: that a thread answers says nothing, nor that requests come and fail.
"""

from __future__ import annotations

from dataclasses import dataclass

LATE_LOOKS = 2


@dataclass(frozen=True)
class Stall:
    """As of the last look. All times in seconds; a look that came late counts for two, as nobody was awake."""

    at: float
    steps: int = 0
    """How many results there have been, of this EngineCore."""
    seconds: float = 0.0

    def after(self, now: float, steps: int, busy: bool, serving: bool, look_seconds: float) -> Stall:
        """``busy``: there are requests. ``serving``: the pipeline is whole, and EngineCore says so."""
        if steps != self.steps or (serving and not busy):
            return Stall(now, steps)
        return Stall(now, steps, self.seconds + min(now - self.at, LATE_LOOKS * look_seconds))


def sickness(stall: Stall, sick_after: float, step_allowed: float, busy: bool, message: str) -> str:
    """What is wrong, for people; empty if nothing is. ``step_allowed``: a step may be in a runner for so long."""
    if stall.seconds <= max(sick_after, step_allowed):
        return ""
    what = "there are requests, and no step has been done" if busy else "it could not have served a request"
    return f"{what} for {int(stall.seconds)} s" + (f": {message}" if message else "")
