"""How long a stage's steps took, as a histogram. Counted in the runner, so with nothing but a list and an addition."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class StepTimes:
    """Written by the runner, read by whoever asks: the sum may be one step ahead of the counts, or behind."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS_SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self._sum += seconds

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """Steps of at most so many seconds, for each upper bound, as Prometheus wants them; and the sum."""
        bounds = (*map(str, BUCKETS_SECONDS), "+Inf")
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum
