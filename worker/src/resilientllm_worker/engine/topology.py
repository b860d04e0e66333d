"""Which stage serves which place: a pure decision over what the engine sees.

Level-triggered: ask it after any change.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilientllm_api.plan import Plan, StageId

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

    def usable(self, now: float) -> bool:
        return self.connected and self.has_kv and now >= self.barred_until


UNSEEN = Sight(connected=False, has_kv=False)


def assign(plan: Plan, seen: dict[StageId, Sight], current: Assignment, now: float) -> Assignment:
    """Own stage first; else stay with the donor at work; else the plan's first donor that is usable."""

    def usable(stage: StageId) -> bool:
        return seen.get(stage, UNSEEN).usable(now)

    chosen: list[StageId | None] = []
    for place, own in enumerate(plan.stages):
        at_work = current[place] if place < len(current) else None
        donors = [donor.id for donor in plan.donors[place]]
        if usable(own.id):
            chosen.append(own.id)
        elif at_work in donors and usable(at_work):
            chosen.append(at_work)
        else:
            chosen.append(next((donor for donor in donors if usable(donor)), None))
    return tuple(chosen)


def is_complete(assignment: Assignment) -> bool:
    return bool(assignment) and all(stage is not None for stage in assignment)


def is_home(plan: Plan, assignment: Assignment) -> bool:
    return assignment == tuple(stage.id for stage in plan.stages)
