"""A stage server with a model that only keeps books, and the engines and neighbours that talk to it."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    AllocateKV,
    CachedRequests,
    EngineHello,
    Failed,
    Fence,
    Heartbeat,
    KVAllocated,
    KVGroup,
    LinkHello,
    Message,
    NewRequest,
    Release,
    StageWelcome,
    Stamp,
    Step,
    StepResult,
    Stitch,
    Stitched,
    WeightsHello,
)
from resilientllm_worker.seams.errors import Malformed
from resilientllm_worker.stage.activations import describe
from resilientllm_worker.stage.merge import Room
from resilientllm_worker.stage.model import KVCache, KVNeeds
from resilientllm_worker.stage.server import StageServer
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed
from resilientllm_worker.transport.listener import Listener

T = TypeVar("T")

TOKEN = b"a token that all of them know"
DIGEST = '{"model": "tiny"}'
PATIENCE_SECONDS = 30.0
NEVER_SECONDS = 3600.0
STEP_FLOOR_SECONDS = 5.0
HOME_BLOCKS, POOL_BLOCKS, BLOCK_SIZE = 16, 8, 4
GROUPS = [KVGroup(["layer"], b"spec")]
MALFORMED = b"no sampling parameters"
HOME, GUEST, OTHER_GUEST = 0, 1, 2
"""Instances; the stage was made for the first."""


class MemoryStore:
    """Content of a stage's blocks."""

    block_bytes = 16
    layout = "bytes"

    def __init__(self) -> None:
        self.memory = bytearray((HOME_BLOCKS + POOL_BLOCKS) * self.block_bytes)

    def __getitem__(self, slot: int) -> bytes:
        return bytes(self.memory[slot * self.block_bytes : (slot + 1) * self.block_bytes])

    def __setitem__(self, slot: int, content: bytes) -> None:
        self.memory[slot * self.block_bytes : (slot + 1) * self.block_bytes] = content.ljust(self.block_bytes)

    def read(self, slots: Sequence[int], into: memoryview) -> None:
        into[:] = b"".join(self[slot] for slot in slots)

    def write(self, slots: Sequence[int], data: memoryview) -> None:
        for place, slot in enumerate(slots):
            self[slot] = bytes(data[place * self.block_bytes : (place + 1) * self.block_bytes])


