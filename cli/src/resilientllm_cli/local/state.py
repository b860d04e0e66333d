"""The state of a local run: how it is put together, and its file."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState
from resilientllm_api.plan import StageId

from resilientllm_cli.local.layout import Endpoints, EngineEndpoints, Files, engine_name, stage_name
from resilientllm_cli.supervise.supervisor import Phase, Status


@dataclass(frozen=True)
class EngineEntry:
    instance: int
    url: str
    pid: int | None
    control_url: str
    phase: str
    """The engine's own word if it answers, else its process's."""
    message: str
    on_own_stages: bool
    """And clients are served."""
    restarts: int
    lag_seconds: float | None = None
    """How far the copies of its KV blocks are behind, where it is worst; None where a place has nobody to keep them."""


@dataclass(frozen=True)
class StageEntry:
    """One for every rank of a stage."""

    instance: int
    stage: int
    rank: int
    pid: int | None
    address: str
    ready: bool
    phase: str
    restarts: int


@dataclass(frozen=True)
class LocalState:
    ready: bool
    """Every process runs and every instance serves on its own stages."""
    pid: int
    """Of the supervising process."""
    engines: tuple[EngineEntry, ...]
    stages: tuple[StageEntry, ...]


def assemble(
    pid: int,
    endpoints: Endpoints,
    tensor_parallel_size: int,
    statuses: Mapping[str, Status],
    rank_pids: Mapping[StageId, tuple[int, ...] | None],
    engine_states: Mapping[int, EngineState | None],
    answering: Collection[int],
) -> LocalState:
    """``rank_pids``: of the stage's present process; None while that is not ready. ``answering``: instances whose API
    answers, which may take a moment longer than the engine behind it."""
    engines = tuple(
        _engine_entry(
            instance,
            at,
            statuses[engine_name(instance)],
            engine_states.get(instance),
            instance in answering,
        )
        for instance, at in endpoints.engines.items()
    )
    stages = tuple(
        entry
        for stage, at in endpoints.stages.items()
        for entry in _stage_entries(
            stage, at.address, tensor_parallel_size, statuses[stage_name(stage)], rank_pids.get(stage)
        )
    )
    ready = all(engine.on_own_stages for engine in engines) and all(stage.ready for stage in stages)
    return LocalState(ready, pid, engines, stages)


def _engine_entry(
    instance: int, at: EngineEndpoints, status: Status, said: EngineState | None, answers: bool
) -> EngineEntry:
    running = status.phase is Phase.RUNNING
    heard = said if running else None
    return EngineEntry(
        instance=instance,
        url=at.url,
        pid=status.pid,
        control_url=at.control_url,
        phase=heard.phase if heard else (EnginePhase.STARTING if running else status.phase),
        message=heard.message if heard else "",
        on_own_stages=answers and heard is not None and heard.serving and heard.on_own_stages,
        restarts=status.restarts,
        lag_seconds=_lag_seconds(heard.replication) if heard else None,
    )


def _lag_seconds(places: Collection[ReplicationState]) -> float | None:
    if not places or any(place.kept_by is None for place in places):
        return None
    # To a tenth: every change of the state is written to its file.
    return round(max(place.lag_seconds for place in places), 1)


def _stage_entries(
    stage: StageId, address: str, ranks: int, status: Status, rank_pids: tuple[int, ...] | None
) -> list[StageEntry]:
    ready = status.phase is Phase.RUNNING and rank_pids is not None
    # Until it has told us its ranks, only rank 0 can be named: its process is the one that we started.
    pids: tuple[int | None, ...] = rank_pids if ready and rank_pids else (status.pid, *[None] * (ranks - 1))
    return [
        StageEntry(
            instance=stage.instance,
            stage=stage.stage,
            rank=rank,
            pid=pid,
            address=address,
            ready=ready,
            phase="Ready" if ready else ("Loading" if status.phase is Phase.RUNNING else status.phase),
            restarts=status.restarts,
        )
        for rank, pid in enumerate(pids)
    ]


def write(path: Path, state: LocalState) -> None:
    """Readers see the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(asdict(state), indent=2) + "\n")
    scratch.replace(path)


def read(path: Path) -> LocalState:
    document = json.loads(path.read_text())
    return LocalState(
        ready=document["ready"],
        pid=document["pid"],
        engines=tuple(EngineEntry(**entry) for entry in document["engines"]),
        stages=tuple(StageEntry(**entry) for entry in document["stages"]),
    )


def is_running(files: Files) -> bool:
    """The lock is held for exactly as long as a run lives; a state file may outlive it."""
    try:
        with files.lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
