"""How far a stage has come with one instance's steps under one stamp: plain counts, for heartbeats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from resilientllm_worker.protocol.messages import Progress, Stamp

NONE_YET = -1


@dataclass
class Counts:
    """A fence replaces the whole object, so that a step of an older stamp that ends late counts for nobody."""

    stamp: Stamp
    received: int = NONE_YET
    """The highest step whose command is here, as are all below it."""
    landed: int = NONE_YET
    """The highest step whose hidden states are here."""
    done: int = NONE_YET
    """The highest step that the runner has finished."""

    @classmethod
    def after_fence(cls, stamp: Stamp, arrived: Iterable[tuple[Stamp, int]]) -> Counts:
        """``arrived``: stamp and step of the hidden states that are here already, since links may be the faster."""
        return cls(stamp, landed=max((step for of, step in arrived if of == stamp), default=NONE_YET))

    def told(self, command_bytes: int, landed_bytes: int) -> Progress:
        return Progress(self.stamp, self.received, self.landed, self.done, command_bytes, landed_bytes)
