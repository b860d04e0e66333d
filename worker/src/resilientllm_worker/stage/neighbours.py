"""What other stages bring: the previous one hidden states, and whoever pairs with this one blocks to keep."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import LinkHello, ReplicaHello, ReplicaWelcome
from resilientllm_worker.replication.keeper import serve_replicas
from resilientllm_worker.stage.activations import BadActivation, Landing
from resilientllm_worker.transport.errors import ConnectionClosed, CorruptFrame, ProtocolError

if TYPE_CHECKING:
    from resilientllm_worker.stage.stitching import Stitching
    from resilientllm_worker.stage.tenant import Closing, Tenant
    from resilientllm_worker.stage.tenants import Tenants
    from resilientllm_worker.transport.connection import Connection

logger = logging.getLogger(__name__)


class Neighbours:
    def __init__(self, tenants: Tenants, stitching: Stitching) -> None:
        self._tenants = tenants
        self._stitching = stitching
        self._changed = tenants.changed

    def serve_link(self, connection: Connection, hello: LinkHello) -> None:
        """Until the connection ends, or its hidden states are of no use any more; in its thread."""
        stage = self._tenants.stage
        if hello.stage != stage - 1:
            raise ProtocolError(f"stage {stage} takes links from stage {stage - 1}, not {hello.stage}")
        with self._changed:
            tenant = self._tenants.of(hello.instance)
            verdict, _ = tenant.turn(tenant.fencing.link(hello.stamp, connection))
        if verdict.refusal:
            return
        try:
            while True:
                landing = Landing(pinned=False)
                header = connection.receive_into(landing.allocate)
                if header.stamp != hello.stamp:
                    raise ProtocolError(f"the link was made for {hello.stamp}, the frame says {header.stamp}")
                with self._changed:
                    tenant.fencing, landed = tenant.fencing.land(header.stamp, connection, header.step, landing.tensors)
                    if not landed:
                        return
                    if header.stamp == tenant.stamp:
                        tenant.counts.landed = header.step
                    tenant.link_received_bytes += sum(tensor.nbytes for tensor in header.tensors)
                    self._changed.notify_all()
        except BadActivation as error:
            raise ProtocolError(str(error)) from error
        except (ConnectionClosed, CorruptFrame) as error:
            self._stitching.report_lost(tenant, hello.stamp, hello.stage, str(error))
            if isinstance(error, CorruptFrame):
                raise
        finally:
            with self._changed:
                tenant.fencing = tenant.fencing.unlink(connection)

    def serve_replicas(self, connection: Connection, hello: ReplicaHello) -> None:
        """Until the connection ends; in its thread."""
        with self._changed:
            tenant = self._tenants.of(hello.instance)
            refusal = self._refusal(tenant, hello)
            closing: list[Closing] = []
            if not refusal:
                verdict, closing = tenant.turn(tenant.fencing.keep(hello.stamp, connection))
                refusal = verdict.refusal and f"{self._tenants.place} {verdict.refusal}"
            if not refusal:
                tenant.receiving += 1
        if refusal:
            logger.info("keeps no blocks for instance %d: %s", hello.instance, refusal)
            connection.send(ReplicaWelcome(refusal, b"", b""))
            return
        for each in closing:
            each.close()
        assert tenant.blocks is not None and self._tenants.store is not None

        @contextlib.contextmanager
        def may_store() -> Iterator[bool]:
            with self._changed:
                yield tenant.fencing.may_store(hello.stamp, connection)

        try:
            serve_replicas(connection, hello, tenant.blocks, self._tenants.store, may_store)
        finally:
            with self._changed:
                tenant.receiving -= 1
                self._changed.notify_all()

    def _refusal(self, tenant: Tenant, hello: ReplicaHello) -> str:
        """Why this stage cannot keep these blocks; empty if it can."""
        place = self._tenants.place
        if hello.stage != self._tenants.stage:
            return f"{place} keeps blocks of stages {self._tenants.stage} only"
        if self._tenants.store is None or tenant.blocks is None:
            return f"{place} has no KV cache that blocks could be kept in"
        return ""
