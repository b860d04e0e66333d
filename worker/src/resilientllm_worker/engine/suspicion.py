"""Whether a pipeline moves, and who holds it up: a pure judgement over what was sent and what the stages say.

Stages tell facts (`Progress`), and only the engine knows what each of them should have. The earliest place that has
all it needs, and does not move, is the culprit. What moves slowly is slow, not lost: bytes that come in count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from resilientllm_api.engine_state import LossReason

from resilientllm_worker.protocol.messages import Progress


class Awaited(Enum):
    """What a place needs next."""

    COMMAND = auto()
    """A step that was sent to it has not come, though its heartbeats do: that path is cut one way."""
    HIDDEN_STATES = auto()
    """The place before has done a step, and nothing of it comes over the link."""
    TURN = auto()
    """All of a step is here; the runner is free, and does not take it up."""
    RESULT = auto()
    """It has done a step, and the engine has no answer."""


@dataclass(frozen=True)
class Facts:
    """Of one place, under the stamp at hand. Steps count from 0; -1 is none yet."""

    sent: int
    """The highest step that the engine has sent to it."""
    answered: int
    """The highest step whose result the engine has; only the last place gives any."""
    progress: Progress | None
    """None: it has not said anything under this stamp."""
    steps_done: int
    step_seconds: float
    is_stuck: bool
    witnessed: float
    """Seconds of the stage's own time (`pulse`)."""


@dataclass(frozen=True)
class Wait:
    """A place has needed ``awaited`` since then, and meanwhile nothing of it has moved."""

    awaited: Awaited
    step: int
    counters: tuple[int, ...]
    """Another value of any of them is a movement."""
    since: tuple[float, ...]
    """`Facts.witnessed` of each who has to be awake for it to come."""


Waits = tuple[Wait | None, ...]


@dataclass(frozen=True)
class Suspicion:
    place: int
    """Of the stage that does not move; of a silent link its far end, which gets nothing."""
    reason: LossReason
    detail: str


def wait(before: Waits, places: Sequence[Facts]) -> Waits:
    """What each place waits for now. ``before``: of the same stamp, or empty."""
    waits: list[Wait | None] = []
    for place in range(len(places)):
        last = before[place] if place < len(before) else None
        needed = _needed(place, places)
        if needed is None:
            waits.append(None)
        elif last is not None and (last.awaited, last.counters) == (needed[0], needed[2]):
            waits.append(last)
        else:
            waits.append(Wait(*needed, since=_clocks(needed[0], place, places)))
    return tuple(waits)


def _needed(place: int, places: Sequence[Facts]) -> tuple[Awaited, int, tuple[int, ...]] | None:
    facts, progress = places[place], places[place].progress
    if progress is None:
        return None
    if progress.received < facts.sent:
        return Awaited.COMMAND, progress.received + 1, (progress.received, progress.command_bytes)
    here = progress.received
    if place > 0:
        if (earlier := places[place - 1].progress) is None:
            return None
        if progress.landed < earlier.done:
            return Awaited.HIDDEN_STATES, progress.landed + 1, (progress.landed, progress.landed_bytes)
        here = min(here, progress.landed)
    if progress.done < here:
        if facts.step_seconds:
            return None  # it may be the other tenant's; and if it takes too long, that is another matter
        return Awaited.TURN, progress.done + 1, (progress.done, facts.steps_done)
    if place == len(places) - 1 and facts.answered < progress.done:
        return Awaited.RESULT, facts.answered + 1, (facts.answered,)
    return None


def _clocks(awaited: Awaited, place: int, places: Sequence[Facts]) -> tuple[float, ...]:
    """A link waits in the time of both ends: a sender may sleep between doing a step and sending it."""
    first = place - 1 if awaited is Awaited.HIDDEN_STATES else place
    return tuple(facts.witnessed for facts in places[first : place + 1])


def _held(waiting: Wait, place: int, places: Sequence[Facts]) -> float:
    now = _clocks(waiting.awaited, place, places)
    return min(clock - since for clock, since in zip(now, waiting.since, strict=True))


def suspect(waits: Waits, places: Sequence[Facts], patience: Mapping[Awaited, float]) -> Suspicion | None:
    """The first place that has not moved for longer than the seconds that ``patience`` gives it."""
    for place, (waiting, facts) in enumerate(zip(waits, places, strict=True)):
        if facts.is_stuck:
            return Suspicion(place, LossReason.HANG, f"a step has been running for {facts.step_seconds:.1f} s")
        if waiting is None or (held := _held(waiting, place, places)) < patience[waiting.awaited]:
            continue
        match waiting.awaited:
            case Awaited.COMMAND:
                detail = f"it has heartbeats, but step {waiting.step} has not reached it for {held:.1f} s"
                return Suspicion(place, LossReason.UNREACHABLE, detail)
            case Awaited.RESULT:
                detail = f"it has done step {waiting.step}, but its result has not come for {held:.1f} s"
                return Suspicion(place, LossReason.UNREACHABLE, detail)
            case Awaited.HIDDEN_STATES:
                detail = f"the link is silent: step {waiting.step} has been on its way for {held:.1f} s"
                return Suspicion(place, LossReason.NEIGHBOUR, detail)
            case Awaited.TURN:
                detail = f"it has all of step {waiting.step}, and has not begun it for {held:.1f} s"
                return Suspicion(place, LossReason.HANG, detail)
    return None
