"""A replica channel without a network: shows that nothing but its contract is relied upon."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from resilientllm_worker.protocol.messages import Replicas, ReplicasKept, ReplicaWelcome, Seal
from resilientllm_worker.transport.errors import ConnectionClosed

CAPACITY_BYTES = 1 << 20


class _Wire:
    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.closed = False
        self.batches: deque[tuple[Replicas, bytes]] = deque()
        self.answers: deque[ReplicaWelcome | ReplicasKept] = deque()

    def wait_for(self, condition: Callable[[], object]) -> None:
        self.changed.wait_for(lambda: self.closed or condition())
        if self.closed:
            raise ConnectionClosed("closed")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class MemorySender:
    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self.close = wire.close
        with wire.changed:
            wire.wait_for(lambda: wire.answers)
            welcome = wire.answers.popleft()
        assert isinstance(welcome, ReplicaWelcome)
        self.welcome = welcome

    def send(
        self,
        seals: Sequence[Seal],
        checksums: Sequence[int],
        void: Sequence[int],
        ended: Sequence[int],
        content: memoryview,
    ) -> None:
        wire = self._wire
        batch = Replicas(list(seals), list(checksums), list(void), list(ended), content.nbytes)
        with wire.changed:
            wire.wait_for(lambda: sum(len(body) for _, body in wire.batches) < CAPACITY_BYTES)
            wire.batches.append((batch, bytes(content)))
            wire.changed.notify_all()

    def receive(self) -> ReplicasKept:
        with self._wire.changed:
            self._wire.wait_for(lambda: self._wire.answers)
            kept = self._wire.answers.popleft()
        assert isinstance(kept, ReplicasKept)
        return kept


class MemoryInlet:
    peer = "memory"

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire
        self.close = wire.close

    def receive_replicas(self, allocate: Callable[[Replicas], memoryview]) -> Replicas:
        with self._wire.changed:
            self._wire.wait_for(lambda: self._wire.batches)
            batch, body = self._wire.batches.popleft()
            self._wire.changed.notify_all()
        try:
            allocate(batch)[:] = body
        except BaseException:
            self.close()
            raise
        return batch

    def send(self, message: ReplicaWelcome | ReplicasKept) -> None:
        with self._wire.changed:
            if self._wire.closed:
                raise ConnectionClosed("closed")
            self._wire.answers.append(message)
            self._wire.changed.notify_all()


def memory_wire() -> tuple[Callable[[], MemorySender], MemoryInlet]:
    """The sending end is there once the receiving one has sent a welcome."""
    wire = _Wire()
    return (lambda: MemorySender(wire)), MemoryInlet(wire)
