"""What programs hold over many runs: only within one life, and of all lives the longest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from resilientllm_cli.chaos.growth import MIB, longest_lives, table


def lines(world: str, program: str, held: Iterable[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Life, descriptors, MiB after each run."""
    return [
        {"world": world, "held": {program: {"life": life, "descriptors": files, "resident_bytes": mebibytes * MIB}}}
        for life, files, mebibytes in held
    ]


def test_a_program_that_was_lost_begins_anew() -> None:
    (life,) = longest_lives(lines("a", "stage-0.0", [(1, 30, 700), (2, 20, 500), (2, 25, 510), (2, 21, 510)]))
    assert life.descriptors == (20, 25, 21)


def test_programs_of_another_world_are_others() -> None:
    lives = longest_lives([*lines("a", "engine-0", [(1, 70, 800)]), *lines("b", "engine-0", [(1, 90, 900)])])
    assert [(life.world, life.runs) for life in lives] == [("a", 1), ("b", 1)]


def test_what_grows_to_the_end_shows() -> None:
    runs = lines("a", "engine-0", [(1, 70 + run, 800 + 10 * run) for run in range(11)])
    *_, row = table(longest_lives(runs)).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a", "engine-0", "11", "70", "80", "80", "800", "850", "900"]
