"""The stage server: engines and other stages connect to it, and what they bring is done by one thread.

Threads: one per connection reads and notes what came; one, the caller of `run`, touches vLLM.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import (
    EngineHello,
    LinkHello,
    Message,
    ReplicaHello,
    StageFailing,
    WeightsHello,
)
from resilientllm_worker.stage.engines import Engines
from resilientllm_worker.stage.metrics import NOBODY, StageFigures, TenantFigures
from resilientllm_worker.stage.neighbours import Neighbours
from resilientllm_worker.stage.step_loop import StepLoop
from resilientllm_worker.stage.stitching import Stitching
from resilientllm_worker.stage.tenants import Tenants
from resilientllm_worker.tenancy.pool import PoolUse
from resilientllm_worker.transport.errors import CorruptFrame, ProtocolError
from resilientllm_worker.transport.listener import Listener

if TYPE_CHECKING:
    from resilientllm_worker.stage.model import Model
    from resilientllm_worker.transport.connection import Connection

logger = logging.getLogger(__name__)


class StageServer:
    def __init__(
        self,
        model: Model,
        instance: int,
        stage: int,
        digest: str,
        token: bytes,
        pool_fraction: float,
        merges: bool = True,
        give: Callable[[Connection, WeightsHello], None] | None = None,
    ) -> None:
        """``merges``: steps of home and guest that are both at hand run in one forward, where that is possible.

        ``give`` serves a twin that wants this stage's weights, in that connection's thread.
        """
        self._model = model
        self._give = give
        self._tenants = Tenants(model, instance, stage, token)
        self._loop = StepLoop(model, self._tenants, merges)
        stitching = Stitching(model, self._tenants, self._loop, token)
        self._engines = Engines(model, self._tenants, self._loop, stitching, digest, pool_fraction)
        self._neighbours = Neighbours(self._tenants, stitching)
        self._changed = self._tenants.changed
        self._corrupt_frames = 0
        """Under `_changed`."""

    def run(self) -> None:
        """Run steps until `stop`, or until the model fails, which is raised: the stage cannot serve after that."""
        self._loop.run()

    def stop(self) -> None:
        self._loop.stop()

    def leave(self, timeout_seconds: float) -> None:
        """Tell every engine that this stage is about to end, serve until none needs it or the time is over, and stop.

        Waits for that, so call it in a thread of its own.
        """
        self._engines.tell_of_end(timeout_seconds)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._tenants.needed_by(), timeout_seconds):
                needed_by = self._tenants.needed_by()
                logger.warning("ends although instances %s need it: %.1f s are over", needed_by, timeout_seconds)
        self.stop()

    def fail(self, reason: str) -> None:
        """Tell every engine, before the process ends."""
        self._engines.tell_all(StageFailing(reason))

    def serve(self, connection: Connection) -> None:
        """Serve one authenticated connection until it ends; runs in that connection's thread."""
        try:
            self._serve(connection, connection.receive())
        except CorruptFrame:
            with self._changed:
                self._corrupt_frames += 1
            raise

    def _serve(self, connection: Connection, hello: Message) -> None:
        if isinstance(hello, EngineHello):
            self._engines.serve(connection, hello)
        elif isinstance(hello, LinkHello):
            self._neighbours.serve_link(connection, hello)
        elif isinstance(hello, ReplicaHello):
            self._neighbours.serve_replicas(connection, hello)
        elif isinstance(hello, WeightsHello) and self._give is not None:
            self._give(connection, hello)
        else:
            raise ProtocolError(f"expected the hello of an engine or a stage, got {type(hello).__name__}")

    def step_at_hand(self) -> tuple[int, float, float]:
        """Steps done, and of the one in the runner how long it has been there and how long it may; zeros for none."""
        return (self._loop.steps_done, *self._loop.clock.read())

    @property
    def counts(self) -> dict[str, int]:
        """For people: steps that the runner has finished, those of them that were both tenants' at once, and frames
        that did not arrive as they were sent."""
        return {
            "steps": self._loop.steps_done,
            "merged": self._loop.merged_steps_done,
            "corruptFrames": self._corrupt_frames,
        }

    @property
    def figures(self) -> StageFigures:
        """For metrics. Takes the locks that heartbeats take, each for a moment."""
        running, allowed = self._loop.clock.read()
        buckets, seconds = self._loop.step_times.read()
        kv = self._model.kv
        with self._changed:
            tenants, pool = list(self._tenants), self._tenants.pool
        return StageFigures(
            steps=self._loop.steps_done,
            merged_steps=self._loop.merged_steps_done,
            corrupt_frames=self._corrupt_frames,
            step_buckets=buckets,
            step_seconds=seconds,
            running_seconds=running,
            allowed_seconds=allowed,
            home_blocks=kv.home_blocks if kv else 0,
            block_tokens=kv.block_size if kv else 0,
            pool=pool.use if pool is not None else PoolUse(kv.pool_blocks if kv else 0, 0, 0, 0),
            tenants=tuple(
                TenantFigures(
                    is_home=tenant.is_home,
                    stitched=tenant.stitched,
                    link_received_bytes=tenant.link_received_bytes,
                    link_sent_bytes=tenant.link_sent_bytes,
                    pending_blocks=tenant.replicator.pending_blocks if tenant.replicator is not None else 0,
                    replication=tenant.replicator.report() if tenant.replicator is not None else NOBODY,
                )
                for tenant in tenants
            ),
        )


def listen(server: StageServer, host: str, port: int, token: bytes) -> Listener:
    return Listener(host, port, token, server.serve)
