"""Sends activations to the next stage without making the model runner wait for the network.

What the socket takes at once goes out in the caller's thread, which for a decode step is nearly always everything: a
hand-over to a thread would cost more than the system call. The rest, and all that is posted behind it, goes out in a
writer thread. A second thread waits for the stream's end, so that a neighbour's death is noticed between steps too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import Activation
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.errors import ConnectionClosed, LinkClosed, ProtocolError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LinkClosed", "LinkSender", "Posted"]


class Posted:
    """An activation under way. Its buffers must not change before `wait` returns."""

    __slots__ = ("_link", "_parts")

    def __init__(self, link: LinkSender, parts: list[memoryview]) -> None:
        self._link = link
        self._parts: list[memoryview] | None = parts

    @property
    def done(self) -> bool:
        """Whether all bytes are with the kernel."""
        return not self._parts

    def wait(self) -> None:
        """Blocks until the buffers are free again: sent, or never to be sent.

        Raises:
            LinkClosed: the link broke or was closed first. The buffers are free all the same.
        """
        if not self.done:
            self._link._wait(self)


class LinkSender:
    """The sending end of a link, in the frames of `Connection`. Takes the connection over.

    ``on_lost(detail)`` is called once if the link breaks on its own, never for `close`, from any of the threads
    involved, that of `post` included. It must not block.
    """

    def __init__(self, conn: Connection, on_lost: Callable[[str], None] | None = None) -> None:
        self._conn = conn
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._queue: deque[Posted] = deque()
        """What is not sent in full, in order. The writer sends the first, and removes it when done."""
        self._within: Posted | None = None
        """In whose buffers the writer is."""
        self._end: str | None = None
        """Why no more can be sent."""
        self._writer: threading.Thread | None = None
        threading.Thread(target=self._watch, name=f"link watch {conn.peer}", daemon=True).start()

    def post(self, header: Activation, buffers: Sequence[Buffer]) -> Posted:
        """Sends an activation behind all earlier ones; never waits for the peer.

        On a link that is closed or breaks this does not raise, but the `Posted` does when waited for: so a step that
        was computed ends in order, and `on_lost` tells what happened.

        Raises:
            ProtocolError: the buffers are not what the header announces, or above the connection's limits.
        """
        posted = Posted(self, self._conn.encode(header, buffers))
        lost = None
        with self._changed:
            if self._end is not None:
                return posted
            if not self._queue:
                try:
                    if self._conn.send_some(posted._parts or []):
                        return posted
                except ConnectionClosed as error:
                    lost = str(error)
            if lost is None:
                self._queue.append(posted)
                self._wake_writer()
        if lost is not None:
            self._break(lost)
        return posted

    def close(self) -> None:
        """Ends the link. Everyone in `Posted.wait` gets `LinkClosed`. Idempotent, from any thread.

        The link's threads end by themselves. Nobody waits for them here, since one may be in ``on_lost`` and want a
        lock that the caller of `close` holds.
        """
        with self._changed:
            if self._end is None:
                self._end = "the link was closed"
            self._changed.notify_all()
        self._conn.close()

    def _wait(self, posted: Posted) -> None:
        with self._changed:
            # Not even a closed link lets go while the writer is within the buffers: it leaves them in a moment.
            while not posted.done and (self._end is None or self._within is posted):
                self._changed.wait()
            if not posted.done:
                raise LinkClosed(f"an activation for {self._conn.peer} did not go out: {self._end}")

    def _wake_writer(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name=f"link write {self._conn.peer}", daemon=True)
            self._writer.start()
        else:
            self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._queue and self._end is None:
                    self._changed.wait()
                if self._end is not None:
                    return
                posted = self._within = self._queue[0]
            error = self._send(posted)
            with self._changed:
                self._within = None
                if error is None:
                    self._queue.popleft()
                self._changed.notify_all()
            if error is not None:
                self._break(error)

    def _send(self, posted: Posted) -> str | None:
        try:
            self._conn.send_parts(posted._parts or [])
        except ConnectionClosed as error:
            return str(error)
        return None

    def _watch(self) -> None:
        """A link has one direction, so whatever the peer sends is the link's end."""
        try:
            self._conn.receive()
        except (ConnectionClosed, ProtocolError) as error:
            self._break(str(error))
        else:
            self._break(f"{self._conn.peer} sent a message on a link, which has one direction")

    def _break(self, detail: str) -> None:
        """Ends the link unless it already has; only the first end of its own is told."""
        with self._changed:
            first = self._end is None
            if first:
                self._end = detail
            self._changed.notify_all()
        self._conn.close()
        if first and self._on_lost is not None:
            self._on_lost(detail)
