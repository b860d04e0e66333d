"""Durations as people write them in Kubernetes objects: ``250ms``, ``30s``, ``1m30s``."""

from __future__ import annotations

import re

DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
"""The part of Go's duration syntax that is taken; CEL's ``duration()`` reads it too."""

_SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """``1m30s`` → 90.0. Raises ValueError for anything that :data:`DURATION_PATTERN` does not match."""
    if not re.fullmatch(DURATION_PATTERN[1:-1], text):
        raise ValueError(f"{text!r} is not a duration: expected a number and a unit, such as 250ms, 30s or 1m30s")
    return sum(float(n) * _SECONDS_PER_UNIT[unit] for n, unit in re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", text))


def format_ms(milliseconds: float) -> str:
    """The shortest form that a person wants to read: ``87ms``, ``1.9s``, ``41s``."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f}ms"
    seconds = milliseconds / 1000
    return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
