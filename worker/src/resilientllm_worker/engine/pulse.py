"""What a stage's heartbeats say, and for how long: in time that the stage was awake, as its heartbeats witness it.

A heartbeat that came late counts for two at most. Whoever slept meanwhile, the stage, this engine, or the machine with
both of them, nothing can have moved in that time, so it proves nothing. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilientllm_worker.protocol.messages import Heartbeat

LATE_BEATS = 2
STUCK_BEATS = 3
"""A step is stuck when so many heartbeats in a row say that it is overdue: the first after a sleep says so of any."""


@dataclass(frozen=True)
class Pulse:
    beat: Heartbeat
    witnessed: float = 0.0
    """Seconds since the connection was made."""
    overdue_beats: int = 0

    @property
    def is_stuck(self) -> bool:
        """A step has been in the runner for longer than any honest one."""
        return self.overdue_beats >= STUCK_BEATS


def next_pulse(before: Pulse | None, beat: Heartbeat, gap_seconds: float, interval_seconds: float) -> Pulse:
    """``gap_seconds``: since the heartbeat before, or since the stage's welcome."""
    witnessed = (before.witnessed if before else 0.0) + min(gap_seconds, LATE_BEATS * interval_seconds)
    if not beat.step_seconds or beat.step_seconds <= beat.step_allowed_seconds:
        return Pulse(beat, witnessed)
    same_step = before is not None and before.beat.steps_done == beat.steps_done
    return Pulse(beat, witnessed, 1 + (before.overdue_beats if before is not None and same_step else 0))
