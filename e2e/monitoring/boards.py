"""The boards' panels and what they ask, with Grafana's variables filled in as Grafana does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "manifests" / "grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    board: str
    title: str
    kind: str
    """Of Grafana: ``timeseries``, ``stat``, ``state-timeline``, ``heatmap``."""
    unit: str
    options: dict[str, Any]
    """``fieldConfig.defaults``."""
    queries: tuple[Query, ...]
    place: tuple[int, int, int, int]
    """x, y, width and height on a grid of 24 columns."""

    @property
    def is_instant(self) -> bool:
        """It shows one value, that at the end of the chosen time."""
        return self.kind == "stat"


@dataclass(frozen=True)
class Chosen:
    """What stands in the variables of a board."""

    namespace: str
    name: str
    range_seconds: float
    rate_interval_seconds: float

    def fill(self, expression: str) -> str:
        filled = (
            expression.replace("$__rate_interval", f"{self.rate_interval_seconds:.0f}s")
            .replace("$__range", f"{self.range_seconds:.0f}s")
            .replace("$namespace", self.namespace)
            .replace("$name", self.name)
        )
        assert "$" not in filled, f"a variable that nobody fills in: {filled}"
        return filled


def panels(board: str) -> Iterator[Panel]:
    for each in BOARDS[board]["panels"]:
        if each["type"] == "row":
            continue
        at, defaults = each["gridPos"], each["fieldConfig"]["defaults"]
        yield Panel(
            board=board,
            title=each["title"],
            kind=each["type"],
            unit=defaults["unit"],
            options=defaults,
            queries=tuple(Query(target["expr"], target.get("legendFormat", "")) for target in each["targets"]),
            place=(at["x"], at["y"], at["w"], at["h"]),
        )


def marks(board: str) -> list[str]:
    """Expressions of what is marked on every graph."""
    return [each["expr"] for each in BOARDS[board]["annotations"]["list"]]
