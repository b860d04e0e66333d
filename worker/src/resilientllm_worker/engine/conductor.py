"""The conductor: the thread that owns a pipeline's topology, and keeps it whole.

It takes what the channels report, decides with `topology.assign`, fences, stitches, and voids the steps that were in
flight.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from resilientllm_api.engine_state import LossReason, RecoveryKind, Slowness
from resilientllm_api.plan import Plan, StageId, StageRef

from resilientllm_worker.engine.bars import Bars
from resilientllm_worker.engine.channel import (
    Channel,
    Connected,
    Event,
    Leaving,
    LinkReported,
    Lost,
    Misfit,
    StageGone,
    StepRefused,
)
from resilientllm_worker.engine.copies import Copies
from resilientllm_worker.engine.detection import Detector, silence_limit
from resilientllm_worker.engine.move import Move
from resilientllm_worker.engine.planned_move import PlannedMove
from resilientllm_worker.engine.shared import LOST_STEP, Shared
from resilientllm_worker.engine.silence import TICK_SECONDS
from resilientllm_worker.engine.stitching import LINK_GRACE_SECONDS, Incarnations, stitch_all
from resilientllm_worker.engine.suspicion import Suspicion
from resilientllm_worker.engine.topology import Assignment, Sight, assign, is_complete
from resilientllm_worker.protocol.messages import AllocateKV, Fence, Release, Stamp, StepResult

logger = logging.getLogger(__name__)

STOP_SECONDS = 5.0


class Conductor:
    """Runs from when it is made until `stop`."""

    def __init__(self, shared: Shared, digest: str, token: bytes, on_result: Callable[[StepResult], None]) -> None:
        """``on_result`` gets what the last stage answers, in its channel's thread."""
        self._shared = shared
        self._digest = digest
        self._token = token
        self._on_result = on_result
        self._events: queue.SimpleQueue[Event | Plan | Callable[[], None] | None] = queue.SimpleQueue()
        self._copies = Copies(shared)
        self._planned = PlannedMove(shared, self.look_again)
        self._incarnations: Incarnations = ()
        """Of the stages that were last stitched, in pipeline order: another incarnation has lost all KV."""
        self._next_tick = time.monotonic()
        self._bars = Bars()
        self._detector = Detector(time.monotonic())
        self._asked: set[Channel] = set()
        """Stages that may keep a place for us: they were asked to stitch, and not released since."""
        self._suspects: list[tuple[float, LinkReported]] = []
        self._thread = threading.Thread(target=self._conduct, name="conductor", daemon=True)
        self._thread.start()

    def put(self, event: Event | Plan) -> None:
        self._events.put(event)

    def look_again(self) -> None:
        """Something has changed that is no event of a stage."""
        self._events.put(lambda: None)

    def stop(self) -> None:
        self._events.put(None)
        self._thread.join(STOP_SECONDS)

    @property
    def slow(self) -> Mapping[StageId, Slowness]:
        """Own stages that have become slow."""
        return self._detector.slow

    # --- events ----------------------------------------------------------------------------------------------

    def _conduct(self) -> None:
        while (event := self._next_event()) is not None:
            try:
                self._take(event)
            except Exception:
                # Without this thread no loss is ever noticed again. It decides anew from what it sees, at every tick.
                logger.exception("the conductor could not handle %s", event)

    def _next_event(self) -> Event | Plan | Callable[[], None] | None:
        """What to handle next: `_tick` when it is due, also while events never pause. None: stop."""
        pause = self._next_tick - time.monotonic()
        if pause > 0:
            with contextlib.suppress(queue.Empty):
                return self._events.get(timeout=pause)
        self._next_tick = time.monotonic() + TICK_SECONDS
        return self._tick

    def _take(self, event: Event | Plan | Callable[[], None]) -> None:
        shared = self._shared
        if isinstance(event, Event) and shared.channels.get(event.channel.id) is not event.channel:
            return  # of a channel that a newer plan has replaced
        match event:
            case Plan():
                self._adopt_plan(event)
            case Connected():
                with shared.changed:
                    shared.keepers.pop(event.channel, None)
                self._prepare(event.channel)
                self._settle_topology(event.channel.id, None, time.monotonic())
            case Misfit():
                self._fail_if_own(event)
            case Lost():
                logger.warning("stage %s is lost: %s (%s)", event.channel.id, event.reason, event.detail)
                if event.reason in (LossReason.SILENCE, LossReason.UNREACHABLE):
                    # It can be dialled at once, perhaps, and may be as slow or deaf as before.
                    self._bars.add(event.channel.id, time.monotonic())
                self._settle_topology(event.channel.id, event.reason, event.at)
            case Leaving():
                logger.info("stage %s is to end, within %.1f s", event.channel.id, event.seconds)
                self._settle_topology(None, None, time.monotonic())
            case LinkReported():
                if event.report.stamp == shared.stamp:
                    self._suspects.append((event.at + LINK_GRACE_SECONDS, event))
                    timer = threading.Timer(LINK_GRACE_SECONDS, self._events.put, (self._blame_links,))
                    timer.daemon = True
                    timer.start()
            case StepRefused():
                if event.report.stamp == shared.stamp:
                    logger.error("stage %s refused a step: %s", event.channel.id, event.report.reason)
                    self._bars.add(event.channel.id, time.monotonic())
                    self._settle_topology(event.channel.id, LossReason.SELF, event.at)
            case _:
                event()
                self._settle_topology(None, None, time.monotonic())

    # --- suspicions ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        shared = self._shared
        if shared.plan is None:
            return
        now, limits, channels = time.monotonic(), shared.plan.limits, list(shared.channels.values())
        for channel, seconds in self._detector.silent(channels, limits, now):
            channel.drop(LossReason.SILENCE, f"nothing heard for {seconds:.1f} s")
        slow = self._detector.slow
        self._detector.look(shared.instance, channels, now)
        for stage, how in self._detector.slow.items():
            if stage not in slow:
                logger.warning("stage %s is slow: %s", stage, how)
        if shared.stitched and (suspicion := self._detector.suspect(shared.stamp, shared.serving, limits)) is not None:
            self._act_on(suspicion, now)

    def _act_on(self, suspicion: Suspicion, now: float) -> None:
        """The pipeline does not move, because of one of its stages: go on without that."""
        stage, reason = self._shared.serving[suspicion.place], suspicion.reason
        if reason is LossReason.UNREACHABLE:  # as if the connection had broken in both directions, it is dialled anew
            stage.drop(reason, suspicion.detail)
            return
        culprit = stage.id
        if reason is LossReason.NEIGHBOUR:
            culprit = self._detector.culprit(self._shared.serving[suspicion.place - 1].id, culprit, now)
        logger.warning("stage %s holds up the pipeline: %s; goes on without %s", stage.id, suspicion.detail, culprit)
        self._bars.add(culprit, now)
        self._settle_topology(culprit, reason, now)

    def _blame_links(self) -> None:
        """Links that broke although both ends live: leave the neighbour that was named alone for a while."""
        shared = self._shared
        now = time.monotonic()
        due, self._suspects = (
            [event for at, event in self._suspects if at <= now],
            [(at, event) for at, event in self._suspects if at > now],
        )
        for event in due:
            if event.report.stamp != shared.stamp or not shared.stitched:
                continue
            neighbour = dict(enumerate(shared.assignment)).get(event.report.stage)
            if neighbour is not None:
                logger.warning("link to stage %s is broken: %s", neighbour, event.report.detail)
                self._bars.add(neighbour, now)
                self._settle_topology(neighbour, LossReason.NEIGHBOUR, event.at)

    # --- plans -----------------------------------------------------------------------------------------------

    def _adopt_plan(self, plan: Plan) -> None:
        shared = self._shared
        with shared.changed:
            if shared.plan is not None and plan.version <= shared.plan.version:
                return
            if shared.plan is not None and len(plan.stages) != len(shared.plan.stages):
                logger.error(
                    "plan %d has %d stages, this engine was started for %d: ignored",
                    plan.version,
                    len(plan.stages),
                    len(shared.plan.stages),
                )
                return
            wanted = {ref.id: ref for ref in (*plan.stages, *(donor for donors in plan.donors for donor in donors))}
            stale = [
                channel
                for name, channel in shared.channels.items()
                if name not in wanted or wanted[name] != channel.ref
            ]
            for channel in stale:
                del shared.channels[channel.id]
            kept = list(shared.channels.values())
            fresh = [self._make_channel(ref, plan) for name, ref in wanted.items() if name not in shared.channels]
            for channel in fresh:
                shared.channels[channel.id] = channel
            shared.plan = plan
            shared.changed.notify_all()
        for channel in kept:
            channel.allow_silence(plan.limits.heartbeat_timeout_seconds)
        for channel in fresh:
            channel.start()
        for channel in stale:
            channel.close()
        logger.info("plan %d: %d stages, %d donors", plan.version, len(plan.stages), len(wanted) - len(plan.stages))
        self._settle_topology(None, None, time.monotonic())

    def _make_channel(self, ref: StageRef, plan: Plan) -> Channel:
        return Channel(
            ref,
            self._shared.instance,
            self._digest,
            self._token,
            plan.limits,
            self._events.put,
            self._on_result,
        )

    def _prepare(self, channel: Channel) -> None:
        """Give an own stage that came back without KV its cache, away from this thread."""
        shared = self._shared
        with shared.changed:
            shared.changed.notify_all()
        if channel.has_kv or channel.id.instance != shared.instance or shared.allocation is None:
            return
        layout, home_blocks, groups = shared.allocation
        future = channel.call(lambda call: AllocateKV(call, layout, home_blocks, groups[channel.id.stage]))

        def allocated(done: Future[Any]) -> None:
            if (error := done.exception()) is None:
                self.look_again()
            elif not isinstance(error, StageGone):
                channel.trouble = f"stage {channel.id} cannot allocate its KV cache: {error}"
                logger.error("%s", channel.trouble)

        future.add_done_callback(allocated)

    def _fail_if_own(self, event: Misfit) -> None:
        shared = self._shared
        logger.error("%s", event.detail)
        with shared.changed:
            if event.channel.id.instance == shared.instance and shared.stamp.epoch == 0:
                shared.failure = event.detail
                shared.changed.notify_all()

    # --- topology --------------------------------------------------------------------------------------------

    def _settle_topology(self, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """Bring the pipeline to what `assign` wants; again if a stage fails meanwhile."""
        shared = self._shared
        if cause not in shared.assignment:
            reason = None  # whatever else is to be done is not because of it
        if reason is None and (loss := self._loss_ahead()) is not None:
            cause, reason, at = loss.channel.id, loss.reason, loss.at
        while shared.opened and shared.plan is not None:
            now = time.monotonic()
            seen = self._seen()
            wanted = assign(shared.plan, seen, shared.assignment, now, shared.keeping)
            channels_wanted = tuple(shared.channels.get(name) for name in wanted if name is not None)
            # The same stage in another incarnation, or at another address, has nothing of ours.
            was_lost = reason is not None and cause in wanted
            if shared.stitched and channels_wanted == shared.serving and not was_lost:
                if shared.move is not None:
                    self._planned.stop()
                break
            if not is_complete(wanted):
                self._suspend(wanted, cause, reason, at)
                break
            if not was_lost and not self._planned.is_ready(wanted, seen, now):
                break
            if self._stitch(wanted, cause, reason, at):
                break
            reason = reason or LossReason.SELF
        self._copies.direct(self._seen())

    def _loss_ahead(self) -> Lost | None:
        """Of a serving stage, that shows already, and is not the next event."""
        return next((each.loss for each in self._shared.serving if each.loss is not None and not each.connected), None)

    def _seen(self) -> dict[StageId, Sight]:
        shared = self._shared
        leaving = {name for name, channel in shared.channels.items() if channel.ends_at is not None}
        if shared.plan is not None:
            leaving.update(shared.plan.leaving)
        now = time.monotonic()
        self._copies.note_leaving(leaving, now)
        return {
            name: Sight(
                channel.connected,
                channel.has_kv,
                self._bars.until(name),
                self._copies.has_caught_up(channel, now),
                leaving=channel.ends_at is not None,
                stuck=name in self._detector.stuck,
            )
            for name, channel in shared.channels.items()
        }

    def _begin(
        self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float
    ) -> tuple[Stamp, tuple[Channel, ...]]:
        """Void the topology at hand. From here the engine thread gets `LOST_STEP` for all that was in flight."""
        shared = self._shared
        move = shared.move if reason is None else None
        with shared.changed:
            shared.move, shared.held = None, False
            stamp = shared.stamp = Stamp(shared.stamp.term, shared.stamp.epoch + 1)
            before = shared.serving
            lost, shared.in_flight = list(shared.in_flight.values()), {}
            shared.next_step = 0
            if shared.stitched or shared.incomplete_since == 0.0:
                shared.incomplete_since = at
            shared.stitched = False
            if stamp.epoch > 1:
                self._record(wanted, cause, reason, at, move)
        for future in lost:
            future.set_result(LOST_STEP)
        return stamp, before

    def _record(
        self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float, move: Move | None
    ) -> None:
        changed = {
            place
            for place, (old, new) in enumerate(zip(self._shared.assignment or wanted, wanted, strict=True))
            if old != new or (reason is not None and new == cause)
        }
        began, marks = (at, ()) if move is None else (move.began, move.marks)
        self._shared.recoveries.begin(changed, self._kind(changed, wanted, reason), reason, began, marks)

    def _kind(self, changed: set[int], wanted: Assignment, reason: LossReason | None) -> RecoveryKind:
        shared = self._shared
        if reason is not None or shared.plan is None:
            return RecoveryKind.BORROW
        if all((stage := wanted[place]) is not None and stage.instance == shared.instance for place in changed):
            return RecoveryKind.SWAP_BACK
        before = [shared.assignment[place] for place in changed]
        still_work = all(
            stage in shared.channels and shared.channels[stage].usable and stage not in shared.plan.lost
            for stage in before
            if stage is not None
        )
        return RecoveryKind.MOVE if still_work and None not in before else RecoveryKind.BORROW

    def _suspend(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """No stage can take a place: fence what is left, and wait."""
        shared = self._shared
        if not shared.stitched and not is_complete(shared.assignment) and shared.assignment:
            shared.assignment = wanted
            return
        stamp, before = self._begin(wanted, cause, reason, at)
        for channel in before:
            channel.send(Fence(stamp))
        self._release(stamp, {channel for channel in self._asked if channel.id.instance != shared.instance})
        with shared.changed:
            shared.assignment = wanted
            shared.serving = ()
        logger.warning("no donor for stage %s; requests wait", cause)

    def _stitch(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> bool:
        shared = self._shared
        stamp, before = self._begin(wanted, cause, reason, at)
        channels = tuple(shared.channels[name] for name in wanted if name is not None)
        for channel in {*before, *channels}:
            channel.send(Fence(stamp))
        fenced = time.monotonic()
        self._asked.update(channels)
        assert shared.plan is not None
        silence_seconds = max(silence_limit(channel, shared.plan.limits) for channel in channels)
        answer = stitch_all(stamp, channels, self._incarnations, silence_seconds)
        if isinstance(answer, StageId):
            self._bars.add(answer, time.monotonic())
            return False
        self._incarnations = answer.incarnations
        self._release(stamp, self._asked.difference(channels))
        stitched = time.monotonic()
        with shared.changed:
            waited = not is_complete(shared.assignment) and bool(shared.assignment)
            shared.assignment = wanted
            shared.serving = channels
            shared.stitched = True
            shared.capacity = answer.capacity_blocks
            shared.newcomers += answer.newcomers
            shared.incomplete_since = 0.0
            shared.recoveries.stitched(tuple(channel.id for channel in channels), at, fenced, stitched, waited)
            if shared.idle:
                shared.recoveries.finish(stitched)
            shared.changed.notify_all()
        logger.info("stitched %s at epoch %d", " → ".join(str(channel.id) for channel in channels), stamp.epoch)
        return True

    def _release(self, stamp: Stamp, channels: set[Channel]) -> None:
        """Give back the places that these keep for us, also if that was for an attempt that failed."""
        for channel in channels:
            channel.send(Release(stamp))
        self._asked -= channels
