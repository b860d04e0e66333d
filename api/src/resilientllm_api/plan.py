"""The plan: all that an engine needs to know to keep its instance alive without operator or API server.

The operator publishes one plan to every engine (``PUT /v1/plan``); local mode writes the same document to a
file. An engine replaces its plan as a whole, and only by one of a higher ``version``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from resilientllm_api.immutable import Immutable

Address = Annotated[str, Field(pattern=r"^[^\s:/]+:[0-9]{1,5}$", description="host:port")]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Frozen(Immutable):
    """Strict about unknown fields."""

    model_config = ConfigDict(extra="forbid")


class StageId(Frozen):
    """Names a stage by the instance that it was made for and its place in the pipeline, both from 0."""

    instance: Annotated[int, Field(ge=0)]
    stage: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"{self.instance}.{self.stage}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what ``str`` makes of it. Raises ValueError for anything else."""
        instance, _, stage = text.partition(".")
        return cls(instance=int(instance), stage=int(stage))


class StageRef(Frozen):
    """A stage and where it listens (one port for engines' commands and other stages' links)."""

    id: StageId
    address: Address


class Limits(Frozen):
    """Times after which the engine acts on its own. All in seconds."""

    heartbeat_interval_seconds: Seconds = 0.1
    """How often a stage says that it is alive and how far its work has come."""
    heartbeat_timeout_seconds: Seconds = 0.8
    """A stage that was silent for so long is lost; so is one whose pipeline did not move because of it."""
    step_floor_seconds: Seconds = 2.0
    """No step counts as stuck before; how much longer it may take, its stage learns from others."""
    sick_after_seconds: Seconds = 30.0
    """An instance that has requests, or cannot take any, and has not done a step for so long, says that it is sick."""
    wait_for_donor_seconds: Seconds = 30.0
    """How long a request waits while no stage can stand in; then it fails with an explicit, retryable error."""
    attach_timeout_seconds: Seconds = 600.0
    """How long an engine that starts waits for its stages to load their weights."""

    @model_validator(mode="after")
    def _timeout_exceeds_interval(self) -> Self:
        if self.heartbeat_timeout_seconds <= self.heartbeat_interval_seconds:
            raise ValueError("heartbeatTimeoutSeconds must be greater than heartbeatIntervalSeconds")
        return self


class ReplicationMode(StrEnum):
    """Whether stages keep copies of each other's KV blocks."""

    NONE = "None"
    """A donor computes the KV cache of the requests that it takes over again, from their tokens."""
    RING = "Ring"
    """Every stage keeps copies of the KV blocks of the same stage of the instance before it."""


class Plan(Frozen):
    """The plan of one instance."""

    version: Annotated[int, Field(ge=1)]
    """Raised by the publisher with every change; an engine ignores a lower one."""
    name: str
    """The ResilientLLM object's ``namespace/name``, or ``local``."""
    instance: Annotated[int, Field(ge=0)]
    stages: Annotated[tuple[StageRef, ...], Field(min_length=1)]
    """The instance's own stages, in pipeline order."""
    donors: tuple[tuple[StageRef, ...], ...]
    """For every stage the stages that may stand in, in order of preference."""
    limits: Limits = Limits()
    replication: ReplicationMode = ReplicationMode.RING
    leaving: tuple[StageId, ...] = ()
    """Stages that are to go, and still work: the engine moves away from them without losing anything, and uses them
    only where nobody else can serve."""
    lost: tuple[StageId, ...] = ()
    """Stages that must not be used, whatever they say themselves: their device or their node is not to be trusted."""
    draining: bool = False
    """The instance gives way: its engine serves whatever comes, and ends each connection with its answer, so that
    clients which keep connections come back to another instance."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        expected = [StageId(instance=self.instance, stage=k) for k in range(len(self.stages))]
        if [ref.id for ref in self.stages] != expected:
            raise ValueError(f"stages must be {', '.join(map(str, expected))} in this order")
        if len(self.donors) != len(self.stages):
            raise ValueError(f"donors must have one entry for each of the {len(self.stages)} stages")
        for stage, donors in enumerate(self.donors):
            for donor in donors:
                if donor.id.stage != stage or donor.id.instance == self.instance:
                    raise ValueError(f"{donor.id} cannot be a donor of stage {self.instance}.{stage}")
        return self
