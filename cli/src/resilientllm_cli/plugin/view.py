"""How the plan of an object looks on a terminal. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from resilientllm_api.crd import ResilientLLM
from resilientllm_api.pairing import Donors, Location
from resilientllm_api.plan import StageId
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from resilientllm_cli.status.of_object import name_of

NOBODY = "-"


def plan(obj: ResilientLLM, donors: Donors, locations: Mapping[StageId, Location]) -> RenderableType:
    """For every stage who keeps its copies and stands in for it, in order of preference."""
    table = Table("stage", "where", "pair", "and then")
    for stage, ranked in donors.items():
        pair, *others = (_placed(each, locations) for each in ranked) if ranked else ("[yellow]nobody",)
        table.add_row(
            str(stage),
            _where(locations.get(stage)),
            pair,
            ", ".join(others) or NOBODY,
            end_section=stage.stage == obj.spec.stages - 1,
        )
    published = obj.status.plan if obj.status else None
    version = f"plan {published.version}" if published else "no plan is published yet"
    return Group(
        f"[bold]{name_of(obj)}[/]  {version}, failure domains by {escape(obj.spec.replication.topology_key)}", table
    )


def _placed(stage: StageId, locations: Mapping[StageId, Location]) -> str:
    return f"{stage} ({_where(locations.get(stage))})"


def _where(location: Location | None) -> str:
    if location is None or location.host is None:
        return "nowhere"
    return escape(location.host if location.domain in (None, location.host) else f"{location.domain}: {location.host}")
