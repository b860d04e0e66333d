"""Which stage serves which place, and which keeps copies for it: pure decisions over what the engine sees.

Level-triggered: ask it after any change.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
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
    """It has what the stage that serves in its place has sealed, but for the last moment's; or that is not worth
    waiting for."""
    leaving: bool = False
    """It works, and says that it is about to end."""
    stuck: bool = False
    """It has been in one step for longer than any honest one takes."""

    def usable(self, now: float) -> bool:
        return self.connected and self.has_kv and not self.stuck and now >= self.barred_until


UNSEEN = Sight(connected=False, has_kv=False)


def assign(
    plan: Plan, seen: Mapping[StageId, Sight], current: Assignment, now: float, keeping: Assignment = ()
) -> Assignment:
    """Own stage first; else stay with the donor at work; else who keeps the copies; else the plan's first donor.

    Stages that leave serve only where nobody else can, and lost ones never. While the stage at work still works,
    another one takes its place only when it has caught up.
    """
    chosen: list[StageId | None] = []
    for place, own in enumerate(plan.stages):
        server = _at(current, place)
        known = [own.id, *(donor.id for donor in plan.donors[place])]
        usable = _usable([own.id, server, _at(keeping, place), *known], known, plan, seen, now)
        staying = [stage for stage in usable if not is_leaving(plan, seen, stage)]
        # Among those that all leave, a change would be for nothing.
        wanted = staying or sorted(usable, key=lambda stage: stage != server)
        if server in usable:
            wanted = [stage for stage in wanted if stage == server or seen[stage].caught_up] or [server]
        chosen.append(wanted[0] if wanted else None)
    return tuple(chosen)


def keepers(
    plan: Plan, seen: Mapping[StageId, Sight], assignment: Assignment, keeping: Assignment, now: float
) -> Assignment:
    """For every place the stage that keeps copies of the sealed blocks of whoever serves it; None where nobody can.

    Stays with the one at work: a change means to send everything again. A donor's blocks are kept by the own stage as
    soon as that is there, so that it can take its place back without computing anything. A stage that leaves keeps
    copies only where nobody else can.
    """
    chosen: list[StageId | None] = []
    for place, own in enumerate(plan.stages):
        server = _at(assignment, place)
        known = [own.id, *(donor.id for donor in plan.donors[place])]
        usable = _usable([own.id, _at(keeping, place), *known], known, plan, seen, now)
        wanted = [stage for stage in usable if stage != server]
        wanted.sort(key=lambda stage: is_leaving(plan, seen, stage))
        replicates = server is not None and plan.replication is ReplicationMode.RING
        chosen.append(wanted[0] if wanted and replicates else None)
    return tuple(chosen)


def is_leaving(plan: Plan, seen: Mapping[StageId, Sight], stage: StageId) -> bool:
    """The plan says so, or the stage itself."""
    return stage in plan.leaving or seen.get(stage, UNSEEN).leaving


def _usable(
    preferred: Iterable[StageId | None],
    known: Collection[StageId],
    plan: Plan,
    seen: Mapping[StageId, Sight],
    now: float,
) -> list[StageId]:
    """Those of ``preferred`` that may serve, each once."""
    return [
        stage
        for stage in dict.fromkeys(preferred)
        if stage is not None and stage in known and stage not in plan.lost and seen.get(stage, UNSEEN).usable(now)
    ]


def _at(assignment: Assignment, place: int) -> StageId | None:
    return assignment[place] if place < len(assignment) else None


def is_complete(assignment: Assignment) -> bool:
    return bool(assignment) and all(stage is not None for stage in assignment)


def is_home(plan: Plan, assignment: Assignment) -> bool:
    return assignment == tuple(stage.id for stage in plan.stages)
