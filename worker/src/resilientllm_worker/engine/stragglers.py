"""Which stages have become slow: one that leaves both its own history and its twins behind, for a while. Pure.

Either alone means little. All stages become slower together when prompts get longer or a machine is shared, and a stage
on other hardware is slower than its twins from the first day on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from resilientllm_api.engine_state import Slowness
from resilientllm_api.plan import StageId

from resilientllm_worker.protocol.messages import Pace

SLOW = 1.5
"""Times as long as before, and as its twins."""
WELL = 1.25
"""No longer slow."""
HOLD_SECONDS = 10.0
"""Of work at that pace, before it is said, and before it is taken back."""
LATE_SECONDS = 0.2
"""Time that passes at one look counts for so much at most: the engine may have slept."""


@dataclass(frozen=True)
class Watch:
    """One stage, as of the last look. Times in seconds."""

    at: float
    steps: int
    turning: float = 0.0
    """For how long it has been other than is said."""
    slow: Slowness | None = None
    """What is said. Its figures are those of when it was said first, so that they do not flicker."""


def judge(
    before: Mapping[StageId, Watch], own: Mapping[StageId, Pace], twins: Mapping[StageId, Pace], now: float
) -> dict[StageId, Watch]:
    """``own``: the stages that are judged. ``twins``: all whose pace is known; those of the same place are compared."""
    return {
        stage: _look(
            before.get(stage) or Watch(now, pace.steps),
            pace,
            [each for name, each in twins.items() if name.stage == stage.stage and name != stage],
            now,
        )
        for stage, pace in own.items()
    }


def _look(watch: Watch, pace: Pace, twins: list[Pace], now: float) -> Watch:
    worked = min(now - watch.at, LATE_SECONDS) if pace.steps != watch.steps else 0.0
    looked = replace(watch, at=now, steps=pace.steps)
    beside = beside_twins(pace, twins)
    if watch.slow is None:
        turns = beside is not None and pace.ratio >= SLOW and beside >= SLOW
    else:
        turns = beside is not None and beside < WELL
    if not turns:
        return replace(looked, turning=0.0) if worked else looked
    turning = watch.turning + worked
    if turning < HOLD_SECONDS:
        return replace(looked, turning=turning)
    if watch.slow is not None or beside is None:
        return replace(looked, turning=0.0, slow=None)
    return replace(looked, turning=0.0, slow=Slowness(history=round(pace.ratio, 2), twins=round(beside, 2)))


def beside_twins(pace: Pace, twins: list[Pace]) -> float | None:
    """How many times as long as its twins' its steps take now; None if there is none to compare with."""
    compared = [found for twin in twins if (found := _beside(pace, twin)) is not None]
    return median(compared) if compared else None


def _beside(pace: Pace, twin: Pace) -> float | None:
    mine, theirs = dict(pace.sizes), dict(twin.sizes)
    common = mine.keys() & theirs.keys()
    if not common:
        return None
    return median(mine[size] * pace.ratio / (theirs[size] * twin.ratio) for size in common)
