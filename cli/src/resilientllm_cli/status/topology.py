"""Instances × stages at one moment, as plain data: what a picture is drawn from, wherever it is known from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Place:
    """A place of an instance's pipeline, and the stage that was made for it. Stages are written ``instance.stage``."""

    stage: str
    """The own stage, which is also the place's name."""
    ready: bool
    served_by: str | None
    """The own stage, a donor, or nobody."""
    pair: str | None = None
    kept_by: str | None = None
    lag_seconds: int | None = None
    """Rounded down to 0 or a power of two."""
    process: str | None = None
    """Of the own stage: its pod, or its process id."""
    node: str | None = None

    @property
    def borrowed(self) -> bool:
        return self.served_by not in (None, self.stage)


@dataclass(frozen=True)
class Instance:
    number: int
    phase: str
    whole: bool
    """Serves on its own stages."""
    engine: str | None
    """Its pod, or the URL of its API."""
    node: str | None
    plan_version: int | None
    """Of the plan that the engine holds."""
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Recovery:
    kind: str
    reason: str | None
    """How the loss was noticed; None where nothing was lost."""
    places: tuple[str, ...]
    """That changed hands."""
    donor: str | None
    detected_at: datetime
    took: str | None
    """For people; None while it is not over."""
    phases_ms: Mapping[str, float]
    requests: int
    tokens_recomputed: int
    tokens_kept: int


@dataclass(frozen=True)
class Topology:
    name: str
    healthy: bool
    """Every instance serves, on stages of its own, as it is asked for."""
    summary: str
    """In a few words: how many serve, and where."""
    remarks: tuple[str, ...] = ()
    """What is not as it should be, for people."""
    instances: tuple[Instance, ...] = ()
    plan_version: int | None = None
    """Of the plan that was published."""
    recoveries: tuple[Recovery, ...] = ()
    """The newest first."""

    def served_by(self, stage: str) -> tuple[int, ...]:
        """The instances that a stage serves: home first, then guests."""
        home = int(stage.partition(".")[0])
        served = [each.number for each in self.instances for place in each.places if place.served_by == stage]
        return tuple(sorted(served, key=lambda number: (number != home, number)))
