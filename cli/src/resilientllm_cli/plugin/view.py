"""How an object looks on a terminal. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

from resilientllm_api.crd import (
    NOTHING_OBSERVED,
    PAUSED_ANNOTATION,
    ConditionStatus,
    ConditionType,
    InstancePhase,
    InstanceStatus,
    RecoveryMode,
    ResilientLLM,
    StageStatus,
)
from resilientllm_api.pairing import Donors, Location
from resilientllm_api.plan import StageId
from resilientllm_api.reasons import Reason
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

NOBODY = "-"
AS_IT_SHOULD_BE: dict[str, ConditionStatus] = {
    ConditionType.READY: ConditionStatus.TRUE,
    ConditionType.AVAILABLE: ConditionStatus.TRUE,
    ConditionType.DEGRADED: ConditionStatus.FALSE,
    ConditionType.PROGRESSING: ConditionStatus.FALSE,
    ConditionType.RECOVERING: ConditionStatus.FALSE,
    ConditionType.RECONCILING: ConditionStatus.FALSE,
    ConditionType.STALLED: ConditionStatus.FALSE,
    ConditionType.REPLICATION_HEALTHY: ConditionStatus.TRUE,
}
WITHOUT_CAVEAT = {Reason.ALL_INSTANCES_SERVING, Reason.AS_SPECIFIED, Reason.REPLICATING}


def status(obj: ResilientLLM, now: datetime) -> RenderableType:
    """Instances, stages, and the last recoveries; and in words what is not as it should be."""
    if obj.status is None or obj.status.observed_generation in (None, NOTHING_OBSERVED):
        return f"[bold]{name_of(obj)}[/]: no status yet. If this stays, see whether the operator runs."
    parts: list[RenderableType] = [
        f"[bold]{name_of(obj)}[/]  {obj.status.ready or '?'} instances serve  {escape(obj.status.endpoint or '')}",
        *(f"[yellow]{escape(line)}[/]" for line in remarks(obj)),
        instances(obj),
        stages(obj),
    ]
    if obj.status.recoveries:
        parts.append(recoveries(obj, now))
    return Group(*parts)


def name_of(obj: ResilientLLM) -> str:
    return f"{obj.metadata['namespace']}/{obj.metadata['name']}"


def remarks(obj: ResilientLLM) -> Iterator[str]:
    """What is not as it should be, in the operator's words; the same words once."""
    assert obj.status is not None
    if obj.status.observed_generation != obj.metadata.get("generation"):
        yield "The operator has not seen the present spec yet."
    if (obstacle := why_nothing_moves(obj)) is not None:
        yield f"No stage that works is moved, because {obstacle}."
    told: set[str] = set()
    for each in obj.status.conditions:
        quiet = each.reason in WITHOUT_CAVEAT and each.status == AS_IT_SHOULD_BE.get(each.type)
        if not quiet and each.message not in told:
            told.add(each.message)
            yield f"{each.type}={each.status} ({each.reason}): {each.message}"
    for instance in obj.status.instances:
        for stage in instance.stages:
            name = f"Stage {instance.instance}.{stage.stage}"
            if stage.leaving is not None:
                follows = f"pod {stage.successor} follows" if stage.successor else "no pod can follow yet"
                yield f"{name} is to leave: {stage.leaving}; {follows}."
            if stage.warning is not None:
                yield f"{name}: {stage.warning}."
    for node in obj.status.nodes:
        yield f"Node {node.name} is avoided: {node.evidence}"
    yield from (f"Would do: {each}" for each in obj.status.would_do)


def why_nothing_moves(obj: ResilientLLM) -> str | None:
    if obj.metadata.get("annotations", {}).get(PAUSED_ANNOTATION) == "true":
        return f"the annotation {PAUSED_ANNOTATION} pauses it"
    if obj.spec.recovery.mode is RecoveryMode.OBSERVE:
        return f"spec.recovery.mode is {RecoveryMode.OBSERVE}"
    if obj.status is not None and obj.status.breaker is not None and obj.status.breaker.tripped:
        return "too many stages failed at once (status.breaker)"
    return None


def instances(obj: ResilientLLM) -> Table:
    assert obj.status is not None
    table = _table("instance", "phase", "engine", "on node", "plan", "pipeline")
    for each in obj.status.instances:
        table.add_row(
            str(each.instance),
            f"[{'green' if each.phase is InstancePhase.SERVING else 'yellow'}]{each.phase}",
            each.engine or NOBODY,
            each.node or NOBODY,
            _plan(obj, each),
            " ─► ".join(_server(each, stage) for stage in each.stages),
        )
    return table


def _plan(obj: ResilientLLM, instance: InstanceStatus) -> str:
    assert obj.status is not None
    held, published = instance.plan_version, obj.status.plan
    if held is None or published is None or held == published.version:
        return NOBODY if held is None else str(held)
    return f"[yellow]{held} (of {published.version})"


def _server(instance: InstanceStatus, stage: StageStatus) -> str:
    own = f"{instance.instance}.{stage.stage}"
    if stage.served_by is None:
        return f"[red]no {own}[/]"
    return stage.served_by if stage.served_by == own else f"[yellow]{stage.served_by}[/]"


def stages(obj: ResilientLLM) -> Table:
    """One row for each stage: where it is, what it does now, and who would do it for it."""
    assert obj.status is not None
    table = _table("stage", "pod", "on node", "ready", "serves", "pair", "kept by", "lag")
    serves: dict[str, list[str]] = {}
    for instance in obj.status.instances:
        for place in instance.stages:
            if place.served_by is not None:
                serves.setdefault(place.served_by, []).append(str(instance.instance))
    for instance in obj.status.instances:
        for place in instance.stages:
            own = f"{instance.instance}.{place.stage}"
            table.add_row(
                own,
                place.pod or NOBODY,
                place.node or NOBODY,
                "[green]yes" if place.ready else "[yellow]no",
                " and ".join(f"instance {each}" for each in serves.get(own, ())) or NOBODY,
                place.pair or NOBODY,
                place.kept_by or NOBODY,
                _lag(place.lag_seconds),
                end_section=place is instance.stages[-1],
            )
    return table


def _lag(seconds: int | None) -> str:
    """The status has it rounded down to a power of two."""
    if seconds is None:
        return NOBODY
    return "< 1 s" if seconds == 0 else f"[yellow]{seconds} to {2 * seconds} s"


def recoveries(obj: ResilientLLM, now: datetime) -> Table:
    assert obj.status is not None
    table = _table("recovery", "ago", "places", "by", "took", "requests", "tokens recomputed", "kept")
    for each in reversed(obj.status.recoveries):
        table.add_row(
            str(each.kind) + (f" ({each.reason})" if each.reason else ""),
            _ago(each.detected_at, now),
            ", ".join(f"{each.instance}.{stage}" for stage in each.stages),
            each.donor or "itself",
            each.took or "not over",
            str(each.requests_affected),
            str(each.tokens_recomputed),
            str(each.tokens_kept),
        )
    return table


def _ago(then: datetime, now: datetime) -> str:
    seconds = max(int((now - then).total_seconds()), 0)
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def plan(obj: ResilientLLM, donors: Donors, locations: Mapping[StageId, Location]) -> RenderableType:
    """For every stage who keeps its copies and stands in for it, in order of preference."""
    table = _table("stage", "where", "pair", "and then")
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


def _table(*headings: str) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading)
    return table
