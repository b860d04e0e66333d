"""Taking requests along to other stages while all still work: hold, flush, and only then stitch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from resilientllm_api.plan import StageId

from resilientllm_worker.engine.copies import keep_up
from resilientllm_worker.engine.move import Move, Phase, advance
from resilientllm_worker.engine.shared import Shared
from resilientllm_worker.engine.topology import Assignment, Sight
from resilientllm_worker.protocol.messages import Flush

logger = logging.getLogger(__name__)


class PlannedMove:
    """The conductor's own. What comes next is decided by ``move.py``."""

    def __init__(self, shared: Shared, look_again: Callable[[], None]) -> None:
        """``look_again`` makes the conductor ask `is_ready` once more; called in any thread."""
        self._shared = shared
        self._look_again = look_again
        self._flushing: list[Future[Any]] = []
        """Answers of stages that are to be left."""

    def is_ready(self, wanted: Assignment, seen: Mapping[StageId, Sight], now: float) -> bool:
        """Whether to stitch ``wanted`` at once. If not, a planned move to it is being prepared, step by step."""
        if not self._loses_nothing(wanted, seen, now):
            return True
        shared = self._shared
        move = shared.move
        if move is None or move.wanted != wanted:
            move = Move(wanted, now if move is None else move.began)
            logger.info("moves to %s", " → ".join(map(str, wanted)))
        before, move = move.phase, advance(move, shared.held, all(future.done() for future in self._flushing), now)
        if move.phase is Phase.FLUSH and before is not Phase.FLUSH:
            self._flush(wanted)
        with shared.changed:
            shared.move = move
            shared.changed.notify_all()
        return move.phase is Phase.STITCH

    def stop(self) -> None:
        """There is nothing to move to any more: requests go on where they are."""
        shared = self._shared
        with shared.changed:
            shared.move, shared.held = None, False
            shared.changed.notify_all()

    def _loses_nothing(self, wanted: Assignment, seen: Mapping[StageId, Sight], now: float) -> bool:
        """Whether all that requests have computed can go along to ``wanted``, and there are any."""
        shared = self._shared
        if not shared.stitched or shared.idle or shared.plan is None:
            return False
        for server, stage in zip(shared.serving, wanted, strict=True):
            if shared.channels.get(server.id) is not server or server.id in shared.plan.lost:
                return False
            if not seen[server.id].usable(now):
                return False
            if stage is None or stage == server.id:
                continue
            keeper = shared.keepers.get(server)
            if keeper is None or keeper.id != stage:
                return False
            if shared.move is None and not keep_up(server, shared.channels[stage]):
                return False  # it is moved to because waiting longer was the worse evil
        return True

    def _flush(self, wanted: Assignment) -> None:
        stamp = self._shared.stamp
        leaving = [server for server, stage in zip(self._shared.serving, wanted, strict=True) if server.id != stage]
        self._flushing = [server.call(lambda call: Flush(call, stamp)) for server in leaving]

        def flushed(done: Future[Any]) -> None:
            if done.exception() is None:  # else the stage is lost, and that is told with its reason
                self._look_again()

        for future in self._flushing:
            future.add_done_callback(flushed)
