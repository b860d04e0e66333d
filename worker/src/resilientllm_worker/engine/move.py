"""A planned move: the pipeline that is to be left still works, so nothing needs to be lost.

    HOLD ──nothing is in flight──► FLUSH ──copies are complete──► STITCH
      └───────────── after a while ───────────────┴─────────────────▲

Each part has a bound, since clients wait. Whatever is missing then is computed again, as after a loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from resilientllm_worker.engine.topology import Assignment

HOLD_SECONDS = 3.0
"""For all steps in flight, which may be long prompts'."""
FLUSH_SECONDS = 2.0


class Phase(Enum):
    HOLD = auto()
    """Nothing is scheduled until all steps in flight are back and what they computed is sealed."""
    FLUSH = auto()
    """The stages to be left send what those to come have not got yet: little but each request's open block."""
    STITCH = auto()
    """All is done that can be."""


@dataclass(frozen=True)
class Move:
    wanted: Assignment
    began: float
    """Monotonic seconds, as all times here."""
    phase: Phase = Phase.HOLD
    held: float | None = None
    flushed: float | None = None

    @property
    def marks(self) -> tuple[tuple[str, float], ...]:
        """The parts of it that were done, each with its end."""
        ends = (("hold", self.held), ("flush", self.flushed))
        return tuple((name, end) for name, end in ends if end is not None)


def advance(move: Move, is_held: bool, is_flushed: bool, now: float) -> Move:
    """``is_flushed``: all that were asked have answered; only asked for in the phase of that name."""
    match move.phase:
        case Phase.HOLD if is_held:
            return replace(move, phase=Phase.FLUSH, held=now)
        case Phase.HOLD if now >= move.began + HOLD_SECONDS:
            return replace(move, phase=Phase.STITCH, held=now)
        case Phase.FLUSH if is_flushed or (move.held is not None and now >= move.held + FLUSH_SECONDS):
            return replace(move, phase=Phase.STITCH, flushed=now)
        case _:
            return move
