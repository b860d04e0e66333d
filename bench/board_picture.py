"""A board as a picture: each panel where the board has it, from what `bench.boards` recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from e2e.monitoring.boards import BOARDS, panels

Json = Mapping[str, Any]
Named = tuple[str, list[tuple[int, float]]]
"""What a legend calls a series, and its points: number of the step since the beginning, and value."""

WIDTH_INCHES = 16.0
ROW_INCHES = 0.36
"""Of one row of the board's grid."""
HEAD_INCHES = 1.25
COLUMNS = 24
GAP = {"x": 0.25, "y": 0.55}
"""Between panels, in columns and rows."""
DOTS = 100
PALETTE = 128

PAPER, INK, FAINT = "#ffffff", "#1f2328", "#d0d7de"
COLOURS = ("#3274d9", "#e0701b", "#37872d", "#c4162a", "#8f3bb8", "#0f8a8a", "#b58900", "#6e7781", "#e377c2", "#17223b")
FAULT, PLANNED = "#c4162a", "#3274d9"
ON = "#ff9830"
NAMED = {
    "kept": "#37872d",
    "Kept": "#37872d",
    "recomputed": "#e0701b",
    "Recomputed": "#e0701b",
    "Failed": "#c4162a",
    "Serving": "#37872d",
    "Degraded": "#f2cc0c",
    "Recovering": "#c4162a",
    "Waiting": "#8f3bb8",
}
"""Colours of what has a meaning."""
MOST_NAMES = 14
"""A legend with more says nothing."""


