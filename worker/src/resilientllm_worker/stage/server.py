"""The stage server: takes engines' commands and neighbours' hidden states, and runs steps, those of two tenants as one.

Threads: one per connection reads and notes what came; one, the caller of `run`, touches vLLM. A step runs when its
command and its hidden states are both here, so a tenant whose pipeline is slow never holds up the other. If such a step
of each tenant is at hand when the runner is free, they run in one forward; else tenants take turns. Nobody waits for
the other tenant, but for a moment after such a forward.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

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
    LinkHello,
    LinkLost,
    Message,
    Pace,
    Release,
    ReplicaHello,
    ReplicateTo,
    ReplicaWelcome,
    Sealed,
    StageFailing,
    StageLeaving,
    StageWelcome,
    Stamp,
    Step,
    StepFailed,
    StepResult,
    Stitch,
    Stitched,
    WeightsHello,
)
from resilientllm_worker.replication import tcp
from resilientllm_worker.replication.keeper import serve_replicas
from resilientllm_worker.replication.sender import Replicator
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.stage.activations import BadActivation, Landing, describe
from resilientllm_worker.stage.deadline import Deadlines, size_class
from resilientllm_worker.stage.merge import gather, merged, scatter, share, spans, why_apart
from resilientllm_worker.stage.metrics import NOBODY, StageFigures, TenantFigures
from resilientllm_worker.stage.pace import Steps
from resilientllm_worker.stage.progress import Counts
from resilientllm_worker.stage.step_clock import StepClock
from resilientllm_worker.stage.step_times import StepTimes
from resilientllm_worker.stage.tenant import Closing, Tenant
from resilientllm_worker.tenancy.errors import SlotsBusy, TranslationError
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.pool import Pool, PoolUse
from resilientllm_worker.tenancy.translate import from_runner, to_runner, written_blocks
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import (
    ConnectionClosed,
    ConnectionFailed,
    CorruptFrame,
    LinkClosed,
    ProtocolError,
)
from resilientllm_worker.transport.link import LinkSender, Posted
from resilientllm_worker.transport.listener import Listener

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.replication.channel import ReplicaChannel
    from resilientllm_worker.replication.store import BlockStore
    from resilientllm_worker.stage.model import KVCache, KVNeeds, Model
    from resilientllm_worker.tenancy.blocks import Blocks

logger = logging.getLogger(__name__)

LINK_DIAL_SECONDS = 1.0
"""For the connection, and once more for authentication: less than an engine waits for a stitch."""
SHORTEST_HEARTBEAT_SECONDS = 0.01
PACE_STEPS = 16
"""So often the stage sums up how long its steps take."""
SLOTS_BUSY_SECONDS = 0.001
COMPANY_FRACTION = 0.3
"""Of a merged forward's time: how long the step after it waits for the other tenant's.