class FakeModel:
    """Keeps the steps that it ran, and which requests it would hold state of. Samples each request's length.

    Sends one row per token onward: what came in, or else the step's number and, as a fraction, the row's.
    """

    stages = 2
    tensor_parallel = 1
    longest_request = POOL_BLOCKS
    """KV blocks."""

    def __init__(self, stage: int, has_kv: bool = True) -> None:
        self._stage = stage
        self.kv: KVCache | None = None
        self.steps: list[Step] = []
        self.inbound: list[float | None] = []
        """The first row's number, for every step."""
        self.rows: list[list[float]] = []
        """All rows' numbers, for every step."""
        self.room: Room | None = Room(tokens=64, requests=8)
        self.shortest_first = False
        """Puts a step's requests into an order of its own, as V2's runner does."""
        self.store: MemoryStore | None = None
        """Content of blocks; None: there is none to copy."""
        self.held: set[str] = set()
        self.go = threading.Event()
        """Clear it to stop the model within a step."""
        self.go.set()
        self.within = threading.Event()
        """Set while a step is stopped."""
        self.stop_again = False
        """To stop in the step after one in which it is stopped."""
        self.error: Exception | None = None
        self.ran: queue.SimpleQueue[Step] = queue.SimpleQueue()
        if has_kv:
            self.allocate("LBHNC", HOME_BLOCKS, POOL_BLOCKS, GROUPS)

    def kv_needs(self) -> KVNeeds:
        return KVNeeds([("layer", b"spec")], ["LBHNC"], 3000, ["generate"])

    def kv_needs_of_ranks(self) -> list[KVNeeds]:
        return [self.kv_needs()]

    def blocks_of_longest_request(self, groups: Sequence[KVGroup]) -> int:
        return self.longest_request

    def allocate(self, layout: str, home_blocks: int, pool_blocks: int, groups: Sequence[KVGroup]) -> KVCache:
        if self.kv is not None and self.kv.home_blocks != home_blocks:
            raise ValueError("another size was agreed")
        self.kv = self.kv or KVCache(layout, home_blocks, pool_blocks, tuple(groups), BLOCK_SIZE, 0.5, 0.0)
        return self.kv

    def block_store(self) -> MemoryStore | None:
        return self.store

    def merging_room(self) -> Room | None:
        return self.room

    def row_order(self, step: Step) -> list[str]:
        scheduled = step.num_scheduled_tokens
        if self.shortest_first:
            scheduled = sorted(scheduled, key=lambda each: each[1])
        return [request for request, _ in scheduled]

    def requests(self) -> Collection[str]:
        return tuple(self.held)

    def run(self, step: Step, inbound: dict[str, torch.Tensor] | None, send: Callable[..., Any] | None) -> Any:
        if not self.go.is_set():
            self.within.set()
            assert self.go.wait(PATIENCE_SECONDS)
            if self.stop_again:
                self.stop_again = False
                self.go.clear()
        if self.error is not None:
            raise self.error
        if any(request.sampling_params == MALFORMED for request in step.new):
            raise Malformed("sampling parameters cannot be read")
        rows = sum(tokens for _, tokens in step.num_scheduled_tokens)
        hidden = step.step + torch.arange(rows) / 64 if inbound is None else inbound["hidden"]
        self.steps.append(step)
        self.inbound.append(None if inbound is None else float(inbound["hidden"][0]))
        self.rows.append(hidden.tolist())
        self.held -= set(step.finished)
        self.held |= {request for request, _ in step.num_scheduled_tokens}
        self.ran.put(step)
        if send is not None:
            send({"hidden": hidden}).wait()
            return None
        requests = self.row_order(step)
        lengths = dict(step.num_scheduled_tokens)
        return StepResult(step.stamp, step.step, requests, [[lengths[each]] for each in requests], None, [], None)


