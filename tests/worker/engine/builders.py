"""Stages that speak the protocol and do nothing else, and the pipeline of an engine over them."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import msgspec
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, StageId
from resilientllm_worker.engine.pipeline import Pipeline
from resilientllm_worker.protocol.blocks import pack_blocks, pack_numbers
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    AllocateKV,
    CachedRequests,
    DescribeKV,
    EngineHello,
    Failed,
    Fence,
    Flush,
    Flushed,
    Heartbeat,
    KVAllocated,
    KVDescription,
    KVGroup,
    LinkLost,
    Message,
    Progress,
    Release,
    ReplicationReport,
    StageWelcome,
    Stamp,
    Step,
    StepResult,
    Stitch,
    Stitched,
)
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.errors import ConnectionClosed
from resilientllm_worker.transport.listener import Listener

logger = logging.getLogger(__name__)

TOKEN = b"a token that all of them know"
DIGEST = '{"block_size": 16, "model": "tiny"}'
PATIENCE_SECONDS = 30.0
HOME_BLOCKS, POOL_BLOCKS = 100, 60
BEAT_SECONDS = 0.02


class FakeStage:
    """One stage as its engines see it. What it was told is in ``told``; attributes say how it answers."""

    def __init__(self, name: str, stages: int = 2, address: str = "127.0.0.1:0", has_kv: bool = False) -> None:
        instance, _, place = name.partition(".")
        self.id = StageId(instance=int(instance), stage=int(place))
        self._stages = stages
        self.digest = DIGEST
        self.protocol = PROTOCOL_VERSION
        self.claims = self.id
        """Who it says it is."""
        self.has_kv = has_kv
        self.beats = True
        self.answers = True
        """Set to False, it reads and says nothing, as a process that is stopped."""
        self.refuses: Failed | None = None
        """What it answers to a stitch, but for the call's number."""
        self.stops_at: type | None = None
        """The message at which it says nothing any more."""
        self.dies_of: type | None = None
        """The message on which it drops dead."""
        self.highest = Stamp(0, 0)
        self.holds: dict[int, int] = {}
        """Sealed blocks and their numbers."""
        self.flushes = True
        """Answers when it is asked to send what it has sealed."""
        self.replication: ReplicationReport | None = None
        """What its heartbeats say of its copying."""
        self.progress: Progress | None = None
        """What they say of its steps."""
        self.trickles = False
        """With each, a byte more of hidden states has come."""
        self.overdue = False
        """They say that a step has been running for too long."""
        self.beat_count = 0
        self.told: list[Message] = []
        self._engines: dict[int, Connection] = {}
        self._changed = threading.Condition()
        host, _, port = address.rpartition(":")
        self._listener = Listener(host, int(port), TOKEN, self._serve)
        self.address = self._listener.address

    # --- what a test does to it ---------------------------------------------------------------------------------

    def die(self) -> None:
        """As kill -9: all connections are reset, and nobody listens any more."""
        self._listener.close()

    def drop_connections(self) -> None:
        with self._changed:
            engines = list(self._engines.values())
        for engine in engines:
            engine.close()

    def say(self, message: Message, instance: int = 0) -> None:
        self._engines[instance].send(message)

    def answer(self, step: Step, tokens: int = 1, stamp: Stamp | None = None, instance: int = 0) -> None:
        requests = [request for request, _ in step.num_scheduled_tokens]
        sampled = [[7] * tokens for _ in requests]
        self.say(StepResult(stamp or step.stamp, step.step, requests, sampled, None, [], None), instance)

    def answer_corruptly(self, step: Step, instance: int = 0) -> None:
        """The right tokens, and on the way one of them becomes another."""
        requests = [request for request, _ in step.num_scheduled_tokens]
        result = StepResult(step.stamp, step.step, requests, [[7] for _ in requests], None, [], None)
        frame = b"".join(self._engines[instance].encode(result))
        self._engines[instance].send_parts([memoryview(frame[::-1].replace(b"\x07", b"\x08", 1)[::-1])])

    def link_lost(self, stamp: Stamp, neighbour: int) -> None:
        self.say(LinkLost(stamp, neighbour, "the link broke"))

    def wait_told(self, kind: type, count: int = 1) -> Any:
        """The ``count``-th message of this kind."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._of(kind)) >= count, PATIENCE_SECONDS), self.told
            return self._of(kind)[count - 1]

    def wait_told_last(self, kind: type, holds: Callable[[Any], bool]) -> None:
        """Until it is so of the last message of this kind."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: bool(known := self._of(kind)) and holds(known[-1]), PATIENCE_SECONDS
            ), self.told

    def count(self, kind: type) -> int:
        with self._changed:
            return len(self._of(kind))

    def _of(self, kind: type) -> list[Message]:
        return [message for message in self.told if isinstance(message, kind)]

    # --- the stage ----------------------------------------------------------------------------------------------

    def _serve(self, connection: Connection) -> None:
        hello = connection.receive()
        assert isinstance(hello, EngineHello)
        home = HOME_BLOCKS if self.has_kv else 0
        who = self.claims
        connection.send(
            StageWelcome(
                self.protocol, who.instance, who.stage, self._stages, 1, "boot", self.digest, self.highest, home, 0
            )
        )
        with self._changed:
            self._engines[hello.instance] = connection
        gone = threading.Event()
        threading.Thread(target=self._beat, args=(connection, gone), daemon=True).start()
        try:
            while True:
                self._take(connection, connection.receive())
        finally:
            gone.set()

    def _beat(self, connection: Connection, gone: threading.Event) -> None:
        with contextlib.suppress(ConnectionClosed):
            while not gone.wait(BEAT_SECONDS):
                if self.beats and self.answers:
                    if self.trickles and self.progress is not None:
                        more = self.progress.landed_bytes + 1
                        self.progress = msgspec.structs.replace(self.progress, landed_bytes=more)
                    seconds, allowed = (5.0, 2.0) if self.overdue else (0.0, 0.0)
                    connection.send(Heartbeat(0, seconds, self.has_kv, self.replication, self.progress, allowed))
                    self.beat_count += 1

    def _take(self, connection: Connection, message: Message) -> None:
        with self._changed:
            self.told.append(message)
            self._changed.notify_all()
        if self.stops_at is not None and isinstance(message, self.stops_at):
            self.answers = False
        if not self.answers:
            return
        if self.dies_of is not None and isinstance(message, self.dies_of):
            threading.Thread(target=self.die, daemon=True).start()
            connection.close()
            return
        match message:
            case DescribeKV():
                connection.send(KVDescription(message.call, [[]], [["LBHNC"]], [1000], ["generate"]))
            case AllocateKV():
                self.has_kv = True
                connection.send(KVAllocated(message.call, HOME_BLOCKS, POOL_BLOCKS, 0.1, 0.0))
            case Stitch() if self.refuses is not None:
                connection.send(Failed(message.call, self.refuses.reason, self.refuses.unreachable))
            case Stitch():
                self.highest = max(self.highest, message.stamp)
                capacity = HOME_BLOCKS - 1 if self.id.instance == 0 else POOL_BLOCKS
                held = (pack_blocks(self.holds), pack_numbers(self.holds.values())) if message.report_sealed else ()
                connection.send(Stitched(message.call, message.stamp, capacity, *held))
            case Flush() if self.flushes:
                connection.send(Flushed(message.call))
            case Fence(stamp) | Release(stamp):
                self.highest = max(self.highest, stamp)