Both results left at once, and both pipelines are equally long, so the next steps come back close together, but not at
the same moment. If the first of them ran alone, the other would have to wait for all of it, and they would drift apart.
"""
LONGEST_COMPANY_SECONDS = 0.01
"""The forward may have been a long prompt's, and the step after it is not."""
OLD_WRITES_SECONDS = 1.0
"""How long a stitch waits for what an older topology may still write: less than an engine waits for a stitch."""


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
        self._give = give
        self._model = model
        self._instance = instance
        self._stage = stage
        self._digest = digest
        self._token = token
        self._pool_fraction = pool_fraction
        self._merges = merges
        self._boot = secrets.token_hex(8)
        self._changed = threading.Condition()
        # All below under `_changed`.
        self._tenants: dict[int, Tenant] = {}
        self._pool: Pool | None = None
        self._store: BlockStore | None = None
        """None: what this stage holds cannot be copied."""
        self._running: set[int] = set()
        """The instances whose steps are in the runner."""
        self._guest: int | None = None
        self._void_prefixes: set[str] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._turn = 0
        self._engines: set[Connection] = set()
        """All that were greeted, also those that this stage does not serve."""
        self._ends_at: float | None = None
        """Monotonic seconds, once it was asked to end."""
        self._stopping = False
        self._corrupt_frames = 0
        # Written by the runner thread, read by heartbeats.
        self._steps_done = 0
        self._merged_steps_done = 0
        self._clock = StepClock()
        self._deadlines = Deadlines()
        self._steps = Steps()
        self._step_times = StepTimes()
        self._pace: Pace | None = None
        """Of `_steps`, which the runner alone may look at."""
        # The runner thread's own.
        self._company_seconds = 0.0
        """How long the next step waits for the other tenant's, if that is not at hand."""

    # --- the runner thread -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run steps until `stop`, or until the model fails, which is raised: the stage cannot serve after that."""
        while (work := self._next()) is not None:
            if isinstance(work, tuple):
                self._run_turns(*work)
            else:
                work()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def leave(self, timeout_seconds: float) -> None:
        """Tell every engine that this stage is about to end, serve until none needs it or the time is over, and stop.

        Waits for that, so call it in a thread of its own.
        """
        with self._changed:
            self._ends_at = time.monotonic() + timeout_seconds
            engines = list(self._engines)
        for engine in engines:
            _tell(engine, StageLeaving(timeout_seconds))
        with self._changed:
            if not self._changed.wait_for(lambda: not self._needed_by(), timeout_seconds):
                logger.warning(
                    "ends although instances %s need it: %.1f s are over", self._needed_by(), timeout_seconds
                )
        self.stop()

    def _needed_by(self) -> list[int]:
        return [tenant.instance for tenant in self._tenants.values() if tenant.needed]

    def fail(self, reason: str) -> None:
        """Tell every engine, before the process ends."""
        with self._changed:
            engines = list(self._engines)
        for engine in engines:
            _tell(engine, StageFailing(reason))

    @property
    def counts(self) -> dict[str, int]:
        """For people: steps that the runner has finished, those of them that were both tenants' at once, and frames
        that did not arrive as they were sent."""
        return {
            "steps": self._steps_done,
            "merged": self._merged_steps_done,
            "corruptFrames": self._corrupt_frames,
        }

    @property
    def figures(self) -> StageFigures:
        """For metrics. Takes the locks that heartbeats take, each for a moment."""
        running, allowed = self._clock.read()
        buckets, seconds = self._step_times.read()
        kv = self._model.kv
        with self._changed:
            tenants, pool = list(self._tenants.values()), self._pool
        return StageFigures(
            steps=self._steps_done,
            merged_steps=self._merged_steps_done,
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

    def step_at_hand(self) -> tuple[int, float, float]:
        """Steps done, and of the one in the runner how long it has been there and how long it may; zeros for none."""
        return (self._steps_done, *self._clock.read())

    def _next(self) -> Callable[[], None] | tuple[list[_Turn], list[str]] | None:
        with self._changed:
            while True:
                if self._stopping:
                    return None
                if self._calls:
                    return self._calls.popleft()
                ready = self._ready()
                if not ready:
                    self._changed.wait()
                elif len(ready) == 1 and self._company_seconds and sum(t.stitched for t in self._tenants.values()) > 1:
                    company, self._company_seconds = self._company_seconds, 0.0
                    self._changed.wait_for(lambda: self._stopping or self._calls or len(self._ready()) != 1, company)
                else:
                    break
            ready.sort(key=lambda candidate: candidate.last_served)
            room = self._model.merging_room() if self._merges and len(ready) > 1 else None
            steps = [step for tenant in ready if (step := self._ready_step(tenant)) is not None]
            if room is None or why_apart(steps, room) is not None:
                del ready[1:]
            self._running = {tenant.instance for tenant in ready}
            void = list(self._void_prefixes)
            self._void_prefixes.clear()
            return [self._take(tenant) for tenant in ready], void

    def _ready(self) -> list[Tenant]:
        return [tenant for tenant in self._tenants.values() if self._ready_step(tenant) is not None]

    def _ready_step(self, tenant: Tenant) -> Step | None:
        return tenant.fencing.next_step(needs_states=self._stage > 0)

    def _take(self, tenant: Tenant) -> _Turn:
        self._turn += 1
        tenant.last_served = self._turn
        tenant.fencing, step, inbound = tenant.fencing.take()
        assert tenant.blocks is not None and tenant.engine is not None, "a tenant without them is not stitched"
        return _Turn(tenant, step, inbound, tenant.blocks, tenant.outbound, tenant.engine, tenant.counts)

    def _run_turns(self, turns: list[_Turn], void: list[str]) -> None:
        """``turns`` are of different tenants, and what is wrong with one of them is no matter of the others."""
        answers: list[tuple[Connection, StepResult | StepFailed]] = []
        ready: list[tuple[_Turn, Step]] = []
        for turn in turns:
            try:
                ready.append((turn, self._translate(turn)))
            except TranslationError as error:
                answers.append((turn.engine, turn.failed(error)))
        batches = [ready] if ready else []
        while batches:
            batch = batches.pop(0)
            try:
                answers += self._run_batch(batch, void)
                void = []
            except Malformed as error:
                if len(batch) > 1:
                    batches = [[each] for each in batch]
                else:
                    ((turn, _),) = batch
                    answers.append((turn.engine, turn.failed(error)))
        self._end_turns(void)
        for engine, answer in answers:
            _tell(engine, answer)

    def _run_batch(self, batch: list[tuple[_Turn, Step]], void: list[str]) -> list[tuple[Connection, StepResult]]:
        """One forward for all of ``batch``. Raises `Malformed`, and then nothing has happened."""
        turns, steps = [turn for turn, _ in batch], [step for _, step in batch]
        step, inbound = steps[0], turns[0].inbound

        def send(tensors: dict[str, torch.Tensor]) -> _Sent:
            return _Sent([turns[0].post(tensors)], self._clock)

        if len(batch) > 1:
            step = merged(steps)
            order, own_orders = self._model.row_order(step), [self._model.row_order(each) for each in steps]
            where = spans(order, own_orders, dict(step.num_scheduled_tokens))
            inbounds = [turn.inbound for turn in turns if turn.inbound is not None]
            inbound = gather(where, inbounds) if inbounds else None

            def send(tensors: dict[str, torch.Tensor]) -> _Sent:
                posted = [turn.post(scatter(where, place, tensors)) for place, turn in enumerate(turns)]
                return _Sent(posted, self._clock)

        if void:
            known = [request for request in self._model.requests() if request.startswith(tuple(void))]
            step = msgspec.structs.replace(step, finished=[*step.finished, *known])
        size = size_class(step)
        self._clock.begin(self._deadlines.allowed(size))
        try:
            result = self._model.run(step, inbound, send if turns[0].outbound is not None else None)
        finally:
            took = self._clock.end()
            self._deadlines.observe(size, took)
            self._steps.observe(size, took)
            self._step_times.observe(took)
            self._company_seconds = min(COMPANY_FRACTION * took, LONGEST_COMPANY_SECONDS) if len(batch) > 1 else 0.0
            self._steps_done += 1
            if self._steps_done % PACE_STEPS == 0:
                self._pace = self._steps.pace()
            self._merged_steps_done += len(batch) > 1
            for turn in turns:
                turn.counts.done = turn.step.step
        if result is None:
            return []
        if len(batch) == 1:
            return [(turns[0].engine, from_runner(result, turns[0].tenant.prefix))]
        return [(turn.engine, from_runner(turn.share_of(result), turn.tenant.prefix)) for turn in turns]

    def _translate(self, turn: _Turn) -> Step:
        """The step as the runner is to see it. What it writes has no seals any more. Raises `TranslationError`."""
        assert self._model.kv is not None
        block_size = self._model.kv.block_size
        while True:
            try:
                step = to_runner(turn.step, turn.tenant.prefix, turn.blocks, block_size)
                break
            except SlotsBusy:  # a replica is being written where this step needs a slot: a matter of one batch
                with self._changed:
                    self._changed.wait(SLOTS_BUSY_SECONDS)
        with self._changed:
            self._void(turn.tenant, turn.blocks.overwrite(written_blocks(turn.step, block_size)))
        return step

    def _end_turns(self, still_void: list[str]) -> None:
        """``still_void``: prefixes of requests that the runner was to forget in this step, and did not."""
        with self._changed:
            self._running = set()
            self._void_prefixes.update(still_void)
            self._changed.notify_all()

    def _in_runner(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in the runner thread, between steps, and return what it returns."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(work())
            except (ValueError, Unsupported) as error:
                future.set_exception(error)

        with self._changed:
            self._calls.append(call)
            self._changed.notify_all()
        return future.result()

    # --- connections -------------------------------------------------------------------------------------------

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
            self._serve_engine(connection, hello)
        elif isinstance(hello, LinkHello):
            self._serve_link(connection, hello)
        elif isinstance(hello, ReplicaHello):
            self._serve_replicas(connection, hello)
        elif isinstance(hello, WeightsHello) and self._give is not None:
            self._give(connection, hello)
        else:
            raise ProtocolError(f"expected the hello of an engine or a stage, got {type(hello).__name__}")

    def _tenant(self, instance: int) -> Tenant:
        tenant = self._tenants.get(instance)
        if tenant is None:
            tenant = self._tenants[instance] = Tenant(instance, is_home=instance == self._instance)
        if tenant.blocks is None and self._model.kv is not None:
            self._give_blocks(tenant, self._model.kv)
        return tenant

    def _give_blocks(self, tenant: Tenant, kv: KVCache) -> None:
        """The KV cache is there, so every tenant can have blocks in it."""
        if self._pool is None:
            self._pool = Pool(kv.home_blocks, kv.pool_blocks)
            self._store = self._model.block_store()
        blocks: Blocks = HomeBlocks(kv.home_blocks) if tenant.is_home else self._pool.tenant(tenant.instance)
        tenant.blocks, store = blocks, self._store
        if store is None:
            return

        def hello(stamp: Stamp) -> ReplicaHello:
            return ReplicaHello(PROTOCOL_VERSION, tenant.instance, self._stage, stamp, store.layout, store.block_bytes)

        tenant.replicator = Replicator(store, self._connect_replicas, hello, lambda: blocks.sealed_count)

    def _connect_replicas(self, address: str, hello: ReplicaHello) -> ReplicaChannel:
        return tcp.connect(address, self._token, hello)

    def _serve_engine(self, connection: Connection, hello: EngineHello) -> None:
        with self._changed:
            tenant = self._tenant(hello.instance)
            stamp = tenant.fencing.newest
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
        with self._changed:
            self._engines.add(connection)
            ends_at = self._ends_at
            self._deadlines.floor = hello.step_floor_seconds  # all engines have it from one object
        if ends_at is not None:
            _tell(connection, StageLeaving(max(0.0, ends_at - time.monotonic())))
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
            self._leave(tenant, connection)

    def _obey(self, tenant: Tenant, connection: Connection, message: object) -> None:
        match message:
            case Step():
                with self._changed:
                    tenant.fencing, queued = tenant.fencing.queue(message, connection)
                    if queued:
                        tenant.counts.received = message.step
                        self._changed.notify_all()
            case Fence():
                self._fence(tenant, message.stamp, connection)
            case Stitch():
                connection.send(self._stitch(tenant, message, connection))
            case Release():
                self._release(tenant, message.stamp, connection)
            case Sealed():
                self._seal(tenant, message, connection)
            case Forget():
                with self._changed:
                    if tenant.fencing.is_in_force(message.stamp, connection) and tenant.blocks is not None:
                        self._void(tenant, tenant.blocks.forget(unpack_blocks(message.blocks).tolist()))
            case Flush():
                self._flush(tenant, message, connection)
            case ReplicateTo():
                with self._changed:
                    if tenant.fencing.is_in_force(message.stamp, connection):
                        self._redirect(tenant, message.address)
            case DescribeKV():
                connection.send(self._describe(message))
            case AllocateKV():
                connection.send(self._allocate(tenant, message))
            case _:
                raise ProtocolError(f"an engine cannot send {type(message).__name__}")

    def _describe(self, message: DescribeKV) -> KVDescription | Failed:
        try:
            ranks: list[KVNeeds] = self._in_runner(self._model.kv_needs_of_ranks)
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
            return Failed(
                message.call, f"stage {self._instance}.{self._stage} takes its KV layout from its own engine only"
            )

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
            allocated: KVAllocated = self._in_runner(allocate)
        except ValueError as error:
            return Failed(message.call, str(error))
        return allocated

    # --- topology ----------------------------------------------------------------------------------------------

    def _fence(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> str:
        """Returns why ``stamp`` is not in force now; empty if it is."""
        with self._changed:
            verdict, closing = tenant.turn(tenant.fencing.fence(stamp, engine))
            if verdict.voids:
                self._void_prefixes.add(tenant.prefix)
                self._stop_serving_soon(tenant, leaves=False)
        for each in closing:
            each.close()
        return verdict.refusal

    def _stitch(self, tenant: Tenant, message: Stitch, engine: Connection) -> Stitched | Failed:
        place = f"stage {self._instance}.{self._stage}"
        kv = self._model.kv
        if kv is None:
            return Failed(message.call, f"{place} has no KV cache yet: its own engine has not attached")
        if refusal := self._fence(tenant, message.stamp, engine):
            return Failed(message.call, f"{place} {refusal}")
        with self._changed:
            self._tenant(tenant.instance)  # it may have greeted us before the KV cache was allocated
        if (busy := self._await_old_writes(tenant)) is not None:
            return Failed(message.call, f"{place} {busy}")
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
        answer, closing = self._take_place(tenant, message, engine, outbound, kv)
        for each in closing:
            each.close()
        return answer

    def _take_place(
        self, tenant: Tenant, message: Stitch, engine: Connection, outbound: LinkSender | None, kv: KVCache
    ) -> tuple[Stitched | Failed, list[Closing]]:
        """The second half of a stitch, and what is to be closed after it: ``outbound``, if there is no place."""
        place = f"stage {self._instance}.{self._stage}"
        unused: list[Closing] = [] if outbound is None else [outbound]
        with self._changed:
            if not tenant.is_home and self._guest not in (None, tenant.instance):
                reason = f"{place} already serves instance {self._guest} as a guest"
                return Failed(message.call, reason), unused
            if not tenant.is_home and kv.pool_blocks == 0:
                return Failed(message.call, f"{place} has no pool blocks for guests"), unused
            verdict, closing = tenant.turn(tenant.fencing.stitch(message.stamp, engine))
            if verdict.refusal:
                return Failed(message.call, f"{place} {verdict.refusal}"), unused
            assert tenant.blocks is not None
            if not tenant.is_home:
                self._guest = tenant.instance
                tenant.blocks.stop_serving()  # what its older topology left unsealed is of no use
            tenant.blocks.serve()
            held = tenant.blocks.held() if message.report_sealed else (b"", b"")
            tenant.outbound = outbound
            tenant.needed = True
            self._changed.notify_all()
            capacity = kv.home_blocks - 1 if tenant.is_home else kv.pool_blocks
            return Stitched(message.call, message.stamp, capacity, *held), closing

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
            if not self._changed.wait_for(lambda: tenant.instance not in self._running, OLD_WRITES_SECONDS):
                return "is still in a step of an older topology of the same guest"
            # The guest before may have left a moment ago.
            self._changed.wait_for(
                lambda: self._guest in (None, tenant.instance) or not self._calls, OLD_WRITES_SECONDS
            )
            return None

    def _stop_serving_soon(self, tenant: Tenant, leaves: bool) -> None:
        """Between two steps: until then the runner may be in a step of this tenant, and write its blocks."""
        stamp = tenant.stamp

        def stop() -> None:
            with self._changed:
                if tenant.stamp != stamp or tenant.stitched or tenant.blocks is None:
                    return
                tenant.blocks.stop_serving()
                if leaves and self._guest == tenant.instance:
                    self._guest = None
                self._changed.notify_all()

        self._calls.append(stop)
        self._changed.notify_all()

    def _release(self, tenant: Tenant, stamp: Stamp, engine: Connection) -> None:
        if self._fence(tenant, stamp, engine):
            return
        with self._changed:
            tenant.needed = False
            self._stop_serving_soon(tenant, leaves=True)
            self._redirect(tenant, None)

    def _leave(self, tenant: Tenant, connection: Connection) -> None:
        """The engine's connection ended. Its stamp stays: an older one must not come back."""
        with self._changed:
            self._engines.discard(connection)
            verdict, closing = tenant.turn(tenant.fencing.leave(connection))
            if verdict.refusal:
                return
            tenant.needed = False
            self._void_prefixes.add(tenant.prefix)
            self._stop_serving_soon(tenant, leaves=True)
            self._redirect(tenant, None)
        for each in closing:
            each.close()

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
            tenant.replicator.flush(lambda: _tell(engine, Flushed(message.call)))
        else:
            _tell(engine, Flushed(message.call))

    def _void(self, tenant: Tenant, blocks: list[int]) -> None:
        """The sealed content of ``blocks`` is no more, or about to be. Under `_changed`, as is all that seals."""
        if blocks and tenant.replicator is not None:
            tenant.replicator.cancel(blocks)

    def _redirect(self, tenant: Tenant, address: str | None) -> None:
        if tenant.replicator is not None and tenant.blocks is not None:
            tenant.replicator.redirect(tenant.stamp, address, tenant.blocks.seals)

    def _serve_replicas(self, connection: Connection, hello: ReplicaHello) -> None:
        with self._changed:
            tenant = self._tenant(hello.instance)
            refusal = self._refuse_replicas(tenant, hello)
            closing: list[Closing] = []
            if not refusal:
                verdict, closing = tenant.turn(tenant.fencing.keep(hello.stamp, connection))
                refusal = verdict.refusal and f"stage {self._instance}.{self._stage} {verdict.refusal}"
            if not refusal:
                tenant.receiving += 1
        if refusal:
            logger.info("keeps no blocks for instance %d: %s", hello.instance, refusal)
            connection.send(ReplicaWelcome(refusal, b"", b""))
            return
        for each in closing:
            each.close()
        assert tenant.blocks is not None and self._store is not None

        @contextlib.contextmanager
        def may_store() -> Iterator[bool]:
            with self._changed:
                yield tenant.fencing.may_store(hello.stamp, connection)

        try:
            serve_replicas(connection, hello, tenant.blocks, self._store, may_store)
        finally:
            with self._changed:
                tenant.receiving -= 1
                self._changed.notify_all()

    def _refuse_replicas(self, tenant: Tenant, hello: ReplicaHello) -> str:
        """Why this stage cannot keep these blocks; empty if it can."""
        place, store = f"stage {self._instance}.{self._stage}", self._store
        if hello.stage != self._stage:
            return f"{place} keeps blocks of stages {self._stage} only"
        if store is None or tenant.blocks is None:
            return f"{place} has no KV cache that blocks could be kept in"
        return ""

    # --- links -------------------------------------------------------------------------------------------------

    def _serve_link(self, connection: Connection, hello: LinkHello) -> None:
        if hello.stage != self._stage - 1:
            raise ProtocolError(f"stage {self._stage} takes links from stage {self._stage - 1}, not {hello.stage}")
        with self._changed:
            tenant = self._tenant(hello.instance)
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
            self._report_lost(tenant, hello.stamp, hello.stage, str(error))
            if isinstance(error, CorruptFrame):
                raise
        finally:
            with self._changed:
                tenant.fencing = tenant.fencing.unlink(connection)

    def _report_lost(self, tenant: Tenant, stamp: Stamp, neighbour: int, detail: str) -> None:
        """Also of a link that breaks before its stitch is done: nothing would tell of it later."""
        with self._changed:
            engine = tenant.engine if tenant.stamp == stamp else None
        if engine is not None:
            _tell(engine, LinkLost(stamp, neighbour, detail))

    def _beat(self, tenant: Tenant, connection: Connection, interval_seconds: float, gone: threading.Event) -> None:
        while not gone.wait(max(SHORTEST_HEARTBEAT_SECONDS, interval_seconds)):
            if not _tell(connection, self._heartbeat(tenant, connection)):
                return

    def _heartbeat(self, tenant: Tenant, engine: Connection) -> Heartbeat:
        running, allowed = self._clock.read()
        report, progress = None, None
        if tenant.stitched:
            report = tenant.replicator.report() if tenant.replicator is not None else None
            link = tenant.inbound
            progress = tenant.counts.told(engine.received_bytes, link.received_bytes if link is not None else 0)
        return Heartbeat(self._steps_done, running, self._model.kv is not None, report, progress, allowed, self._pace)


@dataclass(frozen=True)
class _Turn:
    """A tenant's step as it was taken to be run, and who its outcome is for: a fence meanwhile changes neither.

    The outcome bears the step's stamp, so whoever gets it knows whether it is void.
    """

    tenant: Tenant
    step: Step
    inbound: dict[str, torch.Tensor] | None
    blocks: Blocks
    outbound: LinkSender | None
    engine: Connection
    counts: Counts

    def post(self, tensors: dict[str, torch.Tensor]) -> Posted:
        assert self.outbound is not None
        header, buffers = describe(tensors, self.step.stamp, self.step.step)
        self.tenant.link_sent_bytes += sum(tensor.nbytes for tensor in header.tensors)
        return self.outbound.post(header, buffers)

    def share_of(self, result: StepResult) -> StepResult:
        return share(result, self.tenant.prefix, self.step.stamp, self.step.step)

    def failed(self, error: Exception) -> StepFailed:
        return StepFailed(self.step.stamp, self.step.step, str(error))


class _Sent:
    """What was posted, as vLLM wants it: after `wait` its memory is free, whatever became of the links."""

    def __init__(self, posted: list[Posted], clock: StepClock) -> None:
        self._posted = posted
        self._clock = clock

    def wait(self) -> None:
        with self._clock.standing():
            for each in self._posted:
                with contextlib.suppress(LinkClosed):  # told to the engine by the link itself
                    each.wait()


def _tell(engine: Connection, message: Any) -> bool:
    """Send what nobody waits for here; an engine that has gone is noticed by its own connection's thread."""
    try:
        engine.send(message)
    except ConnectionClosed:
        return False
    return True


def listen(server: StageServer, host: str, port: int, token: bytes) -> Listener:
    return Listener(host, port, token, server.serve)
