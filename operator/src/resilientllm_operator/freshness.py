"""How old the view of each kind is, and whether it may be acted upon.

kopf's watches may be dead without a word: a connection that a middlebox forgot, an API server that hangs. So a view
counts only for a while after it was last confirmed: by an event, by a watch that the API server has just opened for us,
or by a full list. Once the API server could not be reached, only lists that were begun after that confirm anything: a
watch that resumes tells what it missed one by one, and nobody knows when it is through.
"""

from __future__ import annotations

from collections.abc import Collection

MAX_AGE_SECONDS = 45.0
"""An older view is not acted upon."""
DUE_SECONDS = 30.0
"""A view that only gets older is set right by a list from here on: its watch is dead."""
START_SECONDS = 5.0
"""So long a first list waits for the first watch of its kind, since it would have to be made again after it."""


class Freshness:
    """All times are of one monotonic clock, in seconds."""

    def __init__(self, kinds: Collection[str]) -> None:
        self._kinds = tuple(kinds)
        self._confirmed: dict[str, float] = {}
        self._lost_at: dict[str, float] = {}
        self._why = "nothing was listed yet"
        self._first: float | None = None

    def heard(self, kind: str, now: float) -> None:
        """An event of this kind came, or its watch was opened."""
        if kind in self._confirmed:
            self._confirmed[kind] = max(now, self._confirmed[kind])

    def listed(self, kind: str, begun: float) -> None:
        """All objects of this kind were listed. ``begun``: when the list was asked for."""
        if begun >= self._lost_at.get(kind, begun):
            self._confirmed[kind] = max(begun, self._confirmed.get(kind, begun))

    def lost(self, why: str, now: float, kind: str | None = None) -> None:
        """What is known of a kind, or of all, may have missed something."""
        self._why = why
        for each in self._kinds if kind is None else (kind,):
            self._confirmed.pop(each, None)
            self._lost_at[each] = now

    def forget(self, kind: str) -> None:
        """This kind is not looked at."""
        self._kinds = tuple(each for each in self._kinds if each != kind)

    def age(self, kind: str, now: float) -> float:
        return now - self._confirmed[kind] if kind in self._confirmed else float("inf")

    def due(self, now: float) -> tuple[str, ...]:
        """The kinds that are to be listed."""
        self._first = now if self._first is None else self._first
        early = now - self._first < START_SECONDS
        old = (kind for kind in self._kinds if self.age(kind, now) > DUE_SECONDS)
        return tuple(kind for kind in old if not early or kind in self._lost_at or kind in self._confirmed)

    def stale(self, now: float) -> str | None:
        """Why nothing may be decided from the view as a whole; None if it may."""
        for kind in self._kinds:
            age = self.age(kind, now)
            if kind not in self._confirmed:
                return f"{self._why}; {kind} objects are not listed anew yet"
            if age > MAX_AGE_SECONDS:
                return f"{kind} objects were last confirmed {age:.0f} s ago"
        return None
