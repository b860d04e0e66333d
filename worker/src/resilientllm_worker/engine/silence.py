"""For how long a stage has said nothing, measured by an engine that was awake to hear it. Pure.

The engine looks at every tick. A tick that comes late counts for two at most: then the engine was asleep itself, or
the machine was, and what the stage said meanwhile may not be read yet.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

TICK_SECONDS = 0.1
LATE_TICKS = 2

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Silences(Generic[K]):
    """As of the last tick; all times in seconds."""

    at: float
    of: Mapping[K, float] = field(default_factory=dict)

    def after(self, now: float, heard: Mapping[K, float], tick: float) -> Silences[K]:
        """``heard``: when each was heard last; who is not in it any more is forgotten."""
        awake = LATE_TICKS * tick
        return Silences(
            now,
            {
                who: (self.of.get(who, 0.0) if last <= self.at else 0.0) + min(now - max(last, self.at), awake)
                for who, last in heard.items()
            },
        )
