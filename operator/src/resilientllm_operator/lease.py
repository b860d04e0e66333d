"""Who may act: leader election over one Lease, by the rules of client-go. Pure: observe, decide, write.

No replica compares its clock with another's. A holder counts its own time from the moment at which it *began* the
write that renewed the lease, and stops acting after ``act_seconds``. Another one counts from the moment at which it
first *saw* that write, which is later, and takes the lease after ``duration_seconds``, which is longer. So two never
act at the same time, as long as one second of a clock is not as long as one and a half of another. What lies between
the two times is for requests that are still on their way.

A write names the resource version that it replaces. Of several replicas that find the lease free, the API server lets
one have it. A Lease that vanishes counts for as long as it would have: only who starts later does not know of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime


@dataclass(frozen=True)
class Terms:
    """In seconds; those of Kubernetes' own components."""

    duration_seconds: int = 15
    """A lease that nobody renewed for so long is free."""
    act_seconds: float = 10.0
    """A holder that could not renew for so long does not act any more."""
    retry_seconds: float = 2.0
    """Between two looks at the lease."""

    def __post_init__(self) -> None:
        if not 2 * self.retry_seconds < self.act_seconds < self.duration_seconds:
            raise ValueError(f"expected 2 * retry_seconds < act_seconds < duration_seconds, found {self}")


@dataclass(frozen=True)
class Record:
    """What a Lease says. Its times are for people."""

    holder: str
    """Empty: it was given back."""
    duration_seconds: int
    acquired: datetime
    renewed: datetime
    transitions: int = 0
    version: str = ""
    """The resource version; empty for a Lease that is still to be made."""


@dataclass(frozen=True)
class Candidate:
    """What one replica knows of the lease. All times but those in the record are of its own monotonic clock."""

    name: str
    """Unique for every process: one that restarts must not take over what it held in an earlier life."""
    terms: Terms = Terms()
    seen: Record | None = None
    free_at: float = float("-inf")
    """From when on another's lease may be taken."""
    renewed_at: float | None = None
    """When the last write that gave us the lease, or renewed it, was begun. None while it is not ours."""

    def observe(self, found: Record | None, now: float) -> Candidate:
        """After reading the lease; None if there is none."""
        ours = self.renewed_at if found is not None and found.holder == self.name else None
        free_at = self.free_at
        if found is not None and found != self.seen:
            free_at = now + found.duration_seconds if found.holder else now
        return replace(self, seen=found, free_at=free_at, renewed_at=ours)

    def decide(self, now: float, date: datetime) -> Record | None:
        """What to write in place of ``seen``; None if it is another's."""
        found = self.seen
        duration = self.terms.duration_seconds
        if found is not None and found.holder == self.name:
            return replace(found, duration_seconds=duration, renewed=date)
        if now < self.free_at:
            return None
        if found is None:
            return Record(self.name, duration, acquired=date, renewed=date)
        return Record(self.name, duration, date, date, found.transitions + 1, found.version)

    def wrote(self, record: Record, begun: float) -> Candidate:
        """After the API server took ``record``, which has its new version. ``begun``: when the request was made."""
        return replace(self, seen=record, free_at=begun, renewed_at=begun)

    def seconds_to_act(self, now: float) -> float:
        """How long this replica may still act; not positive if it may not."""
        return 0.0 if self.renewed_at is None else self.renewed_at + self.terms.act_seconds - now

    def leads(self, now: float) -> bool:
        return self.seconds_to_act(now) > 0

    def give_back(self, date: datetime) -> Record | None:
        """What to write when this replica ends, so that another one need not wait; None if it is not ours."""
        if self.seen is None or self.seen.holder != self.name:
            return None
        return replace(self.seen, holder="", duration_seconds=1, renewed=date)
