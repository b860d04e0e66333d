"""`resilientllm chaos growth`: what programs hold over many runs. A leak too small to show in one run shows over all.

A program's life ends when it is lost, so only the longest life in each world is told. Memory is told at its first run,
half-way and at its last one: what grows at first and then no more is no leak.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MIB = 1 << 20
HEADER = (
    *("world", "program", "runs", "descriptors first", "most", "last"),
    *("MiB first", "half-way", "last"),
)


@dataclass(frozen=True)
class Life:
    world: str
    program: str
    descriptors: tuple[int, ...]
    """After each of its runs."""
    resident_bytes: tuple[int, ...]

    @property
    def runs(self) -> int:
        return len(self.descriptors)


def longest_lives(lines: Iterable[dict[str, Any]]) -> list[Life]:
    found: dict[tuple[str, str], dict[int, list[dict[str, int]]]] = {}
    for line in lines:
        for program, held in line["held"].items():
            found.setdefault((line["world"], program), {}).setdefault(held["life"], []).append(held)
    lives = []
    for (world, program), of_it in found.items():
        longest = max(of_it.values(), key=len)
        descriptors = tuple(held["descriptors"] for held in longest)
        lives.append(Life(world, program, descriptors, tuple(held["resident_bytes"] for held in longest)))
    return lives


def table(lives: Iterable[Life]) -> str:
    """Markdown: a row for each."""
    rows = [HEADER, tuple("---" for _ in HEADER)]
    for life in lives:
        memory = (life.resident_bytes[place] // MIB for place in (0, life.runs // 2, -1))
        descriptors = life.descriptors[0], max(life.descriptors), life.descriptors[-1]
        rows.append((life.world, life.program, str(life.runs), *map(str, descriptors), *map(str, memory)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