class World:
    """The stages of several instances, and the pipeline of instance 0."""

    def __init__(self, instances: int = 2, stages: int = 2, **limits: float) -> None:
        settings = {
            "heartbeat_interval_seconds": BEAT_SECONDS,
            "heartbeat_timeout_seconds": 20.0,
            "wait_for_donor_seconds": 5.0,
            "attach_timeout_seconds": 60.0,
        }
        self.limits = Limits(**settings | limits)
        self._shape = (instances, stages)
        self.stages = {
            StageId(instance=i, stage=s): FakeStage(f"{i}.{s}", stages, has_kv=i > 0)
            for i in range(instances)
            for s in range(stages)
        }
        self.pipeline = Pipeline(0, DIGEST, TOKEN)
        self._version = 0

    def __getitem__(self, name: str) -> FakeStage:
        instance, _, place = name.partition(".")
        return self.stages[StageId(instance=int(instance), stage=int(place))]

    def plan(self) -> Plan:
        self._version += 1
        addresses = {name: stage.address for name, stage in self.stages.items()}
        return make_plans("test", self._version, *self._shape, addresses, self.limits)[0]

    def attach(self) -> Self:
        """All that an executor does before the first step."""
        self.pipeline.set_plan(self.plan())
        self.pipeline.wait_connected()
        self.pipeline.describe_kv()
        groups = [KVGroup(["layer"], b"spec")]
        self.pipeline.allocate_kv("LBHNC", HOME_BLOCKS, dict.fromkeys(range(self._shape[1]), groups))
        self.pipeline.open(PATIENCE_SECONDS)
        self.wait(lambda state: all(each.donors_connected == self._shape[0] - 1 for each in state.stages))
        return self

    def restart(self, name: str, has_kv: bool = False) -> FakeStage:
        """The process comes back at its address, without KV unless it only lost its connections."""
        old = self[name]
        self.stages[old.id] = FakeStage(name, self._shape[1], old.address, has_kv)
        return self.stages[old.id]

    def submit(self) -> tuple[Step, Future[Any]]:
        """A step under the topology at hand, as it reaches the last stage."""
        made: list[Step] = []

        def make(stamp: Stamp, number: int) -> tuple[Step, Step]:
            made.append(a_step(stamp, number))
            return made[0], made[0]

        future = self.pipeline.submit(self.pipeline.boundary().stamp, make)
        assert made, "there is no pipeline to submit to"
        return made[0], future

    @property
    def state(self) -> EngineState:
        return self.pipeline.state()

    @property
    def serving(self) -> list[str | None]:
        return [None if each.served_by is None else str(each.served_by) for each in self.state.stages]

    def wait(self, condition: Callable[[EngineState], bool]) -> EngineState:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition(state := self.state):
            assert time.monotonic() < deadline, state
            time.sleep(0.002)
        return state

    def wait_serving(self, *names: str) -> EngineState:
        return self.wait(lambda state: [str(each.served_by) for each in state.stages] == list(names))

    def wait_phase(self, phase: EnginePhase) -> EngineState:
        return self.wait(lambda state: state.phase is phase)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pipeline.close()
        for stage in self.stages.values():
            stage.die()


def a_step(stamp: Stamp, number: int) -> Step:
    return Step(stamp, number, [], CachedRequests(["r"], [[1]], [None], [9], [4]), [("r", 1)], [], [], [], [], None)


def unused_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"
