"""What the state of a local run and its engines' own words say of its topology. Pure, but for `look`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import floor, log2
from pathlib import Path

from resilientllm_api.durations import format_ms
from resilientllm_api.engine_state import EngineState
from resilientllm_api.engine_state import Recovery as ToldRecovery
from resilientllm_api.plan import Plan, StageId

from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import observe, state
from resilientllm_cli.local.layout import Files
from resilientllm_cli.local.state import EngineEntry, LocalState, StageEntry
from resilientllm_cli.status.topology import Instance, Place, Recovery, Topology


def look(directory: Path) -> Topology:
    """Reads the state file and the plans of the run, and asks its engines. Raises UsageError if nothing runs there."""
    files = Files(directory)
    if not state.is_running(files):
        raise UsageError(f"nothing runs in {directory}: start it with `resilientllm local up`")
    try:
        now = state.read(files.state)
        token = files.token.read_text()
        plans = [Plan.model_validate_json(files.plan(each.instance).read_text()) for each in now.engines]
    except (OSError, ValueError) as error:
        raise UsageError(f"the run in {directory} has only begun: try again in a moment ({error})") from error
    try:
        said = {each.instance: observe.engine_state(each.control_url, token) for each in now.engines}
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    return topology(str(directory), now, said, plans)


def topology(name: str, now: LocalState, said: Mapping[int, EngineState | None], plans: Iterable[Plan]) -> Topology:
    """``said``: None for an engine that does not answer."""
    pairs = {
        str(own.id): str(donors[0].id)
        for plan in plans
        for own, donors in zip(plan.stages, plan.donors, strict=True)
        if donors
    }
    instances = tuple(_instance(each, said.get(each.instance), now.stages, pairs) for each in now.engines)
    serving = sum(each is not None and each.serving for each in said.values())
    recoveries = [
        _recovery(each.instance, recovery) for each in said.values() if each is not None for recovery in each.recoveries
    ]
    return Topology(
        name=name,
        healthy=now.ready,
        summary=f"{serving}/{len(instances)} instances serve",
        remarks=tuple(_remarks(now, said)),
        instances=instances,
        recoveries=tuple(sorted(recoveries, key=lambda each: each.detected_at, reverse=True)),
    )


def _instance(
    engine: EngineEntry, said: EngineState | None, stages: Iterable[StageEntry], pairs: Mapping[str, str]
) -> Instance:
    serving = {each.stage: each.served_by for each in said.stages} if said else {}
    kept = {each.stage: each for each in said.replication} if said else {}
    places = []
    for stage in stages:
        if stage.instance != engine.instance or stage.rank != 0:
            continue
        name = str(StageId(instance=stage.instance, stage=stage.stage))
        server, copies = serving.get(stage.stage), kept.get(stage.stage)
        places.append(
            Place(
                stage=name,
                ready=stage.ready,
                served_by=str(server) if server else None,
                pair=pairs.get(name),
                kept_by=str(copies.kept_by) if copies and copies.kept_by else None,
                lag_seconds=_rounded(copies.lag_seconds) if copies and copies.kept_by else None,
                process=f"pid {stage.pid}" if stage.pid else None,
            )
        )
    return Instance(
        number=engine.instance,
        phase=said.phase if said else engine.phase,
        whole=engine.on_own_stages,
        engine=engine.url,
        node=None,
        plan_version=said.plan_version if said else None,
        places=tuple(places),
    )


def _rounded(seconds: float) -> int:
    """As the status of an object has it."""
    return 2 ** floor(log2(seconds)) if seconds >= 1 else 0


def _recovery(instance: int, told: ToldRecovery) -> Recovery:
    donors = [str(each) for each in told.served_by if each.stage in told.stages and each.instance != instance]
    return Recovery(
        kind=told.kind,
        reason=told.reason,
        places=tuple(f"{instance}.{stage}" for stage in told.stages),
        donor=", ".join(donors) or None,
        detected_at=told.detected_at,
        took=format_ms(told.phases_ms["total"]) if told.resumed_at and "total" in told.phases_ms else None,
        phases_ms=told.phases_ms,
        requests=told.requests,
        tokens_recomputed=told.tokens_recomputed,
        tokens_kept=told.tokens_kept,
    )


def _remarks(now: LocalState, said: Mapping[int, EngineState | None]) -> Iterator[str]:
    for engine in now.engines:
        state = said.get(engine.instance)
        if state is None:
            yield f"Engine {engine.instance} does not answer: its process is {engine.phase}."
            continue
        for words in (state.message, state.sick):
            if words:
                yield f"Engine {engine.instance}: {words}"
        for place in state.replication:
            if not place.healthy and place.message:
                yield f"Place {engine.instance}.{place.stage}: {place.message}"
    for stage in now.stages:
        if not stage.ready:
            rank = f" rank {stage.rank}" if stage.rank else ""
            yield f"Stage {stage.instance}.{stage.stage}{rank}: {stage.phase}."