class Stage:
    """The server, its runner thread and its port. Stage 1 of 2 unless told otherwise, the last one."""

    def __init__(
        self,
        stage: int = 1,
        has_kv: bool = True,
        pool_fraction: float = 0.5,
        merges: bool = True,
        instance: int = HOME,
        store: MemoryStore | None = None,
        give: Callable[[Connection, WeightsHello], None] | None = None,
    ) -> None:
        self.model = model = FakeModel(stage, has_kv)
        model.store = store
        self.server = StageServer(model, instance, stage, DIGEST, TOKEN, pool_fraction, merges, give)  # type: ignore[arg-type]
        self.failure: BaseException | None = None
        self._listener = Listener("127.0.0.1", 0, TOKEN, self.server.serve)
        self.address = self._listener.address
        self._runner = threading.Thread(target=self._run, name="runner", daemon=True)
        self._runner.start()

    def _run(self) -> None:
        try:
            self.server.run()
        except RuntimeError as error:
            self.failure = error
            self.server.fail(str(error))

    def wait_arrived(self, instance: int, step: int) -> None:
        """Until hidden states for ``step`` are here; links are read in order."""
        tenants = self.server._tenants
        with tenants.changed:
            assert tenants.changed.wait_for(
                lambda: any(each.step == step for each in tenants.of(instance).fencing.landed), PATIENCE_SECONDS
            )

    def wait_counted(self, what: str, count: int) -> None:
        """Until ``server.counts`` says so: what comes of a step or a frame may be seen before it is counted."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.server.counts[what] != count:
            assert time.monotonic() < deadline, self.server.counts
            time.sleep(0.01)

    def wait_ended(self) -> None:
        self._runner.join(PATIENCE_SECONDS)
        assert not self._runner.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.model.go.set()
        self.server.stop()
        self._listener.close()


class Engine:
    """The engine's end of a command channel: what came is queued by kind, heartbeats apart."""

    def __init__(
        self, address: str, instance: int = HOME, digest: str = DIGEST, heartbeat: float = NEVER_SECONDS
    ) -> None:
        self.connection = dial(address, TOKEN, PATIENCE_SECONDS)
        self.connection.send(EngineHello(PROTOCOL_VERSION, instance, digest, heartbeat, STEP_FLOOR_SECONDS))
        self.ended = threading.Event()
        self.heartbeats: queue.SimpleQueue[Heartbeat] = queue.SimpleQueue()
        self._came: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._calls = 0
        threading.Thread(target=self._read, daemon=True).start()
        self.welcome = self.expect(StageWelcome)

    def _read(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = self.connection.receive()
                if isinstance(message, Heartbeat):
                    self.heartbeats.put(message)
                else:
                    self._came.put(message)
        self.ended.set()

    def expect(self, kind: type[T]) -> T:
        """The next message, which is of this kind."""
        message = self._came.get(timeout=PATIENCE_SECONDS)
        assert isinstance(message, kind), message
        return message

    @property
    def heard_nothing(self) -> bool:
        return self._came.empty()

    def fence(self, epoch: int, term: int = 1) -> None:
        self.connection.send(Fence(Stamp(term, epoch)))

    def release(self, epoch: int, term: int = 1) -> None:
        self.connection.send(Release(Stamp(term, epoch)))

    def begin_stitch(self, epoch: int, following: str | None = None, term: int = 1, report: bool = False) -> None:
        self._calls += 1
        self.connection.send(Stitch(self._calls, Stamp(term, epoch), following, report))

    def ask_stitch(
        self, epoch: int, following: str | None = None, term: int = 1, report: bool = False
    ) -> Stitched | Failed:
        self.begin_stitch(epoch, following, term, report)
        return self.expect(object)  # type: ignore[return-value]

    def stitch(self, epoch: int, following: str | None = None, term: int = 1, report: bool = False) -> Stitched:
        answer = self.ask_stitch(epoch, following, term, report)
        assert isinstance(answer, Stitched), answer
        return answer

    def allocate(self, home_blocks: int = HOME_BLOCKS) -> KVAllocated | Failed:
        self._calls += 1
        self.connection.send(AllocateKV(self._calls, "LBHNC", home_blocks, GROUPS))
        return self.expect(object)  # type: ignore[return-value]

    def step(self, number: int, epoch: int, term: int = 1, **changes: Any) -> None:
        self.connection.send(a_step(number, epoch, term, **changes))

    def close(self) -> None:
        self.connection.close()


class Neighbour:
    """The previous stage's end of a link."""

    def __init__(self, address: str, epoch: int, instance: int = HOME, term: int = 1, stage: int = 0) -> None:
        self._stamp = Stamp(term, epoch)
        self.connection = dial(address, TOKEN, PATIENCE_SECONDS)
        self.connection.send(LinkHello(PROTOCOL_VERSION, instance, stage, self._stamp, 0))

    def send(self, number: int, value: float = 0.0, stamp: Stamp | None = None, rows: Sequence[float] = ()) -> None:
        header, buffers = describe({"hidden": torch.tensor(rows or [value])}, stamp or self._stamp, number)
        self.connection.send(header, buffers)

    def close(self) -> None:
        self.connection.close()


def a_step(number: int, epoch: int, term: int = 1, request: str = "r", **changes: Any) -> Step:
    """A fresh request of three tokens, in block 1, unless told otherwise."""
    new = NewRequest(
        request,
        [1, 2, 3],
        None,
        changes.pop("params", b""),
        changes.pop("block_ids", ([1],)),
        changes.pop("computed", 0),
    )
    settings: dict[str, Any] = {
        "stamp": Stamp(term, epoch),
        "step": number,
        "new": [new],
        "cached": CachedRequests([], [], [], [], []),
        "num_scheduled_tokens": [(request, 3)],
        "finished": [],
        "preempted": [],
        "zero_block_ids": [],
        "block_copies": [],
        "grammar": None,
    }
    return Step(**settings | changes)


@contextlib.contextmanager
def closing(*ends: Engine | Neighbour | Connection) -> Iterator[None]:
    try:
        yield
    finally:
        for end in ends:
            end.close()
