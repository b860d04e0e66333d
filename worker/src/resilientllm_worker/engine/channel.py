"""The engine's command channel to one stage: dials, keeps dialling, reads, and tells what happened.

One thread per stage of the plan, own ones and donors alike, so that a donor is known and connected before it is
needed.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from resilientllm_api.engine_state import LossReason
from resilientllm_api.plan import Limits, StageId, StageRef

from resilientllm_worker.engine.pulse import Pulse, next_pulse
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    EngineHello,
    Failed,
    Flushed,
    Heartbeat,
    KVAllocated,
    KVDescription,
    LinkLost,
    Message,
    ReplicationReport,
    StageFailing,
    StageLeaving,
    StageWelcome,
    Stamp,
    Step,
    StepFailed,
    StepResult,
    Stitched,
)
from resilientllm_worker.seams.launch import describe_difference
from resilientllm_worker.transport.connection import PEER_TIMEOUT_SECONDS, Connection, dial
from resilientllm_worker.transport.errors import (
    ConnectionClosed,
    ConnectionFailed,
    CorruptFrame,
    PeerTimedOut,
    ProtocolError,
)

logger = logging.getLogger(__name__)

DIAL_SECONDS = 2.0
FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 1.0
RETRANSMITTED_SECONDS = 0.4
"""Linux counts its timeout from the first retransmission, which comes so long after the packet: 0.2 s until a
probe of its loss, and as long again."""


def peer_timeout_seconds(silence_seconds: float) -> float:
    """What to tell the kernel, for it to break a connection on which nothing was acknowledged for so long."""
    return min(max(silence_seconds - RETRANSMITTED_SECONDS, silence_seconds / 2), PEER_TIMEOUT_SECONDS)


class CallFailed(Exception):
    """The stage answered that it cannot do it, or went away before it answered."""


class StageGone(CallFailed):
    """The stage went away before it answered; the same call may succeed when it is back."""


class CannotLink(CallFailed):
    """The stage lives, but cannot link to the one at ``place``."""

    def __init__(self, reason: str, place: int) -> None:
        super().__init__(reason)
        self.place = place


@dataclass(frozen=True)
class Connected:
    channel: Channel
    welcome: StageWelcome


@dataclass(frozen=True)
class Misfit:
    """The stage was started with other settings than this engine: waiting does not mend it."""

    channel: Channel
    detail: str


@dataclass(frozen=True)
class Lost:
    channel: Channel
    reason: LossReason
    detail: str
    at: float
    """Monotonic seconds."""


@dataclass(frozen=True)
class LinkReported:
    channel: Channel
    report: LinkLost
    at: float


@dataclass(frozen=True)
class StepRefused:
    channel: Channel
    report: StepFailed
    at: float


@dataclass(frozen=True)
class Leaving:
    """The stage works, and is about to end."""

    channel: Channel
    seconds: float


Event = Connected | Misfit | Lost | LinkReported | StepRefused | Leaving


class Channel:
    """A stage as its engine sees it. Thread-safe."""

    def __init__(
        self,
        ref: StageRef,
        instance: int,
        digest: str,
        token: bytes,
        limits: Limits,
        on_event: Callable[[Event], None],
        on_result: Callable[[StepResult], None],
    ) -> None:
        self.ref = ref
        self.usable_since = 0.0
        """Monotonic seconds: connected, and with its KV cache."""
        self.welcome: StageWelcome | None = None
        self.trouble = ""
        """Why a stage that answers cannot be used, for people."""
        self.replication: ReplicationReport | None = None
        """How its copying goes, as of its last heartbeat."""
        self.ends_at: float | None = None
        """Monotonic seconds: it has said that it is about to end, then at the latest."""
        self.loss: Lost | None = None
        """How the last connection ended, until there is another. Whoever sees that this is not connected finds it."""
        self._instance = instance
        self._digest = digest
        self._token = token
        self._limits = limits
        self._peer_timeout_seconds = peer_timeout_seconds(limits.heartbeat_timeout_seconds)
        """A path that is cut one way is known first to the kernel, which gets no acknowledgements."""
        self._on_event = on_event
        self._on_result = on_result
        self._connection: Connection | None = None
        """Greeted, and of use."""
        self._dialled: Connection | None = None
        """The same, or one on which the stage has not answered yet."""
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.heard = 0.0
        """Monotonic seconds: when anything came last."""
        self.pulse: Pulse | None = None
        """What its heartbeats say, on the connection at hand."""
        self.sent: tuple[Stamp, int] | None = None
        """The last step that was handed over."""
        self.answered: tuple[Stamp, int] | None = None
        """The last step whose result came."""
        self._has_kv = False
        self._reason = (LossReason.RESET, "")
        self._thread = threading.Thread(target=self._live, name=f"stage-{ref.id}", daemon=True)

    @property
    def id(self) -> StageId:
        return self.ref.id

    @property
    def has_kv(self) -> bool:
        """Its KV cache is allocated."""
        return self._has_kv

    @has_kv.setter
    def has_kv(self, has_kv: bool) -> None:
        """By this channel's own thread only."""
        if has_kv and not self._has_kv:
            self.usable_since = time.monotonic()
        self._has_kv = has_kv

    @property
    def usable(self) -> bool:
        return self.connected and self._has_kv

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def is_stuck(self) -> bool:
        """It has been in one step for longer than any honest one takes."""
        pulse = self.pulse
        return self.connected and pulse is not None and pulse.is_stuck

    @property
    def heartbeat_interval_seconds(self) -> float:
        """What it was asked for; a newer plan does not change it."""
        return self._limits.heartbeat_interval_seconds

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            connection = self._dialled
        if connection is not None:
            connection.close()

    def allow_silence(self, seconds: float) -> None:
        """As a newer plan says. The heartbeats stay as they were asked for."""
        with self._lock:
            self._peer_timeout_seconds = peer_timeout_seconds(seconds)
            connection = self._dialled
        if connection is not None:
            connection.allow_silence(self._peer_timeout_seconds)

    def send(self, message: Message) -> bool:
        """Hand over a message that has no answer. False if the stage is gone, which `Lost` tells too."""
        connection = self._connection
        return connection is not None and connection.tell(message)

    def send_step(self, step: Step) -> None:
        if self.send(step):
            self.sent = (step.stamp, step.step)

    def call(self, make: Callable[[int], Message]) -> Future[Any]:
        """Send what ``make`` builds around a call number; the future gives the answer or raises `CallFailed`."""
        future: Future[Any] = Future()
        number = next(self._numbers)
        with self._lock:
            self._calls[number] = future
        if not self.send(make(number)):
            self._settle(number, StageGone(f"stage {self.id} is not connected"))
        return future

    def drop(self, reason: LossReason, detail: str) -> None:
        """Give up the connection of a stage that is declared lost; it is dialled anew."""
        if (connection := self._connection) is not None:
            self._reason = (reason, detail)
            connection.close()

    def _live(self) -> None:
        pause = FIRST_RETRY_SECONDS
        while not self._closed.is_set():
            try:
                connection = dial(
                    self.ref.address, self._token, DIAL_SECONDS, peer_timeout_seconds=self._peer_timeout_seconds
                )
            except (ConnectionFailed, ConnectionClosed, ValueError) as error:
                logger.debug("stage %s: %s", self.id, error)
                if isinstance(error, ValueError):
                    self.trouble = str(error)
                self._closed.wait(pause)
                pause = min(2 * pause, LAST_RETRY_SECONDS)
                continue
            pause = FIRST_RETRY_SECONDS
            with self._lock:
                self._dialled = connection
                if self._closed.is_set():  # `close` came while we dialled, and found nothing to close
                    connection.close()
            try:
                detail = self._attend(connection)
            except (ConnectionClosed, ProtocolError) as error:
                detail = str(error)
                if isinstance(error, CorruptFrame):
                    self._reason = (LossReason.CORRUPT, detail)
                elif isinstance(error, PeerTimedOut) and self._reason[0] is LossReason.RESET:
                    self._reason = (LossReason.SILENCE, detail)
            at = time.monotonic()
            connection.close()
            if was_connected := self._connection is not None:
                reason, why = self._reason
                self._reason = (LossReason.RESET, "")
                self.loss = Lost(self, reason, why or detail, at)
            self._connection = None
            self.has_kv = False
            self.replication = None
            self.pulse = None
            self.ends_at = None
            with self._lock:
                calls = list(self._calls)
            for number in calls:
                self._settle(number, StageGone(f"stage {self.id} went away: {detail}"))
            if was_connected and self.loss is not None and not self._closed.is_set():
                self._on_event(self.loss)
            self._closed.wait(pause)

    def _attend(self, connection: Connection) -> str:
        """Greet the stage and read until it goes. Returns why it went, if it said so."""
        interval = self._limits.heartbeat_interval_seconds
        connection.send(
            EngineHello(PROTOCOL_VERSION, self._instance, self._digest, interval, self._limits.step_floor_seconds)
        )
        welcome = connection.receive()
        if not isinstance(welcome, StageWelcome):
            raise ProtocolError(f"expected StageWelcome, got {type(welcome).__name__}")
        before, self.trouble = self.trouble, self._stranger(welcome) or self._misfit(welcome)
        if self.trouble:
            if self.trouble != before:  # once, not with every attempt
                self._tell_trouble(welcome)
            self._closed.wait(LAST_RETRY_SECONDS)
            return self.trouble
        self.heard = beaten = time.monotonic()
        self.welcome = welcome
        self.has_kv = welcome.home_blocks > 0
        self.loss = None
        self._connection = connection
        self._on_event(Connected(self, welcome))
        while True:
            message = connection.receive()
            self.heard = time.monotonic()
            match message:
                case StepResult():
                    self.answered = (message.stamp, message.step)
                    self._on_result(message)
                case Heartbeat():
                    self.pulse = next_pulse(self.pulse, message, self.heard - beaten, interval)
                    beaten = self.heard
                    self.replication = message.replication
                    if message.has_kv and not self.has_kv:
                        self.has_kv = True
                        self._on_event(Connected(self, welcome))
                case KVAllocated():
                    self.has_kv = True
                    self._settle(message.call, message)
                case Stitched() | KVDescription() | Flushed():
                    self._settle(message.call, message)
                case Failed(unreachable=int(place)):
                    self._settle(message.call, CannotLink(message.reason, place))
                case Failed():
                    self._settle(message.call, CallFailed(message.reason))
                case LinkLost():
                    self._on_event(LinkReported(self, message, time.monotonic()))
                case StepFailed():
                    self._on_event(StepRefused(self, message, time.monotonic()))
                case StageLeaving():
                    self.ends_at = self.heard + message.seconds
                    self._on_event(Leaving(self, message.seconds))
                case StageFailing():
                    self._reason = (LossReason.SELF, message.reason)
                    return message.reason
                case _:
                    raise ProtocolError(f"a stage cannot send {type(message).__name__}")

    def _tell_trouble(self, welcome: StageWelcome) -> None:
        if self._stranger(welcome):
            logger.error("%s", self.trouble)  # an address that was given to somebody else: a newer plan will say
        else:
            self._on_event(Misfit(self, self.trouble))

    def _stranger(self, welcome: StageWelcome) -> str:
        if (welcome.instance, welcome.stage) == (self.id.instance, self.id.stage):
            return ""
        return f"at {self.ref.address} the plan expects stage {self.id}, found stage {welcome.instance}.{welcome.stage}"

    def _misfit(self, welcome: StageWelcome) -> str:
        if welcome.protocol != PROTOCOL_VERSION:
            return (
                f"stage {self.id} speaks protocol {welcome.protocol}, this engine {PROTOCOL_VERSION}: "
                "use one image for both"
            )
        if difference := describe_difference(self._digest, welcome.config_digest):
            return (
                f"stage {self.id} was started with other settings ({difference}): give engine and stages the same flags"
            )
        return ""

    def _settle(self, number: int, answer: object) -> None:
        with self._lock:
            future = self._calls.pop(number, None)
        if future is None:
            return
        if isinstance(answer, CallFailed):
            future.set_exception(answer)
        else:
            future.set_result(answer)
