"""The picture of a topology: a grid of instances × stages, and the recoveries below it. Pure.

Nothing is said by colour alone: a pipe and NO_COLOR lose none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from resilientllm_cli.status.topology import Instance, Place, Recovery, Topology

READY, NOT_READY, ARROW = "●", "○", " ─► "
NOBODY = "-"
GRID = 3
"""Columns of a cell beside its text: a line and two spaces."""


def picture(topology: Topology, now: datetime, width: int) -> RenderableType:
    """``width``: columns that there are. Where not all stages fit side by side, the rest follows below."""
    head = Text.assemble((topology.name, "bold"), f"  {topology.summary}")
    parts: list[RenderableType] = [head, *(Text(each, "yellow") for each in topology.remarks)]
    parts += grids(topology, width)
    if topology.recoveries:
        parts.append(recoveries(topology, now))
        parts.append(_phases(topology.recoveries[0]))
    return Group(*parts)


def grids(topology: Topology, width: int) -> list[Table]:
    """A row for each instance, a column for each stage."""
    engines = [_engine(each, topology) for each in topology.instances]
    places = [[_place(place, topology) for place in each.places] for each in topology.instances]
    columns = max(map(len, places), default=0)
    first = max(map(_width, engines), default=0)
    cell = max((_width(each) for row in places for each in row), default=0)
    fitting = max((width - 1 - first - GRID) // (cell + GRID), 1)
    grids = []
    for left in range(0, columns, fitting):
        stages = slice(left, min(left + fitting, columns))
        table = Table(show_lines=True)
        table.add_column("", overflow="fold", max_width=first)
        for stage in range(columns)[stages]:
            table.add_column(f"stage {stage}", overflow="fold")
        for instance, engine, row in zip(topology.instances, engines, places, strict=True):
            table.add_row(Text("\n").join([engine, _pipeline(instance.places[stages])]), *row[stages])
        grids.append(table)
    return grids


def _width(text: Text) -> int:
    return max(line.cell_len for line in text.split("\n"))


def _engine(instance: Instance, topology: Topology) -> Text:
    lines = [
        Text(f"instance {instance.number}", "bold"),
        Text(instance.phase, "green" if instance.whole else "yellow"),
    ]
    published, held = topology.plan_version, instance.plan_version
    if published is not None and held is not None and held != published:
        lines.append(Text(f"holds plan {held} of {published}", "yellow"))
    return Text("\n").join([*lines, *_where(instance.engine, instance.node)])


def _pipeline(places: Sequence[Place]) -> Text:
    return Text(ARROW).join(_server(each) for each in places)


def _server(place: Place) -> Text:
    if place.served_by is None:
        return Text(f"no {place.stage}", "red")
    return Text(place.served_by, "yellow" if place.borrowed else "")


def _place(place: Place, topology: Topology) -> Text:
    """A cell: the stage, whom it serves, who serves in its place, and who keeps the copies of that place."""
    state = (
        Text(f"{READY} {place.stage}", "green") if place.ready else Text(f"{NOT_READY} {place.stage} not ready", "red")
    )
    lines = [state, _tenants(place.stage, topology)]
    if place.served_by is None:
        lines.append(Text(f"nobody serves place {place.stage}", "red"))
    elif place.borrowed:
        lines.append(Text(f"donor {place.served_by} serves place {place.stage}", "yellow"))
    lines.append(_copies(place))
    return Text("\n").join([*lines, *_where(place.process, place.node)])


def _tenants(stage: str, topology: Topology) -> Text:
    home, _, _ = stage.partition(".")
    words = ["home" if number == int(home) else f"guest {number}" for number in topology.served_by(stage)]
    guests = any(word != "home" for word in words)
    return Text("serves " + (" and ".join(words) or "nobody"), "yellow" if guests else "")


def _copies(place: Place) -> Text:
    pair = f" (pair {place.pair})" if place.pair not in (None, place.kept_by) else ""
    if place.kept_by is None:
        return Text(f"no copies{pair}")
    return Text.assemble(f"copies on {place.kept_by}{pair}, lag ", _lag(place.lag_seconds))


def _lag(seconds: int | None) -> Text:
    if seconds is None:
        return Text("unknown")
    return Text("< 1 s") if seconds == 0 else Text(f"{seconds} to {2 * seconds} s", "yellow")


def _where(process: str | None, node: str | None) -> list[Text]:
    return [Text(each, "dim") for each in (process, node and f"on {node}") if each]


def recoveries(topology: Topology, now: datetime) -> Table:
    table = Table()
    for heading in ("recovery", "ago", "places", "by", "took", "requests", "tokens recomputed", "kept"):
        table.add_column(heading, overflow="fold")
    for each in topology.recoveries:
        cells = (
            each.kind + (f" ({each.reason})" if each.reason else ""),
            _ago(each.detected_at, now),
            ", ".join(each.places),
            each.donor or "itself",
            each.took or "not over",
            str(each.requests),
            str(each.tokens_recomputed),
            str(each.tokens_kept),
        )
        table.add_row(*map(Text, cells))
    return table


def _phases(recovery: Recovery) -> Text:
    told = {name: ms for name, ms in recovery.phases_ms.items() if name != "total"}
    return Text(f"phases of the last one: {_milliseconds(told) or 'not told'}")


def _milliseconds(phases: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ms:.3g} ms" for name, ms in phases.items())


def _ago(then: datetime, now: datetime) -> str:
    seconds = max(int((now - then).total_seconds()), 0)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
