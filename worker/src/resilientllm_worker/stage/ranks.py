"""The tensor-parallel ranks of one stage: rank 0 is the stage to the outside, the others follow it.

Rank 0 starts the others as children and tells each, over a socket pair, what it is about to do, so that all ranks see
the same steps of all tenants in the same order: collectives that interleave differently on two ranks would never
complete. A stage is one failure domain: when a rank ends, all end.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec
import torch

from resilientllm_worker.process import EXIT_BAD_CONFIGURATION
from resilientllm_worker.protocol.messages import KVGroup, Step, StepResult, WeightsHello
from resilientllm_worker.seams.errors import Malformed
from resilientllm_worker.seams.pipeline_group import SendHandle
from resilientllm_worker.stage.model import KVCache, KVNeeds, Model
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.weights.hand_over import hand_over

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0
_LENGTH_BYTES = 8
_PR_SET_PDEATHSIG = 1


class RankGone(Exception):
    """Another rank of this stage has ended; the stage cannot go on without it."""


class ReportNeeds(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered with the rank's `KVNeeds`."""


class Allocate(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Answered with an empty frame."""

    layout: str
    home_blocks: int
    pool_blocks: int
    groups: list[KVGroup]


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Not answered."""

    step: Step


Order = ReportNeeds | Allocate | Run
_orders = msgspec.msgpack.Decoder(Order)
_needs = msgspec.msgpack.Decoder(KVNeeds)


class Followers:
    """Ranks 1 and up, as rank 0 sees them."""

    def __init__(self, command: Sequence[str], ranks: int, init_method: str) -> None:
        """Start them with this process's own ``command``. In the main thread: they end with the thread that did it."""
        self._sockets: list[socket.socket] = []
        self._hand_over: list[socket.socket] = []
        """Connections go out here that another rank serves; one message is one connection."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = False
        for rank in range(1, ranks):
            ours, theirs = socket.socketpair()
            outlet, handed_over = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, handed_over:
                inherited = [theirs.fileno(), handed_over.fileno()]
                follow = ":".join([str(rank), *map(str, inherited), init_method])
                process = subprocess.Popen(
                    [*command, f"--follow={follow}"], pass_fds=inherited, stdin=subprocess.DEVNULL
                )
            self._sockets.append(ours)
            self._hand_over.append(outlet)
            self._processes.append(process)
            threading.Thread(target=self._watch, args=(rank, process), name=f"rank-{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def ranks(self) -> range:
        return range(1, 1 + len(self._processes))

    def give(self, connection: Connection, hello: WeightsHello) -> None:
        """Have the rank that ``hello`` names answer it. Returns when the connection has ended."""
        hand_over(connection, hello, self._hand_over[hello.rank - 1])

    def tell(self, order: Order) -> None:
        frame = msgspec.msgpack.encode(order)
        for sock in self._sockets:
            _send(sock, frame)

    def answers(self) -> list[bytes]:
        """One of each rank, to the last order that is answered."""
        return [_receive(sock) for sock in self._sockets]

    def close(self) -> None:
        self._closing = True
        for sock in (*self._sockets, *self._hand_over):
            sock.close()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self._closing:
            if code != EXIT_BAD_CONFIGURATION:  # Then it has said why, and the last line is what people are shown.
                logger.error("rank %d of this stage ended with %d, so the stage ends", rank, code)
            # The runner may be inside a collective that will never complete, so nothing gentler would end it.
            os._exit(code if code > 0 else 1)


class LeadingModel(Model):
    """Rank 0 of several: tells the others before it does a thing itself."""

    def __init__(self, config: VllmConfig, stage: int, followers: Followers) -> None:
        super().__init__(config, stage, rank=0)
        self._followers = followers

    def kv_needs_of_ranks(self) -> list[KVNeeds]:
        self._followers.tell(ReportNeeds())
        return [self.kv_needs(), *(_needs.decode(answer) for answer in self._followers.answers())]

    def allocate(self, layout: str, home_blocks: int, pool_blocks: int, groups: Sequence[KVGroup]) -> KVCache:
        if self.kv is not None:
            return super().allocate(layout, home_blocks, pool_blocks, groups)
        self._followers.tell(Allocate(layout, home_blocks, pool_blocks, list(groups)))
        kv = super().allocate(layout, home_blocks, pool_blocks, groups)
        self._followers.answers()
        return kv

    def run(
        self,
        step: Step,
        inbound: dict[str, torch.Tensor] | None,
        send: Callable[[dict[str, torch.Tensor]], SendHandle] | None,
    ) -> StepResult | None:
        self._followers.tell(Run(step))
        return super().run(step, inbound, send)


def follow(model: Model, sock: socket.socket) -> None:
    """Do as rank 0 says until it goes."""
    while True:
        try:
            order = _orders.decode(_receive(sock))
        except RankGone:
            return
        match order:
            case ReportNeeds():
                _send(sock, msgspec.msgpack.encode(model.kv_needs()))
            case Allocate():
                model.allocate(order.layout, order.home_blocks, order.pool_blocks, order.groups)
                _send(sock, b"")
            case Run():
                with contextlib.suppress(Malformed):  # all ranks refuse it before they do anything, and rank 0 says so
                    model.run(order.step, None, None)


def parse_follow(text: str) -> tuple[int, socket.socket, socket.socket, str]:
    """The value of ``--follow``: the rank, its two inherited sockets, and how it meets the other ranks."""
    rank, orders, handed_over, init_method = text.split(":", 3)
    return int(rank), socket.socket(fileno=int(orders)), socket.socket(fileno=int(handed_over)), init_method


def end_with_parent() -> None:
    """Ask the kernel to kill this rank when rank 0 ends: inside a collective it would not notice by itself."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def own_command() -> list[str]:
    """How to start this command again."""
    return [sys.executable, "-m", "resilientllm_worker.stage.main", *sys.argv[1:]]


def _send(sock: socket.socket, frame: bytes) -> None:
    try:
        sock.sendall(len(frame).to_bytes(_LENGTH_BYTES) + frame)
    except OSError as error:
        raise RankGone(str(error)) from error


def _receive(sock: socket.socket) -> bytes:
    return _exactly(sock, int.from_bytes(_exactly(sock, _LENGTH_BYTES)))


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        try:
            chunk = sock.recv(min(count - len(data), 1 << 20))
        except OSError as error:
            raise RankGone(str(error)) from error
        if not chunk:
            raise RankGone("its end of the socket was closed")
        data += chunk
    return bytes(data)
