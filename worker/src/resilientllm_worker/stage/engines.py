"""The engines at a stage: how they are greeted, what they may command, and the heartbeats that they get."""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.blocks import unpack_blocks
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    AllocateKV,
    DescribeKV,
    EngineHello,
    Failed,
    Fence,
    Flush,
    Flushed,
    Forget,
    Heartbeat,
    KVAllocated,
    KVDescription,
    Message,
    Release,
    ReplicateTo,
    Sealed,
    StageLeaving,
    StageWelcome,
    Step,
    Stitch,
)
from resilientllm_worker.seams.errors import Unsupported
from resilientllm_worker.transport.errors import ConnectionClosed, ProtocolError

if TYPE_CHECKING:
    from resilientllm_worker.stage.model import KVNeeds, Model
    from resilientllm_worker.stage.step_loop import StepLoop
    from resilientllm_worker.stage.stitching import Stitching
    from resilientllm_worker.stage.tenant import Tenant
    from resilientllm_worker.stage.tenants import Tenants
    from resilientllm_worker.transport.connection import Connection

logger = logging.getLogger(__name__)

SHORTEST_HEARTBEAT_SECONDS = 0.01


class Engines:
    def __init__(
        self, model: Model, tenants: Tenants, loop: StepLoop, stitching: Stitching, digest: str, pool_fraction: float
    ) -> None:
        self._model = model
        self._tenants = tenants
        self._loop = loop
        self._stitching = stitching
        self._digest = digest
        self._pool_fraction = pool_fraction
        self._boot = secrets.token_hex(8)
        self._changed = tenants.changed
        # Under `_changed`.
        self._greeted: set[Connection] = set()
        """Also those that this stage does not serve."""
        self._ends_at: float | None = None
        """Monotonic seconds, once the stage was asked to end."""

    def tell_all(self, message: Message) -> None:
        with self._changed:
            engines = list(self._greeted)
        for engine in engines:
            engine.tell(message)

    def tell_of_end(self, in_seconds: float) -> None:
        """Now to all that are here, and as a part of its greeting to each that comes later."""
        with self._changed:
            self._ends_at = time.monotonic() + in_seconds
            engines = list(self._greeted)
        for engine in engines:
            engine.tell(StageLeaving(in_seconds))

    def serve(self, connection: Connection, hello: EngineHello) -> None:
        """Until the connection ends; in its thread."""
        with self._changed:
            tenant = self._tenants.of(hello.instance)
            stamp = tenant.fencing.newest
        kv = self._model.kv
        connection.send(
            StageWelcome(
                protocol=PROTOCOL_VERSION,
                instance=self._tenants.instance,
                stage=self._tenants.stage,
                stages=self._model.stages,
                tensor_parallel=self._model.tensor_parallel,
                boot=self._boot,
                config_digest=self._digest,
                stamp=stamp,
                home_blocks=kv.home_blocks if kv else 0,
                pool_blocks=kv.pool_blocks if kv else 0,
            )
        )
        if hello.protocol != PROTOCOL_VERSION or hello.config_digest != self._digest:
            logger.warning("engine of instance %d does not fit this stage; it will say why", hello.instance)
            return
        with self._changed:
            self._greeted.add(connection)
            ends_at = self._ends_at
            self._loop.deadlines.floor = hello.step_floor_seconds  # all engines have it from one object
        if ends_at is not None:
            connection.tell(StageLeaving(max(0.0, ends_at - time.monotonic())))
        gone = threading.Event()
        beat = threading.Thread(
            target=self._beat,
            args=(tenant, connection, hello.heartbeat_interval_seconds, gone),
            name="heartbeat",
            daemon=True,
        )
        beat.start()
        try:
            while True:
                self._obey(tenant, connection, connection.receive())
        except ConnectionClosed:
            logger.info("engine of instance %d has gone", hello.instance)
        finally:
            gone.set()
            with self._changed:
                self._greeted.discard(connection)
            self._stitching.leave(tenant, connection)

    def _obey(self, tenant: Tenant, connection: Connection, message: object) -> None:
        match message:
            case Step():
                with self._changed:
                    tenant.fencing, queued = tenant.fencing.queue(message, connection)
                    if queued:
                        tenant.counts.received = message.step
                        self._changed.notify_all()
            case Fence():
                self._stitching.fence(tenant, message.stamp, connection)
            case Stitch():
                connection.send(self._stitching.stitch(tenant, message, connection))
            case Release():
                self._stitching.release(tenant, message.stamp, connection)
            case Sealed():
                self._seal(tenant, message, connection)
            case Forget():
                with self._changed:
                    if tenant.fencing.is_in_force(message.stamp, connection) and tenant.blocks is not None:
                        tenant.unsealed(tenant.blocks.forget(unpack_blocks(message.blocks).tolist()))
            case Flush():
                self._flush(tenant, message, connection)
            case ReplicateTo():
                with self._changed:
                    if tenant.fencing.is_in_force(message.stamp, connection):
                        tenant.redirect(message.address)
            case DescribeKV():
                connection.send(self._describe(message))
            case AllocateKV():
                connection.send(self._allocate(tenant, message))
            case _:
                raise ProtocolError(f"an engine cannot send {type(message).__name__}")

    # --- replication -------------------------------------------------------------------------------------------

    def _seal(self, tenant: Tenant, message: Sealed, engine: Connection) -> None:
        with self._changed:
            if not tenant.fencing.is_in_force(message.stamp, engine) or tenant.blocks is None:
                return
            fresh = tenant.blocks.seal(message.seals)
            tenant.blocks.end(message.ended)
            if tenant.replicator is not None:
                slots = tenant.blocks.translate([seal.block for seal in fresh])
                tenant.replicator.offer(list(zip(fresh, slots, strict=True)), message.ended)

    def _flush(self, tenant: Tenant, message: Flush, engine: Connection) -> None:
        with self._changed:
            in_force = tenant.fencing.is_in_force(message.stamp, engine)
        if in_force and tenant.replicator is not None:
            tenant.replicator.flush(lambda: engine.tell(Flushed(message.call)))
        else:
            engine.tell(Flushed(message.call))

    # --- the KV cache ------------------------------------------------------------------------------------------

    def _describe(self, message: DescribeKV) -> KVDescription | Failed:
        try:
            ranks: list[KVNeeds] = self._loop.call(self._model.kv_needs_of_ranks)
        except Unsupported as error:
            return Failed(message.call, f"this model cannot be served: {error}")
        return KVDescription(
            message.call,
            [rank.specs for rank in ranks],
            [rank.layouts for rank in ranks],
            [self._home_share(rank.available_bytes) for rank in ranks],
            ranks[0].tasks,
        )

    def _home_share(self, available_bytes: int) -> int:
        return int(available_bytes / (1.0 + self._pool_fraction))

    def _allocate(self, tenant: Tenant, message: AllocateKV) -> KVAllocated | Failed:
        if not tenant.is_home:
            return Failed(message.call, f"{self._tenants.place} takes its KV layout from its own engine only")

        def allocate() -> KVAllocated:
            pool = 0
            if self._pool_fraction > 0:
                # A guest's longest request must fit, or it would wait for ever.
                pool = max(
                    math.ceil(message.home_blocks * self._pool_fraction),
                    self._model.blocks_of_longest_request(message.groups),
                )
            kv = self._model.allocate(message.layout, message.home_blocks, pool, message.groups)
            return KVAllocated(
                message.call, kv.home_blocks, kv.pool_blocks, kv.language_model_seconds, kv.encoder_seconds
            )

        try:
            allocated: KVAllocated = self._loop.call(allocate)
        except ValueError as error:
            return Failed(message.call, str(error))
        return allocated

    # --- heartbeats --------------------------------------------------------------------------------------------

    def _beat(self, tenant: Tenant, connection: Connection, interval_seconds: float, gone: threading.Event) -> None:
        while not gone.wait(max(SHORTEST_HEARTBEAT_SECONDS, interval_seconds)):
            if not connection.tell(self._heartbeat(tenant, connection)):
                return

    def _heartbeat(self, tenant: Tenant, engine: Connection) -> Heartbeat:
        loop = self._loop
        running, allowed = loop.clock.read()
        report, progress = None, None
        if tenant.stitched:
            report = tenant.replicator.report() if tenant.replicator is not None else None
            link = tenant.inbound
            progress = tenant.counts.told(engine.received_bytes, link.received_bytes if link is not None else 0)
        return Heartbeat(loop.steps_done, running, self._model.kv is not None, report, progress, allowed, loop.pace)
