"""The taking end: fills a model with the weights of the first twin that gives them all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from resilientllm_worker.protocol.messages import TensorHeader, Weights, WeightsHello, WeightsWelcome
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed, ProtocolError
from resilientllm_worker.weights.memory import WeightMemory
from resilientllm_worker.weights.runs import Run, checksum, runs

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""A twin that sends nothing for so long is given up, though its host answers."""
PEER_TIMEOUT_SECONDS = 30.0
"""As for replicas: weights are taken with low priority, and nobody's step waits for them."""
PROGRESS_SECONDS = 10.0
"""Between two lines in the log."""


class NotTaken(Exception):
    """No twin gave its weights; the message has each one's reason. What came before is right, but not all."""


@dataclass(frozen=True)
class Taken:
    source: str
    """The twin's address."""
    nbytes: int
    seconds: float


def take(
    addresses: Sequence[str],
    token: bytes,
    hello: WeightsHello,
    memory: WeightMemory,
    idle_seconds: float = IDLE_SECONDS,
) -> Taken:
    """Fills ``memory`` from the first of ``addresses`` that gives all of it. Content is verified before it is written.

    Raises:
        NotTaken: none did.
    """
    reasons = []
    for address in addresses:
        try:
            return _take_from(address, token, hello, memory, idle_seconds)
        except (ConnectionFailed, ConnectionClosed, ProtocolError, _Refused, ValueError) as error:
            reasons.append(f"{address}: {error}")
            logger.warning("no weights from %s", reasons[-1])
    raise NotTaken("; ".join(reasons) or "no twin was named")


class _Refused(Exception):
    """The twin has no weights for us, or not the ones we need."""


def _take_from(address: str, token: bytes, hello: WeightsHello, memory: WeightMemory, idle_seconds: float) -> Taken:
    started = time.monotonic()
    connection = dial(address, token, CONNECT_SECONDS, peer_timeout_seconds=PEER_TIMEOUT_SECONDS)
    total = sum(tensor.nbytes for tensor in memory.tensors)
    with _Watch(connection, total, idle_seconds) as watch:
        try:
            connection.send(hello)
            welcome = connection.receive()
            if not isinstance(welcome, WeightsWelcome):
                raise ProtocolError(f"expected a WeightsWelcome, found {type(welcome).__name__}")
            if welcome.refusal:
                raise _Refused(welcome.refusal)
            if difference := _difference(memory.tensors, welcome.tensors):
                raise _Refused(f"its weights are laid out in another way: {difference}")
            mover = memory.mover()
            for run in runs(memory.tensors):
                landing = mover.landing(run.nbytes)
                weights = connection.receive_weights(partial(_expect, run, landing))
                if checksum(run, landing) != weights.checksum:
                    raise ProtocolError(f"{memory.tensors[run.tensor].name} arrived corrupt at byte {run.offset}")
                mover.write(run, landing)
                watch.advance(run.nbytes)
        except ConnectionClosed as error:
            raise ConnectionClosed(watch.verdict or str(error)) from error
        finally:
            connection.close()
    return Taken(address, total, time.monotonic() - started)


def _expect(run: Run, landing: memoryview, header: Weights) -> memoryview:
    if header.body_bytes != run.nbytes:
        raise ProtocolError(f"expected {run.nbytes} bytes of a tensor, found {header.body_bytes}")
    return landing


def _difference(ours: Sequence[TensorHeader], theirs: Sequence[TensorHeader]) -> str:
    """The first, in words; empty if there is none."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"{_words(mine)} here, {_words(other)} there"
    return "" if len(ours) == len(theirs) else f"{len(ours)} tensors here, {len(theirs)} there"


def _words(tensor: TensorHeader) -> str:
    return f"{tensor.name} {tensor.dtype}{list(tensor.shape)}"


class _Watch:
    """Closes a connection that brings nothing for too long, and says now and then how far a long transfer is."""

    def __init__(self, connection: Connection, total: int, idle_seconds: float) -> None:
        self._connection = connection
        self._total = total
        self._idle_seconds = idle_seconds
        self._done = threading.Event()
        self._taken = 0
        self._moved_at = time.monotonic()
        self.verdict = ""
        """Why it closed the connection, if it did."""
        self._thread = threading.Thread(target=self._run, name="weights watch", daemon=True)

    def advance(self, nbytes: int) -> None:
        self._taken += nbytes
        self._moved_at = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        told_at = time.monotonic()
        while True:
            idle_left = self._moved_at + self._idle_seconds - time.monotonic()
            if idle_left <= 0:
                self.verdict = f"it sent nothing for {self._idle_seconds:g} s after {self._taken} bytes"
                self._connection.close()
                return
            if self._done.wait(min(idle_left, PROGRESS_SECONDS)):
                return
            if time.monotonic() - told_at >= PROGRESS_SECONDS:
                told_at = time.monotonic()
                logger.info("taking weights from %s: %d of %d bytes", self._connection.peer, self._taken, self._total)
