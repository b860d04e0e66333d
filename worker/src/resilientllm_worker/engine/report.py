"""What an engine says of itself, put together from what the pipeline knows. Reads only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from resilientllm_api.engine_state import EnginePhase, EngineState, ReplicationState, Slowness, StageServing
from resilientllm_api.plan import Plan, ReplicationMode, StageId, StageRef

from resilientllm_worker.engine.channel import Channel
from resilientllm_worker.engine.recoveries import Recoveries
from resilientllm_worker.engine.topology import Assignment, is_complete, is_home
from resilientllm_worker.protocol.messages import ReplicationReport, Stamp

LAG_LIMIT_SECONDS = 5.0
"""Copies that trail by more than this are not worth being called healthy."""
NOTHING = ReplicationReport("", False, 0, 0, 0, 0, 0.0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class View:
    """The pipeline at one moment."""

    instance: int
    plan: Plan | None
    channels: Mapping[StageId, Channel]
    stamp: Stamp
    assignment: Assignment
    serving: tuple[Channel, ...]
    """Empty while the pipeline is incomplete."""
    moves_to: Assignment | None
    """Where a planned move that has begun leads; None if there is none."""
    keepers: Mapping[StageId, StageRef | None]
    """For each serving stage, who keeps its blocks."""
    block_tokens: int
    obstacle: str
    """Why this engine cannot replicate at all; empty if it can."""
    failure: str
    recoveries: Recoveries
    load: tuple[int, int]
    """Requests running and waiting."""
    steps_total: int = 0
    """Whose results came."""
    slow: Mapping[StageId, Slowness] = field(default_factory=dict)
    """Own stages that have become slow."""


def engine_state(view: View) -> EngineState:
    plan, (running, waiting) = view.plan, view.load
    serving = {channel.id.stage: channel.id for channel in view.serving}
    own = bool(view.serving) and plan is not None and is_home(plan, view.assignment)
    stages = tuple(
        StageServing(
            stage=place,
            served_by=serving.get(place),
            own_connected=view.channels[ref.id].connected,
            own_leaving=view.channels[ref.id].ends_at is not None,
            own_slow=view.slow.get(ref.id),
            donors_connected=sum(view.channels[donor.id].connected for donor in plan.donors[place]),
        )
        for place, ref in enumerate(plan.stages if plan else ())
        if plan is not None
    )
    return EngineState(
        instance=view.instance,
        phase=_phase(view, own),
        message=view.failure or _message(view),
        term=view.stamp.term,
        epoch=view.stamp.epoch,
        plan_version=plan.version if plan else 0,
        serving=bool(view.serving),
        on_own_stages=own,
        stages=stages,
        replication=_replication(view),
        block_tokens=view.block_tokens,
        recoveries=view.recoveries.recent,
        recoveries_total=view.recoveries.total,
        requests_running=running,
        requests_waiting=waiting,
        steps_total=view.steps_total,
        step_allowed_seconds=max(
            (channel.pulse.beat.step_allowed_seconds for channel in view.serving if channel.pulse is not None),
            default=0.0,
        ),
        tokens_recomputed_total=view.recoveries.tokens_recomputed_total,
        tokens_kept_total=view.recoveries.tokens_kept_total,
        requests_by_rung_total=dict(view.recoveries.requests_by_rung),
    )


def _phase(view: View, own: bool) -> EnginePhase:
    if view.failure:
        return EnginePhase.FAILED
    if view.serving:
        return EnginePhase.SERVING if own else EnginePhase.DEGRADED
    if view.plan is None:
        return EnginePhase.STARTING
    if view.stamp.epoch == 0:
        return EnginePhase.ATTACHING
    return EnginePhase.RECOVERING if is_complete(view.assignment) else EnginePhase.WAITING


def _message(view: View) -> str:
    if view.moves_to is not None:
        return f"moves to {', '.join(map(str, view.moves_to))}"
    if view.serving:
        return ""
    if view.plan is None:
        return "waits for its plan"
    own = [view.channels[ref.id] for ref in view.plan.stages]
    unusable = [channel for channel in own if channel.trouble or not channel.connected]
    if not unusable and view.stamp.epoch > 0:
        unusable = [channel for channel in own if not channel.has_kv]
    if not unusable:
        return "stitches its stages"
    troubles = [channel.trouble for channel in unusable if channel.trouble]
    return "; ".join([f"waits for stage {', '.join(str(channel.id) for channel in unusable)}", *troubles])


def _replication(view: View) -> tuple[ReplicationState, ...]:
    if view.plan is None or view.plan.replication is ReplicationMode.NONE or not view.block_tokens:
        return ()
    return tuple(_place(view, channel) for channel in view.serving)


def _place(view: View, channel: Channel) -> ReplicationState:
    keeper, report = view.keepers.get(channel.id), channel.replication or NOTHING
    message = view.obstacle
    if not message and keeper is None:
        message = (
            f"no other stage {channel.id.stage} can keep copies: start one more instance, or wait until one is back"
        )
    elif not message and not (report.connected and report.address == getattr(keeper, "address", "")):
        message = f"stage {channel.id} connects to {getattr(keeper, 'id', '')}"
    elif not message and report.lag_seconds > LAG_LIMIT_SECONDS:
        message = (
            f"copies trail by {report.lag_seconds:.1f} s: the path to stage {getattr(keeper, 'id', '')} is too slow"
        )
    return ReplicationState(
        stage=channel.id.stage,
        kept_by=keeper.id if keeper is not None else None,
        supported=not view.obstacle,
        healthy=not message,
        message=message,
        lag_tokens=report.lag_blocks * view.block_tokens,
        lag_seconds=report.lag_seconds,
        sealed_blocks=report.sealed_blocks,
        stored_blocks=report.stored_blocks,
        sent_blocks=report.sent_blocks,
        sent_bytes=report.sent_bytes,
        cancelled_blocks=report.cancelled_blocks,
        refused_blocks=report.refused_blocks,
        corrupt_blocks=report.corrupt_blocks,
    )
