"""Whether a stage's steps take longer than they used to, and how long those of each size take. Facts only. Pure.

For each size of steps (`deadline.size_class`) there is a history, which follows over ten minutes of steps. The last
steps are compared with it, whatever their sizes: the median of their ratios is how much slower the stage is than it
was. Nothing moves a median but half of the steps, so neither a collection nor a page fault looks like a slow device.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from resilientllm_worker.protocol.messages import Pace

LAST_STEPS = 64
FEW = 16
"""Steps of a size that must have been seen: the median of their times begins its history."""
HISTORY_SECONDS = 600.0
"""Of time in steps: what has been so for longer is how it is."""
MOST_CHANGE = 1.0
"""Of a history's logarithm by one step, before it is weighed."""


@dataclass
class _History:
    first: list[float] = field(default_factory=list)
    log_seconds: float | None = None


@dataclass
class Steps:
    """Of one stage. Times in seconds."""

    _sizes: dict[int, _History] = field(default_factory=dict)
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_STEPS))
    _count: int = 0

    def observe(self, size: int, seconds: float) -> None:
        """A step of this size is done."""
        history, log_seconds = self._sizes.setdefault(size, _History()), math.log(max(seconds, 1e-6))
        if history.log_seconds is None:
            history.first.append(log_seconds)
            if len(history.first) == FEW:
                history.log_seconds = median(history.first)
            return
        change = log_seconds - history.log_seconds
        self._count += 1
        self._ratios.append(math.exp(change))
        weight = min(1.0, seconds / HISTORY_SECONDS)
        history.log_seconds += weight * max(-MOST_CHANGE, min(MOST_CHANGE, change))

    def pace(self) -> Pace | None:
        """None as long as too little is known."""
        if len(self._ratios) < LAST_STEPS:
            return None
        known = [(size, of.log_seconds) for size, of in sorted(self._sizes.items()) if of.log_seconds is not None]
        sizes = [(size, math.exp(log_seconds)) for size, log_seconds in known]
        return Pace(self._count, median(self._ratios), sizes)