def draw(document: Json, folder: Path) -> None:
    """Writes ``board-NAME.png`` for each board."""
    folder.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {
        "font.size": 8.5,
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        for board in document["boards"]:
            drawn = BytesIO()
            _figure(document, board).savefig(drawn, dpi=DOTS)
            # Of few colours, and without metadata: small, and the same record gives the same file.
            Image.open(drawn).convert("RGB").quantize(PALETTE).save(folder / f"board-{board}.png", optimize=True)


def _figure(document: Json, board: str) -> Figure:
    content = BOARDS[board]
    rows = max(each["gridPos"]["y"] + each["gridPos"]["h"] for each in content["panels"])
    height = HEAD_INCHES + rows * ROW_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=PAPER)

    def place(at: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a place on the grid, in parts of the figure."""
        x, y, w, h = at
        below = height - HEAD_INCHES - (y + h) * ROW_INCHES
        return x / COLUMNS, below / height, w / COLUMNS, h * ROW_INCHES / height

    _head(figure, document, content["title"], height)
    for each in content["panels"]:
        if each["type"] == "row":
            at = each["gridPos"]
            left, bottom, _, tall = place((at["x"], at["y"], at["w"], at["h"]))
            figure.text(left + 0.005, bottom + tall * 0.3, each["title"], fontsize=11, fontweight="bold")
    answers = {each["title"]: each["queries"] for each in document["boards"][board]}
    for panel in (vars(each) | {"queries": answers[each.title]} for each in panels(board)):
        x, y, w, h = panel["place"]
        left, bottom, wide, tall = place((x + GAP["x"] / 2, y + GAP["y"] / 2, w - GAP["x"], h - GAP["y"]))
        figure.add_artist(
            Rectangle((left, bottom), wide, tall, transform=figure.transFigure, facecolor="none", edgecolor=FAINT)
        )
        figure.text(left + 0.005, bottom + tall - 0.19 / height, panel["title"], fontsize=9, fontweight="bold")
        if panel["kind"] == "stat":
            _stat(figure, panel, (left + wide / 2, bottom + tall * 0.42))
            continue
        room = _room(panel, wide * WIDTH_INCHES, tall * height)
        axes = figure.add_axes(
            (
                left + room.left / WIDTH_INCHES,
                bottom + room.bottom / height,
                wide - (room.left + room.right) / WIDTH_INCHES,
                tall - (room.bottom + room.top) / height,
            )
        )
        _PAINTERS[panel["kind"]](axes, panel, document)
        _marks(axes, document)
    return figure


class _room:
    """Inches around a panel's axes: for its title, its ticks, and its legend."""

    def __init__(self, panel: Json, wide: float, tall: float) -> None:
        self.top, self.right = 0.36, 0.12
        if panel["kind"] == "state-timeline":
            longest = max((len(name) for name, _ in _named(panel)), default=0)
            self.left, self.bottom = min(0.25 + 0.068 * longest, wide * 0.55), 0.30
        else:
            self.left = 0.62
            self.bottom = 0.34 + 0.17 * len(_legend_lines(panel, wide))


def _head(figure: Figure, document: Json, title: str, height: float) -> None:
    figure.text(0.008, 1 - 0.36 / height, title, fontsize=15, fontweight="bold")
    streams = document["streams"]
    said = (
        f"2 instances of 2 stages on a Kubernetes of 5 nodes, {document['seconds'] / 60:.1f} min, "
        f"{streams['complete']} of {streams['asked']} streams complete; scraped each {document['step_seconds']:g} s"
    )
    figure.text(0.992, 1 - 0.36 / height, said, fontsize=9, ha="right")
    x = 0.012
    canvas = FigureCanvasAgg(figure)
    for number, each in enumerate(document["faults"], start=1):
        minutes, seconds = divmod(round(each["at"]), 60)
        text = figure.text(
            x,
            1 - 0.78 / height,
            f"{number}  {minutes}:{seconds:02d}  {each['what']}",
            fontsize=9.5,
            color="white",
            bbox={"boxstyle": "round,pad=0.35", "facecolor": _colour_of(each), "edgecolor": "none"},
        )
        renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
        x += text.get_window_extent(renderer).width / figure.bbox.width + 0.016


def _colour_of(each: Json) -> str:
    return PLANNED if "drained" in each["what"] else FAULT


def _marks(axes: Axes, document: Json) -> None:
    axes.set_xlim(0, document["seconds"])
    for number, each in enumerate(document["faults"], start=1):
        axes.axvline(each["at"], color=_colour_of(each), linewidth=0.9, linestyle=(0, (3, 2)), zorder=5)
        axes.text(
            each["at"],
            1.005,
            str(number),
            transform=axes.get_xaxis_transform(),
            fontsize=7,
            color=_colour_of(each),
            ha="center",
            va="bottom",
        )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{int(at // 60)}:{int(at % 60):02d}"))
    axes.tick_params(length=2.5, labelsize=7.5)


def _named(panel: Json) -> list[Named]:
    """Every series, in the order of the legend."""
    found: list[Named] = []
    for query in panel["queries"]:
        for series in query["series"]:
            found.append((_filled(query["legend"], series["labels"]) or "value", series["points"]))
    return sorted(found, key=lambda each: _sort_key(each[0]))


def _filled(legend: str, labels: Mapping[str, str]) -> str:
    name = re.sub(r"{{\s*(\w+)\s*}}", lambda label: labels.get(label[1], ""), legend)
    return " ".join(name.split())


def _sort_key(name: str) -> tuple[int, str]:
    order = list(NAMED)
    return (order.index(name) if name in order else -1, name)


def _legend_lines(panel: Json, wide: float) -> list[list[str]]:
    """The names of a legend, broken into lines that fit."""
    if panel["kind"] == "heatmap":
        return []
    names = list(dict.fromkeys(name for name, _ in _shown(panel)))[:MOST_NAMES]
    lines: list[list[str]] = []
    used = math.inf
    for name in names:
        needs = 0.30 + 0.066 * len(name)
        if used + needs > wide - 0.2:
            lines.append([])
            used = 0.0
        lines[-1].append(name)
        used += needs
    return lines


def _shown(panel: Json) -> list[Named]:
    """What is anything but zero, if that is something: a board of zeros is read as nothing."""
    named = _named(panel)
    telling = [each for each in named if any(value for _, value in each[1])]
    return telling or named


def _lines(axes: Axes, panel: Json, document: Json) -> None:
    custom, step = panel["options"]["custom"], document["step_seconds"]
    bars = custom["drawStyle"] == "bars"
    stacked = custom.get("stacking", {}).get("mode") == "normal"
    floor: dict[int, float] = {}
    names: dict[str, str] = {}
    for name, points in _shown(panel):
        colour = names.setdefault(name, NAMED.get(name, COLOURS[len(names) % len(COLOURS)]))
        xs, ys = [at * step for at, _ in points], [value for _, value in points]
        if bars:
            bases = [floor.get(at, 0.0) for at, _ in points]
            axes.bar(xs, ys, width=step, bottom=bases if stacked else 0.0, color=colour, linewidth=0)
        elif stacked:
            told_then = dict(points)
            grid = range(round(document["seconds"] / step) + 1)
            bases = [floor.get(at, 0.0) for at in grid]
            tops = [base + told_then.get(at, 0.0) for at, base in zip(grid, bases, strict=True)]
            axes.fill_between(
                [at * step for at in grid], bases, tops, step="post", color=colour, alpha=0.75, linewidth=0
            )
        else:
            broken = list(_broken(points, step))
            axes.plot([x for x, _ in broken], [y for _, y in broken], color=colour, linewidth=1.3)
        if stacked:
            for at, value in points:
                floor[at] = floor.get(at, 0.0) + value
    bottom, top = axes.get_ylim()
    low = panel["options"].get("min", bottom)
    if custom.get("scaleDistribution", {}).get("type") == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(low, top if any(value for _, points in _named(panel) for _, value in points) else 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=panel["options"].get("decimals") == 0))
    if (high := panel["options"].get("max")) is not None:
        axes.set_ylim(top=high)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, panel["unit"])))
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    _legend(axes, panel, names)


