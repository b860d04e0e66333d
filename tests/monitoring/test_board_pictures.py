"""The pictures in the docs are of the boards as they are, and of a run in which each panel had something to show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.board_picture import draw, told
from e2e.monitoring.boards import BOARDS, Chosen, panels

REPOSITORY = Path(__file__).parents[2]
RECORD: dict[str, Any] = json.loads((REPOSITORY / "bench" / "results" / "2026-11-21-boards.json").read_text())


@pytest.mark.parametrize("board", BOARDS)
def test_what_was_recorded_is_what_the_board_asks_for(board: str) -> None:
    chosen = Chosen(**RECORD["chosen"])
    asked = {panel.title: [chosen.fill(query.expression) for query in panel.queries] for panel in panels(board)}
    recorded = {
        panel["title"]: [query["expression"] for query in panel["queries"]] for panel in RECORD["boards"][board]
    }

    assert recorded == asked, "record and draw the boards again: bench/boards.py"


@pytest.mark.parametrize("board", BOARDS)
def test_every_query_had_an_answer_in_a_run_with_real_losses(board: str) -> None:
    empty = [
        (panel["title"], query["expression"])
        for panel in RECORD["boards"][board]
        for query in panel["queries"]
        if not any(series["points"] for series in query["series"])
    ]

    assert empty == []


def test_they_can_be_drawn_again(tmp_path: Path) -> None:
    draw(RECORD, tmp_path)

    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"board-{board}.png" for board in BOARDS}
    assert all((REPOSITORY / "docs" / name).is_file() for name in drawn)


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (0.0834, "s", "83.4 ms"),
        (0.0, "s", "0 s"),
        (150.0, "s", "2.5 min"),
        (0.99923, "percentunit", "99.9 %"),
        (12_345.0, "Bps", "12.3 kB/s"),
        (3_400.0, "short", "3.4 k"),
        (4.0, "none", "4"),
    ],
)
def test_values_are_written_with_their_units(value: float, unit: str, written: str) -> None:
    assert told(value, unit) == written
