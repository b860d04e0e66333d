"""A stage's place in the pipelines of its tenants: fenced, stitched, released."""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    Failed,
    LinkHello,
    LinkLost,
    Stamp,
    Stitch,
    Stitched,
)
from resilientllm_worker.transport.connection import dial
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed
from resilientllm_worker.transport.link import LinkSender

if TYPE_CHECKING:
    from resilientllm_worker.stage.model import KVCache, Model
    from resilientllm_worker.stage.step_loop import StepLoop
    from resilientllm_worker.stage.tenant import Closing, Tenant
    from resilientllm_worker.stage.tenants import Tenants
    from resilientllm_worker.transport.connection import Connection

LINK_DIAL_SECONDS = 1.0
"""For the connection, and once more for authentication: less than an engine waits for a stitch."""
OLD_WRITES_SECONDS = 1.0
"""How long a stitch waits for what an older topology may still write: less than an engine waits for a stitch."""


class Stitching:
    """What is obeyed is decided by ``protocol/fencing.py``; here it is done."""

    def __init__(self, model: Model, tenants: Tenants, loop: StepLoop, token: bytes) -> None:
        self._model = model
        self._tenants = tenants
        self._loop = loop
        self._token = token
        self._changed = tenants.changed

    def fence(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> str:
        """Returns why ``stamp`` is not in force now; empty if it is."""
        with self._changed:
            verdict, closing = tenant.turn(tenant.fencing.fence(stamp, engine))
            if verdict.voids:
                self._loop.forget(tenant.prefix)
                self._stop_serving_soon(tenant, leaves=False)
        for each in closing:
            each.close()
        return verdict.refusal

    def stitch(self, tenant: Tenant, message: Stitch, engine: Connection) -> Stitched | Failed:
        place = self._tenants.place
        kv = self._model.kv
        if kv is None:
            return Failed(message.call, f"{place} has no KV cache yet: its own engine has not attached")
        if refusal := self.fence(tenant, message.stamp, engine):
            return Failed(message.call, f"{place} {refusal}")
        with self._changed:
            self._tenants.of(tenant.instance)  # it may have greeted us before the KV cache was allocated
        if (busy := self._await_old_writes(tenant)) is not None:
            return Failed(message.call, f"{place} {busy}")
        outbound: LinkSender | None = None
        if message.next_address is not None:
            stage = self._tenants.stage
            try:
                connection = dial(message.next_address, self._token, LINK_DIAL_SECONDS)
                connection.send(LinkHello(PROTOCOL_VERSION, tenant.instance, stage, message.stamp, 0))
            except (ConnectionFailed, ConnectionClosed) as error:
                reason = f"{place} cannot link to the next stage at {message.next_address}: {error}"
                return Failed(message.call, reason, unreachable=stage + 1)
            outbound = LinkSender(connection, lambda detail: self.report_lost(tenant, message.stamp, stage + 1, detail))
        answer, closing = self._take_place(tenant, message, engine, outbound, kv)
        for each in closing:
            each.close()
        return answer

    def release(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> None:
        if self.fence(tenant, stamp, engine):
            return
        with self._changed:
            self._let_go(tenant)

    def leave(self, tenant: Tenant, engine: Connection) -> None:
        """The engine's connection ended. Its stamp stays: an older one must not come back."""
        with self._changed:
            verdict, closing = tenant.turn(tenant.fencing.leave(engine))
            if verdict.refusal:
                return
            self._loop.forget(tenant.prefix)
            self._let_go(tenant)
        for each in closing:
            each.close()

    def report_lost(self, tenant: Tenant, stamp: Stamp, neighbour: int, detail: str) -> None:
        """Also of a link that breaks before its stitch is done: nothing would tell of it later."""
        with self._changed:
            engine = tenant.engine if tenant.stamp == stamp else None
        if engine is not None:
            engine.tell(LinkLost(stamp, neighbour, detail))

    def _await_old_writes(self, tenant: Tenant) -> str | None:
        """Wait until nobody writes what the new topology may use. Returns who still does, after a while.

        A guest's slots are given anew, and a step that is void now may still write into old ones. One of home writes
        home's blocks, before any step of the new topology does.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: tenant.receiving == 0, OLD_WRITES_SECONDS):
                return "is still storing replicas from an older topology"
            if tenant.is_home:
                return None
            if not self._changed.wait_for(lambda: not self._loop.runs(tenant.instance), OLD_WRITES_SECONDS):
                return "is still in a step of an older topology of the same guest"
            # The guest before may have left a moment ago.
            self._changed.wait_for(
                lambda: self._tenants.has_room_for(tenant) or not self._loop.has_calls, OLD_WRITES_SECONDS
            )
            return None

    def _take_place(
        self, tenant: Tenant, message: Stitch, engine: Connection, outbound: LinkSender | None, kv: KVCache
    ) -> tuple[Stitched | Failed, list[Closing]]:
        """The second half of a stitch, and what is to be closed after it: ``outbound``, if there is no place."""
        place = self._tenants.place
        unused: list[Closing] = [] if outbound is None else [outbound]
        with self._changed:
            if not self._tenants.has_room_for(tenant):
                reason = f"{place} already serves instance {self._tenants.guest} as a guest"
                return Failed(message.call, reason), unused
            if not tenant.is_home and kv.pool_blocks == 0:
                return Failed(message.call, f"{place} has no pool blocks for guests"), unused
            verdict, closing = tenant.turn(tenant.fencing.stitch(message.stamp, engine))
            if verdict.refusal:
                return Failed(message.call, f"{place} {verdict.refusal}"), unused
            assert tenant.blocks is not None
            if not tenant.is_home:
                self._tenants.guest = tenant.instance
                tenant.blocks.stop_serving()  # what its older topology left unsealed is of no use
            tenant.blocks.serve()
            held = tenant.blocks.held() if message.report_sealed else (b"", b"")
            tenant.outbound = outbound
            tenant.needed = True
            self._changed.notify_all()
            capacity = kv.home_blocks - 1 if tenant.is_home else kv.pool_blocks
            return Stitched(message.call, message.stamp, capacity, *held), closing

    def _let_go(self, tenant: Tenant) -> None:
        tenant.needed = False
        self._stop_serving_soon(tenant, leaves=True)
        tenant.redirect(None)

    def _stop_serving_soon(self, tenant: Tenant, leaves: bool) -> None:
        """Between two steps: until then the runner may be in a step of this tenant, and write its blocks."""
        stamp = tenant.stamp

        def stop() -> None:
            with self._changed:
                if tenant.stamp != stamp or tenant.stitched or tenant.blocks is None:
                    return
                tenant.blocks.stop_serving()
                if leaves and self._tenants.guest == tenant.instance:
                    self._tenants.guest = None
                self._changed.notify_all()

        self._loop.call_soon(stop)
