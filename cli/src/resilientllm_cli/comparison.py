"""What a client lost: one stream against the same stream undisturbed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from statistics import median


@dataclass(frozen=True)
class Tokens:
    """How the tokens that a client got differ from those that it should have got."""

    delivered: int = 0
    lost: int = 0
    """Should have come, and did not: left out, or cut off at the end."""
    duplicated: int = 0
    """Came again."""
    changed: int = 0
    """Came in place of another, or should never have come."""

    @property
    def unharmed(self) -> bool:
        return self.lost == self.duplicated == self.changed == 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.delivered + other.delivered,
            self.lost + other.lost,
            self.duplicated + other.duplicated,
            self.changed + other.changed,
        )


def compare(expected: Sequence[int], delivered: Sequence[int]) -> Tokens:
    """Of an alignment that keeps as much in common as possible: what is missing is lost, what was put in between is
    duplicated if it repeats what came just before it, else changed; what was replaced is changed."""
    if list(expected) == list(delivered):
        return Tokens(delivered=len(delivered))
    lost = duplicated = changed = 0
    for kind, i, j, k, m in SequenceMatcher(None, expected, delivered, autojunk=False).get_opcodes():
        missing, extra = j - i, m - k
        if kind == "insert" and _repeats(delivered, k, m):
            duplicated += extra
        elif kind != "equal":
            changed += extra
            lost += max(0, missing - extra)
    return Tokens(len(delivered), lost, duplicated, changed)


def _repeats(tokens: Sequence[int], start: int, end: int) -> bool:
    """Whether ``tokens[start:end]`` came just before; or comes right after, which is the same to an alignment."""
    length, inserted = end - start, list(tokens[start:end])
    before, after = tokens[max(0, start - length) : start], tokens[end : end + length]
    return inserted in (list(before), list(after))


def total(tokens: Iterable[Tokens]) -> Tokens:
    return sum(tokens, Tokens())


def gaps(arrivals_seconds: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(arrivals_seconds)]


def stall_seconds(arrivals_seconds: Sequence[float], since_seconds: float | None = None) -> float:
    """The largest gap between tokens, less the median one: what the disturbance added to normal decoding.

    ``since_seconds``: count only gaps that ended after this time, when the disturbance was made. Raises ValueError when
    no gap did: then the stream was over and says nothing.
    """
    seen = [
        (later, later - earlier)
        for earlier, later in pairwise(arrivals_seconds)
        if since_seconds is None or later > since_seconds
    ]
    if not seen:
        raise ValueError("expected tokens after the disturbance, found none: the stream was over before it")
    return max(gap for _, gap in seen) - median(gaps(arrivals_seconds))


def percentile(samples: Sequence[float], percent: float) -> float:
    """The smallest sample that at least ``percent`` of all do not exceed (nearest rank): one that was measured."""
    if not samples:
        raise ValueError("expected at least one sample")
    rank = -(-len(samples) * percent // 100)
    return sorted(samples)[max(0, int(rank) - 1)]
