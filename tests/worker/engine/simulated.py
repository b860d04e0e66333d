"""A pipeline in simulated time, told and judged by the code that does so in production; only its stages are events.

A stage whose heartbeat is late is taken to have stood still for so long, with all that it does: it was not scheduled,
or another thread had the interpreter. How late heartbeats and the engine's ticks are, is drawn from what was measured.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from resilientllm_api.engine_state import LossReason
from resilientllm_api.plan import Limits, StageId
from resilientllm_worker.engine.channel import Channel
from resilientllm_worker.engine.detection import Detector
from resilientllm_worker.engine.pulse import Pulse, next_pulse
from resilientllm_worker.protocol.messages import Heartbeat, Stamp
from resilientllm_worker.stage.deadline import Deadlines
from resilientllm_worker.stage.pace import Steps
from resilientllm_worker.stage.progress import Counts
from resilientllm_worker.stage.step_clock import StepClock

STAMP = Stamp(1, 1)
DECODE, PREFILL = 3, 11
"""Sizes of steps."""


@dataclass(eq=False)
class Place:
    """One stage, and the engine's channel to it."""

    id: StageId
    clock: StepClock
    heartbeat_interval_seconds: float
    counts: Counts = field(default_factory=lambda: Counts(STAMP))
    deadlines: Deadlines = field(default_factory=Deadlines)
    steps: Steps = field(default_factory=Steps)
    steps_done: int = 0
    running: bool = False
    stands_until: float = 0.0
    landed_bytes: int = 0
    # What the channel knows.
    connected: bool = True
    has_kv: bool = True
    heard: float = 0.0
    pulse: Pulse | None = None
    sent: tuple[Stamp, int] | None = None
    answered: tuple[Stamp, int] | None = None

    @property
    def is_stuck(self) -> bool:
        return self.pulse is not None and self.pulse.is_stuck


@dataclass(frozen=True)
class Alarm:
    at: float
    place: int
    reason: LossReason


class Pipeline:
    """Instance 0 of so many stages, always under load. Times in seconds."""

    def __init__(
        self,
        seed: int,
        beat_gaps: Sequence[float],
        ticks: Sequence[float],
        stages: int = 3,
        prefills: float = 0.05,
        limits: Limits | None = None,
    ) -> None:
        """``beat_gaps`` and ``ticks`` are drawn from; ``prefills``: what part of the steps takes two seconds."""
        self.now = 0.0
        self.alarms: list[Alarm] = []
        self.broken: set[tuple[int, str]] = set()
        """What does not happen any more: place, and one of beat, command, link, step."""
        self._limits = limits or Limits()
        self._chance = random.Random(seed)
        self._beat_gaps, self._ticks, self._prefills = beat_gaps, ticks, prefills
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        interval = self._limits.heartbeat_interval_seconds
        self.places = [
            Place(StageId(instance=0, stage=stage), StepClock(lambda: self.now), interval) for stage in range(stages)
        ]
        self._durations: list[tuple[int, float]] = []
        self._detector = Detector(0.0)
        for place in self.places:
            self._after(self._chance.uniform(0, interval), self._beat, place)
        for _ in self.places:
            self._submit()
        self._after(0.1, self._tick)

    def run(self, seconds: float) -> list[Alarm]:
        """Go on for so long, or until the first alarm."""
        end = self.now + seconds
        while not self.alarms and self._events[0][0] < end:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.alarms

    def _after(self, seconds: float, event: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), lambda: event(*arguments)))

    def _once_awake(self, place: Place, event: Callable[..., None], *arguments: Any) -> bool:
        """Whether the stage is awake; if not, the event comes when it is."""
        if self.now >= place.stands_until:
            return True
        self._after(place.stands_until - self.now, event, *arguments)
        return False

    # --- the engine ---------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        channels = cast("list[Channel]", self.places)
        for channel, _ in self._detector.silent(channels, self._limits, self.now):
            self.alarms.append(Alarm(self.now, channel.id.stage, LossReason.SILENCE))
        self._detector.look(0, channels, self.now)
        found = self._detector.suspect(STAMP, channels, self._limits)
        if found is not None:
            self.alarms.append(Alarm(self.now, found.place, found.reason))
        self._after(self._chance.choice(self._ticks), self._tick)

    def _submit(self) -> None:
        step = len(self._durations)
        if self._chance.random() < self._prefills:
            self._durations.append((PREFILL, self._chance.uniform(1.5, 2.5)))
        else:
            self._durations.append((DECODE, self._chance.uniform(0.02, 0.12)))
        for place in self.places:
            place.sent = (STAMP, step)
            self._after(self._chance.uniform(0.0005, 0.02), self._receive, place, step)

    # --- a stage ------------------------------------------------------------------------------------------------

    def _beat(self, place: Place) -> None:
        number = place.id.stage
        if (number, "beat") in self.broken:
            return
        running, allowed = place.clock.read()
        progress = place.counts.told(0, place.landed_bytes)
        beat = Heartbeat(place.steps_done, running, True, None, progress, allowed, place.steps.pace())
        place.pulse = next_pulse(place.pulse, beat, self.now - place.heard, place.heartbeat_interval_seconds)
        place.heard = self.now
        gap = self._chance.choice(self._beat_gaps)
        if (late := gap - place.heartbeat_interval_seconds) > 0:
            self._after(self._chance.uniform(0, gap - late), self._stand, place, late)
        self._after(gap, self._beat, place)

    def _stand(self, place: Place, seconds: float) -> None:
        place.stands_until = self.now + seconds

    def _receive(self, place: Place, step: int) -> None:
        if (place.id.stage, "command") in self.broken or not self._once_awake(place, self._receive, place, step):
            return
        place.counts.received = max(place.counts.received, step)
        self._begin(place)

    def _land(self, place: Place, step: int, parts: int = 0) -> None:
        """``parts``: of the hidden states, that are still to come."""
        if (place.id.stage, "link") in self.broken or not self._once_awake(place, self._land, place, step, parts):
            return
        place.landed_bytes += 1
        if parts:
            self._after(0.2, self._land, place, step, parts - 1)
            return
        place.counts.landed = max(place.counts.landed, step)
        self._begin(place)

    def _begin(self, place: Place) -> None:
        counts, step = place.counts, place.counts.done + 1
        here = counts.received if place.id.stage == 0 else min(counts.received, counts.landed)
        if place.running or step > here:
            return
        place.running = True
        size, seconds = self._durations[step]
        place.clock.begin(place.deadlines.allowed(size))
        self._after(seconds * self._chance.uniform(0.8, 1.3), self._end, place, step)

    def _end(self, place: Place, step: int) -> None:
        if (place.id.stage, "step") in self.broken or not self._once_awake(place, self._end, place, step):
            return
        size, _ = self._durations[step]
        took = place.clock.end()
        place.deadlines.observe(size, took)
        place.steps.observe(size, took)
        place.running = False
        place.steps_done += 1
        place.counts.done = step
        if place.id.stage + 1 < len(self.places):
            following = self.places[place.id.stage + 1]
            slow_link = 4 if size == PREFILL else 0
            self._after(self._chance.uniform(0.0005, 0.03), self._land, following, step, slow_link)
        else:
            place.answered = (STAMP, step)
            self._after(self._chance.uniform(0.0005, 0.01), self._submit)
        self._begin(place)
