"""Everything that the live view shows, as plain data that the demo fills in while it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from resilientllm_api.crd import RecoveryStatus
from resilientllm_cli.streams import Stream

from .observation import Observation
from .report import Kill


@dataclass
class Step:
    """One of the things that the demo does, in order. Times are of ``time.monotonic``."""

    name: str
    """In ``build/demo.json``."""
    title: str
    started: float
    seconds: float | None = None
    """How long it took; None while it goes on."""


@dataclass
class Scene:
    started: float
    steps: list[Step] = field(default_factory=list)
    log: list[tuple[float, str]] = field(default_factory=list)
    """Seconds since the start, and words."""
    waits_for: str = ""
    seen: Observation | None = None
    """The last look at the cluster."""
    streams: Sequence[Stream] = ()
    tokens_wanted: int = 0
    """By each stream."""
    kill: Kill | None = None
    recovery: RecoveryStatus | None = None

    @property
    def step_seconds(self) -> dict[str, float]:
        return {step.name: step.seconds for step in self.steps if step.seconds is not None}