def _legend(axes: Axes, panel: Json, names: Mapping[str, str]) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_position()
    wide = panel["place"][2] / COLUMNS * WIDTH_INCHES - GAP["x"] / COLUMNS * WIDTH_INCHES
    left = box.x0 - 0.50 / WIDTH_INCHES
    tall = figure.get_figheight()
    for number, line in enumerate(_legend_lines(panel, wide)):
        x, y = left, box.y0 - (0.33 + 0.17 * number) / tall
        for name in line:
            figure.add_artist(
                Line2D([x, x + 0.14 / WIDTH_INCHES], [y, y], color=names[name], linewidth=2.5, solid_capstyle="butt")
            )
            figure.text(x + 0.19 / WIDTH_INCHES, y, name, fontsize=7.5, va="center")
            x += (0.30 + 0.066 * len(name)) / WIDTH_INCHES


def _broken(points: list[tuple[int, float]], step: float) -> Iterator[tuple[float, float]]:
    """Where nothing was told, there is no line."""
    before: int | None = None
    for at, value in points:
        if before is not None and at > before + 1:
            yield (before + 1) * step, math.nan
        yield at * step, value
        before = at


def _states(axes: Axes, panel: Json, document: Json) -> None:
    step = document["step_seconds"]
    named = _shown(panel)
    for row, (_, points) in enumerate(named):
        on = [(at * step, step) for at, value in points if value >= 1]
        axes.broken_barh(on, (row - 0.38, 0.76), facecolors=ON, linewidth=0)
    axes.set_yticks(range(len(named)), [name for name, _ in named])
    axes.set_ylim(len(named) - 0.5, -0.5)
    for row in range(len(named) - 1):
        axes.axhline(row + 0.5, color=FAINT, linewidth=0.5)


def _heat(axes: Axes, panel: Json, document: Json) -> None:
    """Cumulative buckets become what each of them has alone."""
    step = document["step_seconds"]
    by_bound = {float(name): dict(points) for name, points in _named(panel)}
    buckets = sorted(by_bound.items())
    most = max((value for _, counts in buckets for value in counts.values()), default=1.0) or 1.0
    used: list[int] = []
    for row, (_, counts) in enumerate(buckets):
        below = buckets[row - 1][1] if row else {}
        for at, value in counts.items():
            alone = value - below.get(at, 0.0)
            if alone > 0.01:
                used.append(row)
                shade = matplotlib.colormaps["Oranges"](0.35 + 0.65 * min(1.0, alone / most))
                axes.add_patch(Rectangle((at * step, row - 0.5), step, 1, facecolor=shade, linewidth=0))
    low, high = max(0, min(used, default=0) - 1), min(len(buckets) - 1, max(used, default=0) + 1)
    axes.set_ylim(low - 0.5, high + 0.5)
    rows = range(low, high + 1)
    axes.set_yticks(rows, [f"≤ {told(buckets[row][0], 's')}" for row in rows])
    axes.grid(axis="y", color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)


def _stat(figure: Figure, panel: Json, at: tuple[float, float]) -> None:
    (query,) = panel["queries"]
    values = [series["points"][-1][1] for series in query["series"]]
    text = told(values[0], panel["unit"], panel["options"].get("decimals")) if values else "no data"
    colour = _by_threshold(values[0], panel["options"]) if values else FAINT
    figure.text(*at, text, fontsize=25, fontweight="bold", color=colour, ha="center", va="center")


def _by_threshold(value: float, options: Json) -> str:
    colours = {"green": "#37872d", "orange": "#e0701b", "red": "#c4162a", "blue": "#3274d9"}
    steps = options["thresholds"]["steps"]
    reached = [each["color"] for each in steps if each["value"] is None or value >= each["value"]]
    return colours[reached[-1]]


def told(value: float, unit: str, decimals: int | None = None) -> str:
    """As Grafana writes it."""
    if not math.isfinite(value):
        return "∞"
    match unit:
        case "percentunit":
            return f"{100 * value:.{decimals if decimals is not None else 1}f}".rstrip("0").rstrip(".") + " %"
        case "s":
            if value and abs(value) < 1e-3:
                return f"{value * 1e6:.3g} µs"
            if value and abs(value) < 1:
                return f"{value * 1e3:.3g} ms"
            return f"{value:.3g} s" if abs(value) < 100 else f"{value / 60:.3g} min"
        case "Bps":
            return _scaled(value, 1000.0, ("B/s", "kB/s", "MB/s", "GB/s"))
        case "ops":
            return f"{value:.3g}/s"
        case _:
            return f"{value:.0f}" if decimals == 0 else _scaled(value, 1000.0, ("", "k", "M", "G")).strip()


def _scaled(value: float, by: float, names: tuple[str, ...]) -> str:
    for name in names[:-1]:
        if abs(value) < by:
            return f"{value:.3g} {name}".strip()
        value /= by
    return f"{value:.3g} {names[-1]}"


_PAINTERS = {"timeseries": _lines, "state-timeline": _states, "heatmap": _heat}
