"""Where the copies of an instance's blocks are, where they are to go, and who has enough of them to take a place."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from resilientllm_api.plan import ReplicationMode, StageId, StageRef

from resilientllm_worker.engine.channel import Channel
from resilientllm_worker.engine.shared import Shared
from resilientllm_worker.engine.topology import Sight, keepers
from resilientllm_worker.protocol.messages import ReplicateTo

logger = logging.getLogger(__name__)

CAUGHT_UP_SECONDS = 0.25
"""A returning stage has caught up when no sealed block has been waiting for longer, and few are waiting at all."""
FEW_BLOCKS = 32
CATCH_UP_SECONDS = 60.0
"""After so long it takes its place as it is: a donor that serves two tenants is the worse evil."""
MOVE_SECONDS = 8.0
"""A stage that is about to end is left so long before, whoever has caught up."""


class Copies:
    """The conductor's own."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._leaving_since: dict[StageId, float] = {}

    def note_leaving(self, leaving: set[StageId], now: float) -> None:
        self._leaving_since = {name: self._leaving_since.get(name, now) for name in leaving}

    def has_caught_up(self, channel: Channel, now: float) -> bool:
        """Whether a stage could take the place of the one that serves there with next to nothing to compute."""
        shared = self._shared
        if shared.plan is None or not shared.stitched or not channel.usable:
            return True
        server = shared.serving[channel.id.stage]
        if server is channel or shared.replication_obstacle or shared.plan.replication is ReplicationMode.NONE:
            return True
        if shared.move is not None and channel.id in shared.move.wanted:
            return True  # what it lacks now is sent in the move
        patience_ends = max(channel.usable_since, self._leaving_since.get(server.id, 0.0)) + CATCH_UP_SECONDS
        if server.ends_at is not None:
            patience_ends = min(patience_ends, server.ends_at - MOVE_SECONDS)
        if now > patience_ends:
            return True
        return keep_up(server, channel)

    def direct(self, seen: Mapping[StageId, Sight]) -> None:
        """Tell every serving stage where its sealed blocks are to be kept, if that has changed."""
        shared = self._shared
        if not shared.stitched or shared.plan is None:
            return
        wanted: dict[Channel, StageRef | None] = {}
        # A change means to send everything again; while nothing runs that is cheap, and brings back the plan's order.
        keeping = () if shared.idle else shared.keeping
        chosen = keepers(shared.plan, seen, shared.assignment, keeping, time.monotonic())
        for channel, keeper in zip(shared.serving, chosen, strict=True):
            ref = shared.channels[keeper].ref if keeper is not None and not shared.replication_obstacle else None
            wanted[channel] = ref
            if shared.keepers.get(channel) != ref:
                channel.send(ReplicateTo(shared.stamp, ref.address if ref is not None else None))
                logger.info("blocks of stage %s are kept by %s", channel.id, ref.id if ref else "nobody")
        for channel in shared.keepers.keys() - wanted.keys():
            channel.send(ReplicateTo(shared.stamp, None))
        with shared.changed:
            shared.keepers = wanted


def keep_up(server: Channel, keeper: Channel) -> bool:
    """Whether the keeper has what the stage at work has sealed, but for the last moment's, as of its last heartbeat."""
    report = server.replication
    return (
        report is not None
        and report.connected
        and report.address == keeper.ref.address
        and report.lag_seconds < CAUGHT_UP_SECONDS
        and report.lag_blocks <= max(FEW_BLOCKS, report.sealed_blocks // 16)
    )
