"""Moves batches of sealed blocks from a stage to its keeper, whatever the network between them. Decides nothing.

A channel keeps order, delivers a batch whole or not at all, and makes the sender wait while the keeper is slower. The
sending end is a `ReplicaChannel`, the receiving end a `ReplicaInlet`; `tcp` has both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from resilientllm_worker.protocol.messages import Replicas, ReplicasKept, ReplicaWelcome, Seal

MAX_BATCH_BLOCKS = 1024
MAX_BATCH_BYTES = 64 << 20
"""A batch has at most so many of both, but may always have one block. Both ends hold one batch in memory."""


def batch_limit(block_bytes: int) -> int:
    """The most blocks that a batch may have."""
    return max(1, min(MAX_BATCH_BLOCKS, MAX_BATCH_BYTES // block_bytes))


class ReplicaChannel(Protocol):
    """The sending end. One thread sends, one receives, any may close."""

    @property
    def welcome(self) -> ReplicaWelcome:
        """The keeper's answer to the hello."""

    def send(
        self,
        seals: Sequence[Seal],
        checksums: Sequence[int],
        void: Sequence[int],
        ended: Sequence[int],
        content: memoryview,
    ) -> None:
        """Sends one batch, ``content`` in the order of ``seals``; waits while the keeper is slow.

        On return ``content`` may be used again.

        Raises:
            ConnectionClosed: it did not go, or only in part, and then none of it is delivered.
        """

    def receive(self) -> ReplicasKept:
        """What became of the next batch, in the order in which they were sent.

        Raises:
            ConnectionClosed: the keeper has gone, or `close` was called.
            ProtocolError: the keeper broke the rules. The channel is closed.
        """

    def close(self) -> None:
        """Wakes whoever sends or receives, at both ends. From any thread, any number of times."""


class ReplicaInlet(Protocol):
    """The receiving end, once its hello has been read; `transport.connection.Connection` is one."""

    @property
    def peer(self) -> str:
        """Who sends, for logs."""

    def receive_replicas(self, allocate: Callable[[Replicas], memoryview]) -> Replicas:
        """The next batch, its content in the memory that ``allocate`` gives for its header.

        If ``allocate`` raises, the channel is closed and the error goes on to the caller.

        Raises:
            ConnectionClosed: the sender has gone, perhaps within the batch, or `close` was called.
            ProtocolError: the sender broke the rules. The channel is closed.
        """

    def send(self, message: ReplicaWelcome | ReplicasKept) -> None:
        """Raises `ConnectionClosed`."""

    def close(self) -> None:
        """As that of the sending end."""
