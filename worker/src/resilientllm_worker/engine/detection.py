"""What the conductor notices at every tick: who fell silent, is stuck or slow, and who holds up the pipeline."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from resilientllm_api.engine_state import Slowness
from resilientllm_api.plan import Limits, StageId

from resilientllm_worker.engine.channel import Channel
from resilientllm_worker.engine.silence import TICK_SECONDS, Silences
from resilientllm_worker.engine.stragglers import Watch, judge
from resilientllm_worker.engine.suspicion import Awaited, Facts, Suspicion, Waits, suspect, wait
from resilientllm_worker.protocol.messages import Stamp

STARTING_SECONDS = 10.0
"""Silence of a stage that has no KV cache yet: it compiles and captures, which may hold up all of its threads, and
nobody has anything to lose there."""
SAME_VICTIM_SECONDS = 60.0
BEATS_OF_A_WORD = 3
"""How old what is known of a link may be: each end tells it with a heartbeat, and a sender gets rid of a few more
packets after the first that is not acknowledged."""


class Detector:
    def __init__(self, now: float) -> None:
        self._silences: Silences[Channel] = Silences(now)
        self._stamp: Stamp | None = None
        self._waits: Waits = ()
        self._watches: dict[StageId, Watch] = {}
        self._victims: dict[StageId, float] = {}
        """Far ends of silent links, and when."""
        self.stuck: frozenset[StageId] = frozenset()
        """Stages in a step that has taken longer than any honest one: not to be used as long as that lasts."""

    def silent(self, channels: Collection[Channel], limits: Limits, now: float) -> Iterator[tuple[Channel, float]]:
        """Stages that have said nothing for too long, with the seconds."""
        heard = {channel: channel.heard for channel in channels if channel.connected}
        self._silences = self._silences.after(now, heard, TICK_SECONDS)
        for channel, seconds in self._silences.of.items():
            limit = silence_limit(channel, limits)
            if seconds > (limit if channel.has_kv else max(limit, STARTING_SECONDS)):
                yield channel, seconds

    @property
    def slow(self) -> dict[StageId, Slowness]:
        """Own stages that have become slow."""
        return {stage: watch.slow for stage, watch in self._watches.items() if watch.slow is not None}

    def look(self, instance: int, channels: Collection[Channel], now: float) -> None:
        """Note who is stuck, serving or not, and which stages of the own instance are slow."""
        self.stuck = frozenset(channel.id for channel in channels if channel.is_stuck)
        paces = {
            channel.id: channel.pulse.beat.pace
            for channel in channels
            if channel.pulse is not None and channel.pulse.beat.pace is not None
        }
        own = {stage: pace for stage, pace in paces.items() if stage.instance == instance}
        self._watches = judge(self._watches, own, paces, now)

    def suspect(self, stamp: Stamp, serving: Sequence[Channel], limits: Limits) -> Suspicion | None:
        """Who holds up the pipeline that was stitched under ``stamp``; None as long as it moves."""
        if stamp != self._stamp:
            self._stamp, self._waits = stamp, ()
        places = [_facts(channel, stamp) for channel in serving]
        self._waits = wait(self._waits, places)
        beats = 2 * max((channel.heartbeat_interval_seconds for channel in serving), default=0.0)
        patience = dict.fromkeys(Awaited, max(limits.heartbeat_timeout_seconds, beats))
        patience[Awaited.TURN] = max(patience[Awaited.TURN], limits.step_floor_seconds)
        patience[Awaited.HIDDEN_STATES] = max(link_limit(limits), beats)
        return suspect(self._waits, places, patience)

    def culprit(self, sender: StageId, receiver: StageId, now: float) -> StageId:
        """Which end of a silent link to do without: first the sender; if another one's do not get through, either,
        the receiver."""
        again = now - self._victims.get(receiver, float("-inf")) < SAME_VICTIM_SECONDS
        self._victims[receiver] = now
        return receiver if again else sender


def silence_limit(channel: Channel, limits: Limits) -> float:
    """A stage keeps the interval that it was greeted with, whatever a newer plan says."""
    return max(limits.heartbeat_timeout_seconds, 2 * channel.heartbeat_interval_seconds)


def link_limit(limits: Limits) -> float:
    """Seconds of silence of a link, so that it is found within the timeout of a cut."""
    timeout = limits.heartbeat_timeout_seconds
    return max(timeout - BEATS_OF_A_WORD * limits.heartbeat_interval_seconds, timeout / 2)


def _facts(channel: Channel, stamp: Stamp) -> Facts:
    pulse, progress = channel.pulse, None
    if pulse is not None and pulse.beat.progress is not None and pulse.beat.progress.stamp == stamp:
        progress = pulse.beat.progress
    return Facts(
        sent=_step_of(channel.sent, stamp),
        answered=_step_of(channel.answered, stamp),
        progress=progress,
        steps_done=pulse.beat.steps_done if pulse is not None else 0,
        step_seconds=pulse.beat.step_seconds if pulse is not None else 0.0,
        is_stuck=channel.is_stuck,
        witnessed=pulse.witnessed if pulse is not None else 0.0,
    )


def _step_of(noted: tuple[Stamp, int] | None, stamp: Stamp) -> int:
    return noted[1] if noted is not None and noted[0] == stamp else -1
