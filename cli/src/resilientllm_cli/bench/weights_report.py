"""What was measured of weights, for `build/bench.json` and as a table. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from rich.table import Table

from resilientllm_cli.bench.estimates import mean_ratio
from resilientllm_cli.bench.weights_run import SOURCES, Giving, Start

Distribution = Callable[[Sequence[float]], dict[str, Any]]


def document(starts: Sequence[Start], giving: Sequence[Giving], distribution: Distribution) -> dict[str, Any]:
    counted = [each for each in giving if each.within and each.before]
    slower = mean_ratio([(mean(each.within), mean(each.before)) for each in counted])
    return {
        "starts": {source: _of_source(starts, source, distribution) for source in SOURCES},
        "giving": {
            "token_interval_seconds": {
                "giving": distribution([gap for each in counted for gap in each.within]),
                "not_giving": distribution([gap for each in counted for gap in each.before]),
            },
            "interval_giving_over_not": None if slower is None else asdict(slower),
            "bytes_per_second": [each.burst_bytes / each.burst_seconds for each in giving],
        },
    }


def _of_source(starts: Sequence[Start], source: str, distribution: Distribution) -> dict[str, Any]:
    mine = [start for start in starts if start.source == source]
    return {
        "ready_seconds": distribution([start.ready_seconds for start in mine]),
        "load_seconds": distribution([start.load_seconds for start in mine]),
        "bytes": mine[0].nbytes if mine else None,
        "resident_before": [start.resident_before for start in mine],
    }


def table(result: Mapping[str, Any]) -> Table:
    view = Table(title="A stage that starts gets its weights", title_justify="left")
    for heading in ("", "n", "weights, median", "p99", "from start to weights, median", "p99"):
        view.add_column(heading, justify="left" if not heading else "right")
    for source, found in result["starts"].items():
        figures = [found[name][part] for name in ("load_seconds", "ready_seconds") for part in ("p50", "p99")]
        shown = ["-" if figure is None else f"{figure:.2f} s" for figure in figures]
        view.add_row(source.replace("_", " "), str(found["load_seconds"]["n"]), *shown)
    intervals, slower = result["giving"]["token_interval_seconds"], result["giving"]["interval_giving_over_not"]
    if slower is not None:
        for name, found in intervals.items():
            view.add_row(f"token interval, {name.replace('_', ' ')}", str(found["n"]), f"{found['p50']:.3f} s")
        view.add_row("  ratio of means", str(slower["n"]), f"{slower['value']:.2f}", f"{slower['low']:.2f} …", "", "")
        rate = median(result["giving"]["bytes_per_second"])
        view.add_row("  given meanwhile", "", f"{rate / 1e6:.0f} MB/s")
    return view
