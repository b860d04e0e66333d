"""The stage server: takes engines' commands and neighbours' hidden states, and runs steps one at a time.

Threads: one per connection reads and notes what came; one, the caller of `run`, touches vLLM. A step runs when its
command and its hidden states are both here, so a tenant whose pipeline is slow never holds up the other.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import msgspec

from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    AllocateKV,
    DescribeKV,
    EngineHello,
    Failed,
    Fence,
    Heartbeat,
    KVAllocated,
    KVDescription,
    LinkHello,
    LinkLost,
    Release,
    StageFailing,
    StageWelcome,
    Stamp,
    Step,
    StepFailed,
    Stitch,
    Stitched,
)
from resilientllm_worker.seams.errors import Malformed
from resilientllm_worker.stage.activations import BadActivation, Landing, describe
from resilientllm_worker.stage.tenant import Tenant
from resilientllm_worker.tenancy.block_map import BlockMap, IdentityMap
from resilientllm_worker.tenancy.errors import TranslationError
from resilientllm_worker.tenancy.translate import from_runner, to_runner
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed, LinkClosed, ProtocolError
from resilientllm_worker.transport.link import LinkSender, Posted
from resilientllm_worker.transport.listener import Listener

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.seams.pipeline_group import SendHandle
    from resilientllm_worker.stage.model import KVNeeds, Model

logger = logging.getLogger(__name__)

LINK_DIAL_SECONDS = 1.0
"""For the connection, and once more for authentication: less than an engine waits for a stitch."""
SHORTEST_HEARTBEAT_SECONDS = 0.01


class StageServer:
    def __init__(
        self, model: Model, instance: int, stage: int, digest: str, token: bytes, pool_fraction: float
    ) -> None:
        self._model = model
        self._instance = instance
        self._stage = stage
        self._digest = digest
        self._token = token
        self._pool_fraction = pool_fraction
        self._boot = secrets.token_hex(8)
        self._changed = threading.Condition()
        # All below under `_changed`.
        self._tenants: dict[int, Tenant] = {}
        self._guest: int | None = None
        self._void_prefixes: set[str] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._turn = 0
        self._stopping = False
        # Written by the runner thread, read by heartbeats.
        self._steps_done = 0
        self._step_started: float | None = None

    # --- the runner thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run steps until `stop`, or until the model fails, which is raised: the stage cannot serve after that."""
        while (work := self._next()) is not None:
            if isinstance(work, tuple):
                self._run_step(*work)
            else:
                work()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Tell every engine, before the process ends."""
        with self._changed:
            engines = [tenant.engine for tenant in self._tenants.values() if tenant.engine is not None]
        for engine in engines:
            _tell(engine, StageFailing(reason))

    def _next(self) -> Callable[[], None] | tuple[Tenant, Step, dict[str, torch.Tensor] | None, list[str]] | None:
        with self._changed:
            while True:
                if self._stopping:
                    return None
                if self._calls:
                    return self._calls.popleft()
                ready = [t for t in self._tenants.values() if t.ready_step(self._stage == 0) is not None]
                if ready:
                    break
                self._changed.wait()
            tenant = min(ready, key=lambda candidate: candidate.last_served)
            self._turn += 1
            tenant.last_served = self._turn
            step = tenant.steps.popleft()
            inbound = tenant.arrived.pop((step.stamp, step.step), None)
            void = list(self._void_prefixes)
            self._void_prefixes.clear()
            return tenant, step, inbound, void

    def _run_step(self, tenant: Tenant, step: Step, inbound: dict[str, torch.Tensor] | None, void: list[str]) -> None:
        with self._changed:
            if tenant.stamp != step.stamp or tenant.blocks is None:
                self._void_prefixes.update(void)
                return  # fenced since it was taken
            blocks, outbound, engine = tenant.blocks, tenant.outbound, tenant.engine
        assert self._model.kv is not None and engine is not None
        try:
            ours = to_runner(step, tenant.prefix, blocks, self._model.kv.block_size)
        except TranslationError as error:
            with self._changed:
                self._void_prefixes.update(void)
            _tell(engine, StepFailed(step.stamp, step.step, str(error)))
            return
        if void:
            known = [request for request in self._model.requests() if request.startswith(tuple(void))]
            ours = msgspec.structs.replace(ours, finished=[*ours.finished, *known])

        def send(tensors: dict[str, torch.Tensor]) -> SendHandle:
            header, buffers = describe(tensors, step.stamp, step.step)
            assert outbound is not None
            return _Sent(outbound.post(header, buffers))

        self._step_started = time.monotonic()
        try:
            result = self._model.run(ours, inbound, send if outbound is not None else None)
        except Malformed as error:
            with self._changed:
                self._void_prefixes.update(void)
            _tell(engine, StepFailed(step.stamp, step.step, str(error)))
            return
        finally:
            self._step_started = None
            self._steps_done += 1
        if result is not None:
            _tell(engine, from_runner(result, tenant.prefix))

    def _in_runner(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the runner thread, between steps, and return what it returns."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(work())
            except ValueError as error:
                future.set_exception(error)

        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()
        return future.result()

    # --- connections -------------------------------------------------------------------------------------------

    def serve(self, connection: Connection) -> None:
        """Serve one authenticated connection until it ends; runs in that connection's thread."""
        hello = connection.receive()
        if isinstance(hello, EngineHello):
            self._serve_engine(connection, hello)
        elif isinstance(hello, LinkHello):
            self._serve_link(connection, hello)
        else:
            raise ProtocolError(f"expected EngineHello or LinkHello, got {type(hello).__name__}")

    def _tenant(self, instance: int) -> Tenant:
        tenant = self._tenants.get(instance)
        if tenant is None:
            tenant = self._tenants[instance] = Tenant(instance, is_home=instance == self._instance)
        return tenant

    def _serve_engine(self, connection: Connection, hello: EngineHello) -> None:
        with self._changed:
            tenant = self._tenant(hello.instance)
            stamp = tenant.stamp
        kv = self._model.kv
        connection.send(
            StageWelcome(
                protocol=PROTOCOL_VERSION,
                instance=self._instance,
                stage=self._stage,
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
        gone = threading.Event()
        beat = threading.Thread(
            target=self._beat, args=(connection, hello.heartbeat_interval_seconds, gone), name="heartbeat", daemon=True
        )
        beat.start()
        try:
            while True:
                self._obey(tenant, connection, connection.receive())
        except ConnectionClosed:
            logger.info("engine of instance %d has gone", hello.instance)
        finally:
            gone.set()
            self._leave(tenant, connection)

    def _obey(self, tenant: Tenant, connection: Connection, message: object) -> None:
        match message:
            case Step():
                with self._changed:
                    if message.stamp == tenant.stamp and connection is tenant.engine:
                        tenant.steps.append(message)
                        self._changed.notify_all()
            case Fence():
                self._fence(tenant, message.stamp, connection)
            case Stitch():
                connection.send(self._stitch(tenant, message, connection))
            case Release():
                self._release(tenant, message.stamp, connection)
            case DescribeKV():
                ranks: list[KVNeeds] = self._in_runner(self._model.kv_needs_of_ranks)
                connection.send(
                    KVDescription(
                        message.call,
                        [rank.specs for rank in ranks],
                        [rank.layouts for rank in ranks],
                        [self._home_share(rank.available_bytes) for rank in ranks],
                        ranks[0].tasks,
                    )
                )
            case AllocateKV():
                connection.send(self._allocate(tenant, message))
            case _:
                raise ProtocolError(f"an engine cannot send {type(message).__name__}")

    def _home_share(self, available_bytes: int) -> int:
        return int(available_bytes / (1.0 + self._pool_fraction))

    def _allocate(self, tenant: Tenant, message: AllocateKV) -> KVAllocated | Failed:
        if not tenant.is_home:
            return Failed(
                message.call, f"stage {self._instance}.{self._stage} takes its KV layout from its own engine only"
            )

        def allocate() -> KVAllocated:
            block_size = self._model.block_size
            pool = 0
            if self._pool_fraction > 0:
                # A guest's longest request must fit, or it would wait for ever.
                pool = max(
                    math.ceil(message.home_blocks * self._pool_fraction),
                    math.ceil(self._model.max_model_len / block_size),
                )
            kv = self._model.allocate(message.layout, message.home_blocks, pool, message.groups)
            return KVAllocated(
                message.call, kv.home_blocks, kv.pool_blocks, kv.language_model_seconds, kv.encoder_seconds
            )

        try:
            allocated: KVAllocated = self._in_runner(allocate)
        except ValueError as error:
            return Failed(message.call, str(error))
        return allocated

    # --- topology ----------------------------------------------------------------------------------------------

    def _fence(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> bool:
        """Returns whether ``stamp`` is in force now; an older one changes nothing."""
        with self._changed:
            if stamp < tenant.stamp or (stamp == tenant.stamp and tenant.engine is not engine):
                return False
            if stamp == tenant.stamp:
                return True
            replaced = tenant.engine if tenant.engine is not engine else None
            closing = tenant.fence(stamp, engine)
            self._void_prefixes.add(tenant.prefix)
        if replaced is not None:
            replaced.close()  # its engine would wait for ever for steps that are void now
        for link in closing:
            link.close()
        return True

    def _stitch(self, tenant: Tenant, message: Stitch, engine: Connection) -> Stitched | Failed:
        place = f"stage {self._instance}.{self._stage}"
        kv = self._model.kv
        if kv is None:
            return Failed(message.call, f"{place} has no KV cache yet: its own engine has not attached")
        if not self._fence(tenant, message.stamp, engine):
            return Failed(message.call, f"{place} obeys {tenant.stamp} of another engine, {message.stamp} is older")
        outbound: LinkSender | None = None
        if message.next_address is not None:
            try:
                connection = dial(message.next_address, self._token, LINK_DIAL_SECONDS)
                connection.send(LinkHello(PROTOCOL_VERSION, tenant.instance, self._stage, message.stamp, 0))
            except (ConnectionFailed, ConnectionClosed) as error:
                reason = f"{place} cannot link to the next stage at {message.next_address}: {error}"
                return Failed(message.call, reason, unreachable=self._stage + 1)
            outbound = LinkSender(
                connection, lambda detail: self._report_lost(tenant, message.stamp, self._stage + 1, detail)
            )
        with self._changed:
            refusal = None
            if tenant.stamp != message.stamp:
                refusal = f"{place} was fenced by {tenant.stamp} meanwhile"
            elif not tenant.is_home and self._guest not in (None, tenant.instance):
                refusal = f"{place} already serves instance {self._guest} as a guest"
            elif not tenant.is_home and kv.pool_blocks == 0:
                refusal = f"{place} has no pool blocks for guests"
            if refusal is None:
                if tenant.is_home:
                    tenant.blocks, capacity = IdentityMap(kv.home_blocks), kv.home_blocks - 1
                else:
                    self._guest = tenant.instance
                    tenant.blocks, capacity = BlockMap(kv.home_blocks, kv.pool_blocks), kv.pool_blocks
                tenant.outbound = outbound
                self._changed.notify_all()
                return Stitched(message.call, message.stamp, capacity)
        if outbound is not None:
            outbound.close()
        return Failed(message.call, refusal)

    def _release(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> None:
        if not self._fence(tenant, stamp, engine):
            return
        with self._changed:
            if self._guest == tenant.instance:
                self._guest = None

    def _leave(self, tenant: Tenant, connection: Connection) -> None:
        """The engine's connection ended. Its stamp stays: an older one must not come back."""
        with self._changed:
            if tenant.engine is not connection:
                return
            closing = tenant.fence(tenant.stamp, connection)
            tenant.engine = None
            self._void_prefixes.add(tenant.prefix)
            if self._guest == tenant.instance:
                self._guest = None
            closing.extend(tenant.links.values())
            tenant.links.clear()
        for link in closing:
            link.close()

    # --- links -------------------------------------------------------------------------------------------------

    def _serve_link(self, connection: Connection, hello: LinkHello) -> None:
        if hello.stage != self._stage - 1:
            raise ProtocolError(f"stage {self._stage} takes links from stage {self._stage - 1}, not {hello.stage}")
        with self._changed:
            tenant = self._tenant(hello.instance)
            if hello.stamp < tenant.stamp:
                return
            tenant.links[hello.stamp] = connection
        try:
            while True:
                landing = Landing(pinned=False)
                header = connection.receive_into(landing.allocate)
                if header.stamp != hello.stamp:
                    raise ProtocolError(f"the link was made for {hello.stamp}, the frame says {header.stamp}")
                with self._changed:
                    if hello.stamp < tenant.stamp:
                        return
                    tenant.arrived[header.stamp, header.step] = landing.tensors
                    self._changed.notify_all()
        except BadActivation as error:
            raise ProtocolError(str(error)) from error
        except ConnectionClosed as error:
            self._report_lost(tenant, hello.stamp, hello.stage, str(error))
        finally:
            with self._changed:
                if tenant.links.get(hello.stamp) is connection:
                    del tenant.links[hello.stamp]

    def _report_lost(self, tenant: Tenant, stamp: Stamp, neighbour: int, detail: str) -> None:
        """Also of a link that breaks before its stitch is done: nothing would tell of it later."""
        with self._changed:
            engine = tenant.engine if tenant.stamp == stamp else None
        if engine is not None:
            _tell(engine, LinkLost(stamp, neighbour, detail))

    def _beat(self, connection: Connection, interval_seconds: float, gone: threading.Event) -> None:
        while not gone.wait(max(SHORTEST_HEARTBEAT_SECONDS, interval_seconds)):
            started = self._step_started
            running = time.monotonic() - started if started is not None else 0.0
            if not _tell(connection, Heartbeat(self._steps_done, running, self._model.kv is not None)):
                return


class _Sent:
    """A `Posted` as vLLM wants it: after `wait` its memory is free, whatever became of the link."""

    def __init__(self, posted: Posted) -> None:
        self._posted = posted

    def wait(self) -> None:
        with contextlib.suppress(LinkClosed):  # told to the engine by the link itself
            self._posted.wait()


def _tell(engine: Connection, message: Any) -> bool:
    """Send what nobody waits for here; an engine that has gone is noticed by its own connection's thread."""
    try:
        engine.send(message)
    except ConnectionClosed:
        return False
    return True


def listen(server: StageServer, host: str, port: int, token: bytes) -> Listener:
    return Listener(host, port, token, server.serve)
