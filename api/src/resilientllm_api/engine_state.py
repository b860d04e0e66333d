"""What an engine says of itself (``GET /v1/state``): the truth about its instance that the operator reports on."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from resilientllm_api.plan import Frozen, StageId

STATE_HEARTBEAT_SECONDS = 1.0
"""Who watches an engine's state is told it so often, whether it has changed or not."""


class EnginePhase(StrEnum):
    """Where the engine is. ``Serving`` and ``Degraded`` take new requests."""

    STARTING = "Starting"
    """Imports, and waits for its plan."""
    ATTACHING = "Attaching"
    """Dials its stages and agrees the KV layout with them."""
    SERVING = "Serving"
    """Runs on its own stages."""
    DEGRADED = "Degraded"
    """Serves, with a donor in place of at least one own stage."""
    RECOVERING = "Recovering"
    """Re-stitches; lasts milliseconds."""
    WAITING = "Waiting"
    """A stage is lost and no donor can stand in: requests wait for a bounded time."""
    FAILED = "Failed"
    """Cannot attach, for a reason that waiting does not mend; ``message`` says which."""


class LossReason(StrEnum):
    """How a loss was noticed."""

    RESET = "ConnectionReset"
    NEIGHBOUR = "ReportedByNeighbour"
    SELF = "ReportedByItself"
    SILENCE = "HeartbeatMissed"
    UNREACHABLE = "CommandsLost"
    """It is heard, and what it is told does not reach it."""
    HANG = "StepOverdue"
    """It is in one step for longer than any honest one takes."""
    CORRUPT = "FrameCorrupt"
    """What arrived from it was not what it sent."""


class RecoveryKind(StrEnum):
    BORROW = "Borrow"
    """A donor took the place of a lost stage."""
    SWAP_BACK = "SwapBack"
    """The instance's own stage is back in its place."""
    MOVE = "Move"
    """A donor took the place of a stage that still works, because that is to go."""


class Slowness(Frozen):
    """How much longer the steps of a stage take than they should."""

    history: float
    """Times as long as steps of their size used to take there."""
    twins: float
    """Times as long as they take its twins now."""

    def __str__(self) -> str:
        return f"its steps take {self.history:.1f} times as long as before, and {self.twins:.1f} times its twins'"


class StageServing(Frozen):
    """Which stage serves a place of the pipeline."""

    stage: Annotated[int, Field(ge=0)]
    served_by: StageId | None
    """The instance's own stage, a donor, or nobody."""
    own_connected: bool
    """Whether the instance's own stage answers."""
    own_leaving: bool = False
    """The own stage has been told to end, and waits until nobody needs it."""
    own_slow: Slowness | None = None
    """The own stage has become slow: it may fail next. The figures are those of when it was seen."""
    donors_connected: int = 0


class ReplicationState(Frozen):
    """How the copies of one place's sealed KV blocks stand, as the stage that serves it says."""

    stage: Annotated[int, Field(ge=0)]
    """The place of the pipeline."""
    kept_by: StageId | None = None
    """The stage that keeps the copies; None if there is none."""
    supported: bool = True
    """False: this engine cannot have copies kept, whoever is there to keep them."""
    healthy: bool = False
    """Copies are kept, and they keep up."""
    message: str = ""
    """For people: why not."""
    lag_tokens: int = 0
    """Tokens in sealed blocks that no other stage has acknowledged."""
    lag_seconds: float = 0.0
    """How long the oldest of them has been waiting."""
    sealed_blocks: int = 0
    stored_blocks: int = 0
    sent_blocks: int = 0
    sent_bytes: int = 0
    cancelled_blocks: int = 0
    refused_blocks: int = 0
    corrupt_blocks: int = 0


class Rung(StrEnum):
    """How a request that met a loss or a move ended up: each gets one of these for every re-stitch that it meets."""

    KEPT = "Kept"
    """It went on from KV blocks that the new pipeline had: those of the survivors, and copies."""
    RECOMPUTED = "Recomputed"
    """All of it was computed again."""
    FAILED = "Failed"
    """It got an explicit error: no stage could stand in within ``waitForDonor``."""


class Recovery(Frozen):
    """One re-stitch. Times are measured on the engine's monotonic clock; ``detected_at`` is wall-clock, UTC."""

    id: str
    kind: RecoveryKind
    stages: tuple[int, ...]
    """The places of the pipeline that changed hands."""
    reason: LossReason | None = None
    """Why, for ``Borrow``; the others lose nothing."""
    served_by: tuple[StageId, ...] = ()
    detected_at: datetime
    resumed_at: datetime | None = None
    """First token after it, or the time of the stitch when no request was running."""
    phases_ms: dict[str, float] = Field(default_factory=dict)
    """Milliseconds: ``hold`` and ``flush`` (of a planned move only), ``wait`` (for a donor; absent if there was one),
    ``fence``, ``stitch``, ``rollBack``, ``resume``, and ``total``."""
    requests: int = 0
    """Requests that were running."""
    tokens_recomputed: int = 0
    """Tokens whose KV had to be computed again."""
    tokens_recomputed_max: int = 0
    """The most of them that one request had."""
    tokens_kept: int = 0
    """Tokens of these requests whose KV every stage of the new pipeline had."""


class EngineState(Frozen):
    instance: Annotated[int, Field(ge=0)]
    phase: EnginePhase
    message: str = ""
    """For people: what it waits for, and what to do."""
    term: int = 0
    epoch: int = 0
    plan_version: int = 0
    serving: bool = False
    """New requests will be served now."""
    leaving: bool = False
    """It was told to end: it finishes the requests that it has, takes no new ones, and ends then."""
    on_own_stages: bool = False
    stages: tuple[StageServing, ...] = ()
    replication: tuple[ReplicationState, ...] = ()
    """For every place of the pipeline; empty if the plan wants none."""
    block_tokens: int = 0
    """Tokens in a KV block; 0 until the KV cache is agreed."""
    recoveries: tuple[Recovery, ...] = ()
    """The last ten, oldest first."""
    recoveries_total: int = 0
    requests_running: int = 0
    requests_waiting: int = 0
    steps_total: int = 0
    """Steps whose results came: what moves."""
    step_allowed_seconds: float = 0.0
    """How long the steps that are being done may take, at most; 0 if there are none."""
    sick: str = ""
    """For people: there is work and nothing has moved for ``sickAfter``, or none could be taken; empty if it is well.
    A sick engine does not serve, whatever ``phase`` says."""
    tokens_recomputed_total: int = 0
    tokens_kept_total: int = 0
    requests_by_rung_total: dict[Rung, int] = Field(default_factory=dict)

    @property
    def urgent(self) -> tuple[object, ...]:
        """What others act upon: who watches is told at once when it changes, and of the rest with the heartbeat."""
        return self.phase, self.serving, self.leaving, self.term, self.epoch, self.plan_version, self.stages
