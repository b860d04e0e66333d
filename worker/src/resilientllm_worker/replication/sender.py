"""Sends a tenant's sealed blocks to their keeper, beside the steps and never in their way.

Nothing is copied when a block is sealed. Its content is read from the KV cache when its turn comes; if a step was about
to write the block meanwhile, what was read is thrown away. That is looked at under the lock after the read, and the
runner takes the lock before it writes, so torn content is never sent. What waits is therefore only metadata, as much as
there are blocks, and a step waits for nothing but that lock, which is never held over a copy or a send.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import ReplicaHello, ReplicationReport, Seal, Stamp
from resilientllm_worker.replication.backlog import Backlog, SealedBlock, Tally
from resilientllm_worker.replication.channel import ReplicaChannel, batch_limit
from resilientllm_worker.replication.checksum import checksums
from resilientllm_worker.replication.priority import yield_to_serving
from resilientllm_worker.replication.store import BlockStore, close_ranks
from resilientllm_worker.transport.errors import ConnectionClosed, ProtocolError, TransportError

logger = logging.getLogger(__name__)

FIRST_RETRY_SECONDS: Final = 0.1
LAST_RETRY_SECONDS: Final = 2.0
MAX_BATCHES_SENT: Final = 3
"""Without an answer. Enough to keep the keeper busy while answers travel."""


@dataclass(eq=False)
class _Course:
    """From one `redirect` to the next."""

    stamp: Stamp
    address: str
    sealed: Callable[[], Sequence[tuple[Seal, int]]]
    ended: Collection[int]
    backlog: Backlog
    """Empty until the course's thread has looked at what is sealed."""
    journal: list[tuple[Sequence[tuple[Seal, int]], Sequence[int], Sequence[int]]] | None = field(default_factory=list)
    """What was offered, ended and cancelled until then; None after it."""
    channel: ReplicaChannel | None = None
    retry_seconds: float = FIRST_RETRY_SECONDS


