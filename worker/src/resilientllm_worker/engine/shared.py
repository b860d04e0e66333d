"""What vLLM's engine thread and the conductor share of one instance's pipeline, under one lock."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any, TypeAlias

from resilientllm_api.plan import Plan, StageId, StageRef

from resilientllm_worker.engine.channel import Channel
from resilientllm_worker.engine.move import Move
from resilientllm_worker.engine.recoveries import Recoveries
from resilientllm_worker.engine.stitching import Holding
from resilientllm_worker.engine.topology import Assignment
from resilientllm_worker.protocol.messages import KVGroup, Stamp

Allocation: TypeAlias = tuple[str, int, dict[int, list[KVGroup]]]
"""Layout, blocks for home, and the groups of each stage."""


class LostStep:
    """What comes back for a step that was void before it was done. The scheduler rolls back to delivered tokens."""


LOST_STEP = LostStep()


class Shared:
    """All under `changed`, which is notified of whatever somebody may wait for; nothing slow happens under it."""

    def __init__(self, instance: int) -> None:
        self.instance = instance
        self.changed = threading.Condition()
        # Written by the conductor, which therefore reads it without the lock.
        self.plan: Plan | None = None
        self.channels: dict[StageId, Channel] = {}
        self.stamp = Stamp(0, 0)
        """Its term is the engine thread's, when it attaches."""
        self.assignment: Assignment = ()
        self.serving: tuple[Channel, ...] = ()
        self.stitched = False
        self.capacity = 0
        self.incomplete_since = time.monotonic()
        """Monotonic seconds; 0 while the pipeline is complete."""
        self.failure = ""
        self.newcomers: tuple[Holding, ...] = ()
        self.keepers: dict[Channel, StageRef | None] = {}
        """Where each serving stage was last told to replicate to, on the connection at hand."""
        self.move: Move | None = None
        # Of both threads.
        self.held = False
        """For `move`: the scheduler holds still, and nothing is in flight."""
        self.recoveries = Recoveries()
        self.in_flight: dict[int, Future[Any]] = {}
        self.next_step = 0
        # Written by the engine thread.
        self.opened = False
        self.allocation: Allocation | None = None
        self.block_tokens = 0
        self.replication_obstacle = "the engine starts"
        self.load = (0, 0)
        """Requests that run, and that wait."""
        self.steps_total = 0
        """Written by the channels' threads."""

    @property
    def keeping(self) -> Assignment:
        """Who keeps the copies of every place now."""
        told = [self.keepers.get(channel) for channel in self.serving]
        return tuple(ref.id if ref is not None else None for ref in told)

    @property
    def idle(self) -> bool:
        return self.load == (0, 0)
