"""Which stage serves which place, and which keeps copies for it: pure decisions over what the engine sees.

Level-triggered: ask it after any change.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilientllm_api.plan import Plan, ReplicationMode, StageId

Assignment = tuple[StageId | None, ...]
"""For every place of the pipeline the stage that serves it; None where nobody can."""


@dataclass(frozen=True)
class Sight:
    """What the engine knows of one stage."""

    connected: bool
    has_kv: bool
    """Its KV cache is allocated, so it can serve at once."""
    barred_until: float = 0.0
    """Monotonic seconds. It refused, or its link broke while it lived: leave it alone for a while."""
    caught_up: bool = True
    """It has what the stage that serves in its place has sealed, but for the last moment's."""

    def usable(self, now: float) -> bool:
        return self.connected and self.has_kv and now >= self.barred_until


UNSEEN = Sight(connected=False, has_kv=False)


def assign(
    plan: Plan, seen: dict[StageId, Sight], current: Assignment, now: float, keeping: Assignment = ()
) -> Assignment:
    """Own stage first; else stay with the donor at work; else who keeps the copies; else the plan's first donor.

    An own stage that comes back while a donor serves waits until it has caught up.
    """
    chosen: list[StageId | None] = []
    for place, own in enumerate(plan.stages):
        donors = [donor.id for donor in plan.donors[place]]
        favourites = [stage for stage in (_at(current, place), _at(keeping, place)) if stage in donors]
        candidates = [own.id, *favourites, *donors]
        if not seen.get(own.id, UNSEEN).caught_up and _at(current, place) in donors:
            candidates = [*favourites, own.id, *donors]
        chosen.append(next((stage for stage in candidates if seen.get(stage, UNSEEN).usable(now)), None))
    return tuple(chosen)


def keepers(
    plan: Plan, seen: dict[StageId, Sight], assignment: Assignment, keeping: Assignment, now: float
) -> Assignment:
    """For every place the stage that keeps copies of the sealed blocks of whoever serves it; None where nobody can.

    Stays with the one at work: a change means to send everything again. A donor's blocks are kept by the own stage as
    soon as that is there, so that it can take its place back without computing anything.
    """
    chosen: list[StageId | None] = []
    for place, own in enumerate(plan.stages):
        server, candidates = _at(assignment, place), [donor.id for donor in plan.donors[place]]
        present = _at(keeping, place)
        if present in candidates:
            candidates = [present, *candidates]
        wanted = [own.id, *candidates] if server is not None and plan.replication is ReplicationMode.RING else []
        usable = (stage for stage in wanted if stage != server and seen.get(stage, UNSEEN).usable(now))
        chosen.append(next(usable, None))
    return tuple(chosen)


def _at(assignment: Assignment, place: int) -> StageId | None:
    return assignment[place] if place < len(assignment) else None


def is_complete(assignment: Assignment) -> bool:
    return bool(assignment) and all(stage is not None for stage in assignment)


def is_home(plan: Plan, assignment: Assignment) -> bool:
    return assignment == tuple(stage.id for stage in plan.stages)
