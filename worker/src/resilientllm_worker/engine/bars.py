"""Stages that are left alone for a while, because they refused, or because a link to them broke though they live.

Twice as long every time, so that a broken path between two living stages does not become an endless loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilientllm_api.plan import StageId

FIRST_SECONDS = 1.0
LONGEST_SECONDS = 8.0
FORGIVEN_AFTER_SECONDS = 30.0


@dataclass(frozen=True)
class _Bar:
    until: float
    seconds: float


class Bars:
    def __init__(self) -> None:
        self._bars: dict[StageId, _Bar] = {}

    def add(self, stage: StageId, now: float) -> None:
        last = self._bars.get(stage)
        again = last is not None and now - last.until < FORGIVEN_AFTER_SECONDS
        seconds = min(2 * last.seconds, LONGEST_SECONDS) if last is not None and again else FIRST_SECONDS
        self._bars[stage] = _Bar(now + seconds, seconds)

    def until(self, stage: StageId) -> float:
        """Monotonic seconds; 0 if it was never barred."""
        bar = self._bars.get(stage)
        return bar.until if bar is not None else 0.0