class Replicator:
    """One for each tenant that a stage serves. All methods may be called from any thread, and none waits for I/O.

    It has one thread, and while it is connected a second one for answers, as long as it has somewhere to send to. Both
    have a low priority (`priority.yield_to_serving`).
    """

    def __init__(
        self,
        store: BlockStore,
        connect: Callable[[str, ReplicaHello], ReplicaChannel],
        hello: Callable[[Stamp], ReplicaHello],
        sealed_count: Callable[[], int],
        linger_seconds: float = 0.02,
        batch_blocks: int = 64,
    ) -> None:
        """``connect`` raises a `TransportError` if there is no keeper; it is asked again, until `redirect` or `close`.

        ``sealed_count`` is for the report: without a keeper, what was sealed before is not known here.
        A batch goes out ``linger_seconds`` after it began to fill, or when it has ``batch_blocks``.
        """
        self._store = store
        self._connect = connect
        self._hello = hello
        self._sealed_count = sealed_count
        self._linger_seconds = linger_seconds
        self._batch_blocks = min(batch_blocks, batch_limit(store.block_bytes))
        self._changed = threading.Condition()
        """Guards all that follows, and everything in a backlog."""
        self._tally = Tally()
        self._backlog = self._no_backlog()
        self._course: _Course | None = None
        self._flushes: list[Callable[[], object]] = []
        """Whom to call when nothing lags."""
        self._closed = False

    def redirect(
        self, stamp: Stamp, address: str | None, sealed: Callable[[], Sequence[tuple[Seal, int]]] = tuple
    ) -> None:
        """From now on the keeper is at ``address``, or nowhere. Also for the same address under a new stamp.

        ``sealed`` gives all that is sealed when it is called, with slots. That may take long, so it is called after the
        return, in this object's own thread; what is offered or cancelled from now on is not lost by that.
        """
        with self._changed:
            if self._closed:
                return
            ended = frozenset(self._backlog.ended)
            previous, self._backlog = self._course, self._no_backlog()
            course = self._course = None if address is None else _Course(stamp, address, sealed, ended, self._backlog)
            self._changed.notify_all()
            waiting, self._flushes = self._flushes, []
        _leave(previous)
        _call(waiting)
        if course is not None:
            threading.Thread(target=self._run, args=(course,), name=f"replicas to {address}", daemon=True).start()

    def offer(self, sealed: Sequence[tuple[Seal, int]], ended: Sequence[int]) -> None:
        """Newly sealed blocks with their slots, in order, and then owners that have ended."""
        with self._changed:
            backlog = self._backlog
            before = backlog.pending
            self._note(sealed, ended, ())
            backlog.offer(sealed, ended, time.monotonic())
            if not before or before < self._batch_blocks <= backlog.pending:
                self._changed.notify_all()

    def cancel(self, blocks: Iterable[int]) -> None:
        """A step is about to write these blocks. Call it before the step; takes time for ``blocks`` alone."""
        cancelled = tuple(blocks)
        with self._changed:
            self._note((), (), cancelled)
            if self._backlog.cancel(cancelled):
                self._changed.notify_all()

    def flush(self, done: Callable[[], object]) -> None:
        """Calls ``done`` when all that was offered is answered by the keeper, or will not be; from any thread.

        Call it while nothing is written: what is cancelled meanwhile is not answered.
        """
        with self._changed:
            self._flushes.append(done)
            waiting = self._take_flushes()
            self._changed.notify_all()  # what lingers goes now
        _call(waiting)

    def report(self) -> ReplicationReport:
        sealed_blocks = self._sealed_count()
        with self._changed:
            course, backlog, tally = self._course, self._backlog, self._tally
            return ReplicationReport(
                address="" if course is None else course.address,
                connected=course is not None and course.channel is not None,
                block_bytes=self._store.block_bytes,
                sealed_blocks=sealed_blocks,
                stored_blocks=backlog.stored,
                lag_blocks=backlog.lag,
                lag_seconds=backlog.lag_seconds(time.monotonic()),
                sent_blocks=tally.sent_blocks,
                sent_bytes=tally.sent_bytes,
                cancelled_blocks=tally.cancelled_blocks,
                refused_blocks=tally.refused_blocks,
                corrupt_blocks=tally.corrupt_blocks,
            )

    @property
    def pending_blocks(self) -> int:
        """Sealed blocks that nobody has begun to send."""
        with self._changed:
            return self._backlog.pending

    def close(self) -> None:
        """Ends for good. Its threads end by themselves; one that is reading the store does so first."""
        with self._changed:
            self._closed = True
            course, self._course = self._course, None
            waiting, self._flushes = self._flushes, []
            self._changed.notify_all()
        _leave(course)
        _call(waiting)

    # --- the sending thread ------------------------------------------------------------------------------------

    def _run(self, course: _Course) -> None:
        yield_to_serving()
        self._fill(course)
        staging = memoryview(bytearray(self._batch_blocks * self._store.block_bytes))
        while True:
            channel = self._dial(course)
            if channel is not None:
                self._serve(course, channel, staging)
            with self._changed:
                self._changed.wait_for(lambda: self._course is not course, course.retry_seconds)
                if self._course is not course:
                    return
            course.retry_seconds = min(2 * course.retry_seconds, LAST_RETRY_SECONDS)

    def _fill(self, course: _Course) -> None:
        """Looks at what is sealed, which may be a whole cache, while steps go on."""
        backlog = Backlog(course.sealed(), course.ended, self._tally, has_keeper=True, now=time.monotonic())
        with self._changed:
            journal, course.journal = course.journal or [], None
            for offered, ended, cancelled in journal:
                backlog.cancel(cancelled)
                backlog.offer(offered, ended, time.monotonic())
            course.backlog = backlog
            if self._course is course:
                self._backlog = backlog

    def _note(self, offered: Sequence[tuple[Seal, int]], ended: Sequence[int], cancelled: Sequence[int]) -> None:
        if self._course is not None and self._course.journal is not None:
            self._course.journal.append((offered, ended, cancelled))

    def _take_flushes(self) -> list[Callable[[], object]]:
        """Under the lock: whom to call now, without it."""
        course = self._course
        if course is not None and (course.journal is not None or self._backlog.lag):
            return []
        waiting, self._flushes = self._flushes, []
        return waiting

    def _no_backlog(self) -> Backlog:
        return Backlog((), (), self._tally, has_keeper=False, now=0.0)

    def _dial(self, course: _Course) -> ReplicaChannel | None:
        """None if there is no keeper, or no use for one any more."""
        try:
            channel = self._connect(course.address, self._hello(course.stamp))
        except TransportError as error:
            self._complain(course, str(error))
            return None
        with self._changed:
            wanted = self._course is course
            if wanted and not channel.welcome.refusal:
                course.channel = channel
                return channel
        channel.close()
        if wanted:
            self._complain(course, channel.welcome.refusal)
        return None

    def _complain(self, course: _Course, reason: str) -> None:
        level = logging.WARNING if course.retry_seconds == FIRST_RETRY_SECONDS else logging.DEBUG
        logger.log(level, "no replicas to %s for now: %s", course.address, reason)

    def _serve(self, course: _Course, channel: ReplicaChannel, staging: memoryview) -> None:
        """Until the channel or the course ends."""
        answers = threading.Thread(target=self._listen, args=(course, channel), name="replicas kept", daemon=True)
        try:
            self._settle(course, channel)
            answers.start()
            while (batch := self._next_batch(course)) is not None:
                self._send(course, channel, batch, staging)
        except (ConnectionClosed, ProtocolError) as error:
            logger.info("replicas to %s: %s", course.address, error)
        finally:
            channel.close()
            if answers.ident is not None:
                answers.join()  # or a late answer would be taken for one of the next channel
            with self._changed:
                course.channel = None
                course.backlog.lose(time.monotonic())

    def _settle(self, course: _Course, channel: ReplicaChannel) -> None:
        welcome = channel.welcome
        blocks, numbers = unpack_blocks(welcome.held_blocks), unpack_numbers(welcome.held_numbers)
        if len(blocks) != len(numbers):
            raise ProtocolError(f"the keeper holds {len(blocks)} blocks under {len(numbers)} numbers")
        settling = course.backlog.settle(dict(zip(blocks.tolist(), numbers.tolist(), strict=True)), time.monotonic())
        more = True
        while more:
            with self._changed:
                more = next(settling, _DONE) is not _DONE

    def _next_batch(self, course: _Course) -> list[SealedBlock] | None:
        """Waits until there is one that should go. None if the channel or the course ends."""
        backlog = course.backlog
        while True:
            with self._changed:
                while True:
                    if course.channel is None or self._course is not course:
                        return None
                    now = time.monotonic()
                    retry_seconds = backlog.retry_seconds(now)
                    if retry_seconds == 0.0:
                        break
                    wait_seconds = retry_seconds
                    if backlog.pending and backlog.batches_sent < MAX_BATCHES_SENT:
                        linger_seconds = backlog.pending_since + self._linger_seconds - now
                        if self._flushes or linger_seconds <= 0 or backlog.pending >= self._batch_blocks:
                            return backlog.take(self._batch_blocks, now)
                        wait_seconds = min(linger_seconds, retry_seconds or linger_seconds)
                    self._changed.wait(wait_seconds)
                left_out = backlog.left_out()
            again = backlog.worth_retrying(left_out)
            with self._changed:
                backlog.retry(again, time.monotonic())

    def _send(self, course: _Course, channel: ReplicaChannel, batch: list[SealedBlock], staging: memoryview) -> None:
        block_bytes = self._store.block_bytes
        content = staging[: len(batch) * block_bytes]
        self._store.read([block.slot for block in batch], content)
        sums = checksums([block.seal for block in batch], content, block_bytes)
        with self._changed:
            good, void, ended = course.backlog.confirm(batch)
        if not (good or void or ended):
            return
        content = close_ranks(content, block_bytes, good)
        channel.send([batch[place].seal for place in good], [sums[place] for place in good], void, ended, content)
        with self._changed:
            self._tally.sent_blocks += len(good)
            self._tally.sent_bytes += len(content)

    # --- the thread for answers --------------------------------------------------------------------------------

    def _listen(self, course: _Course, channel: ReplicaChannel) -> None:
        yield_to_serving()
        try:
            while True:
                kept = channel.receive()
                with self._changed:
                    course.backlog.answer(kept, time.monotonic())
                    course.retry_seconds = FIRST_RETRY_SECONDS
                    waiting = self._take_flushes()
                    self._changed.notify_all()
                _call(waiting)
        except (ConnectionClosed, ProtocolError) as error:
            logger.info("replicas to %s: %s", course.address, error)
        finally:
            channel.close()
            with self._changed:
                course.channel = None
                self._changed.notify_all()


_DONE = object()


def _call(waiting: Iterable[Callable[[], object]]) -> None:
    for done in waiting:
        done()


def _leave(course: _Course | None) -> None:
    """Wakes the threads of a course that has ended, whatever they wait for."""
    channel = course.channel if course is not None else None
    if channel is not None:
        channel.close()
