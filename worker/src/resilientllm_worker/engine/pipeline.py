"""The pipeline of one instance: steps in flight, and the re-stitch that keeps it whole.

Two threads meet here. vLLM's engine thread schedules, submits steps and waits for them. The conductor thread owns the
topology: it takes what the channels report, decides with `topology.assign`, fences, stitches, and voids the steps
that were in flight. They share `_changed`; nothing slow happens under it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from resilientllm_api.engine_state import (
    EnginePhase,
    EngineState,
    LossReason,
    Recovery,
    RecoveryKind,
    StageServing,
)
from resilientllm_api.plan import Plan, StageId, StageRef

from resilientllm_worker.engine.channel import (
    CallFailed,
    CannotLink,
    Channel,
    Connected,
    Event,
    LinkReported,
    Lost,
    Misfit,
    StageGone,
    StepRefused,
)
from resilientllm_worker.engine.topology import Assignment, Sight, assign, is_complete, is_home
from resilientllm_worker.protocol.messages import (
    AllocateKV,
    DescribeKV,
    Fence,
    KVAllocated,
    KVDescription,
    Message,
    Release,
    Stamp,
    Step,
    StepResult,
    Stitch,
    Stitched,
)

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
STITCH_SECONDS = 3.0
ALLOCATE_SECONDS = 600.0
BAR_SECONDS = 1.0
"""How long a stage that refused, or whose link broke while it lived, is left alone; twice as long every time after."""
LONGEST_BAR_SECONDS = 8.0
FORGIVEN_AFTER_SECONDS = 30.0
LINK_GRACE_SECONDS = 0.02
"""A dead stage resets its links and its command channel; wait so long for the second before blaming the link."""
RECOVERIES_KEPT = 10


class AttachFailed(Exception):
    """The instance could not be put together in time; a new attempt may succeed."""


class AttachRefused(AttachFailed):
    """The instance cannot be put together from what it is given; the message says what to do."""


class LostStep:
    """What comes back for a step that was void before it was done. The scheduler rolls back to delivered tokens."""


LOST_STEP = LostStep()


@dataclass(frozen=True)
class Boundary:
    """What the scheduler must know between two steps."""

    stamp: Stamp
    stitched: bool
    capacity_blocks: int
    """The smallest number of KV blocks that any serving stage gives this instance."""
    waiting_seconds: float
    """How long the pipeline has been incomplete; 0 if it is complete."""


@dataclass
class _Recovery:
    """The record of a re-stitch that is going on."""

    record: Recovery
    detected: float
    stitched: float = 0.0


@dataclass(frozen=True)
class _Bar:
    """A stage that is left alone."""

    until: float
    """Monotonic seconds."""
    seconds: float


class Pipeline:
    def __init__(self, instance: int, digest: str, token: bytes) -> None:
        self._instance = instance
        self._digest = digest
        self._token = token
        self._events: queue.SimpleQueue[Event | Plan | Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        # Written by the conductor under `_changed`, read by all.
        self._plan: Plan | None = None
        self._channels: dict[StageId, Channel] = {}
        self._stamp = Stamp(0, 0)
        self._serving: tuple[Channel, ...] = ()
        self._stitched = False
        self._capacity = 0
        self._incomplete_since = time.monotonic()
        self._failure = ""
        self._opened = False
        self._recovery: _Recovery | None = None
        self._recoveries: deque[Recovery] = deque(maxlen=RECOVERIES_KEPT)
        self._recoveries_total = 0
        self._tokens_recomputed_total = 0
        self._in_flight: dict[int, Future[Any]] = {}
        self._next_step = 0
        self._load = (0, 0)
        # The conductor's own.
        self._assignment: Assignment = ()
        self._next_tick = time.monotonic()
        self._barred: dict[StageId, _Bar] = {}
        self._borrowed: set[Channel] = set()
        """Donors that may keep a place for us: they were asked to stitch, and not released since."""
        self._allocation: tuple[str, int, dict[int, list[list[str]]]] | None = None
        self._suspects: list[tuple[float, LinkReported]] = []
        self._thread = threading.Thread(target=self._conduct, name="conductor", daemon=True)
        self._thread.start()

    # --- attaching (engine thread, once) -----------------------------------------------------------------------

    def set_plan(self, plan: Plan) -> None:
        self._events.put(plan)

    def wait_connected(self) -> None:
        """Wait for a plan and for all own stages.

        Raises:
            AttachRefused: a stage does not fit.
            AttachFailed: the plan's ``attachTimeoutSeconds`` have passed.
        """
        started = time.monotonic()
        with self._changed:
            while True:
                if self._failure:
                    raise AttachRefused(self._failure)
                missing = self._missing_own()
                if self._plan is not None and not missing:
                    break
                limit = self._plan.limits.attach_timeout_seconds if self._plan else 3600.0
                if time.monotonic() - started > limit:
                    raise AttachFailed(f"waited {limit:.0f} s; {self._message()}")
                self._changed.wait(0.2)
            for channel in (self._channels[ref.id] for ref in self._plan.stages):
                if channel.welcome is not None and channel.welcome.stages != len(self._plan.stages):
                    raise AttachRefused(
                        f"plan {self._plan.version} has {len(self._plan.stages)} stages, but stage {channel.id} was "
                        f"started as one of {channel.welcome.stages}: correct the plan or --pipeline-parallel-size"
                    )
            # A term above all that any stage has seen of this instance, also when the clock went backwards.
            seen = [c.welcome.stamp.term for c in self._channels.values() if c.connected and c.welcome is not None]
            self._stamp = Stamp(max([int(time.time()), *(term + 1 for term in seen)]), 0)

    def describe_kv(self) -> list[KVDescription]:
        """What every own stage needs, in pipeline order."""
        return [answer for answer in self._call_own(lambda stage: DescribeKV) if isinstance(answer, KVDescription)]

    def allocate_kv(self, layout: str, home_blocks: int, groups: dict[int, list[list[str]]]) -> list[KVAllocated]:
        """Agree the KV cache with all own stages, and remember it for stages that come back without."""
        self._allocation = (layout, home_blocks, groups)
        answers = self._call_own(lambda stage: lambda call: AllocateKV(call, layout, home_blocks, groups[stage]))
        return [answer for answer in answers if isinstance(answer, KVAllocated)]

    def open(self, timeout_seconds: float = 60.0) -> None:
        """Stitch for the first time and return when it is done."""
        self._opened = True
        self._events.put(lambda: None)
        with self._changed:
            if not self._changed.wait_for(lambda: self._stitched or bool(self._failure), timeout_seconds):
                raise AttachFailed(
                    f"could not stitch the stages of instance {self._instance} in {timeout_seconds:.0f} s"
                )
            if self._failure:
                raise AttachRefused(self._failure)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join(5.0)
        for channel in self._channels.values():
            channel.close()

    def _own_channels(self) -> list[Channel]:
        with self._changed:
            assert self._plan is not None
            return [self._channels[ref.id] for ref in self._plan.stages]

    def _call_own(self, make: Callable[[int], Callable[[int], Message]]) -> list[Any]:
        """Call all own stages at once; again if one goes away meanwhile, since it comes back."""
        while True:
            futures = [channel.call(make(stage)) for stage, channel in enumerate(self._own_channels())]
            try:
                return [future.result(ALLOCATE_SECONDS) for future in futures]
            except StageGone as error:
                logger.warning("while attaching: %s", error)
                self.wait_connected()
            except CallFailed as error:
                raise AttachRefused(str(error)) from error
            except TimeoutError as error:
                raise AttachFailed(f"a stage did not answer in {ALLOCATE_SECONDS:.0f} s") from error

    def _missing_own(self) -> list[StageId]:
        if self._plan is None:
            return []
        return [ref.id for ref in self._plan.stages if not self._channels[ref.id].connected]

    # --- steps (engine thread) ---------------------------------------------------------------------------------

    def boundary(self, wait_seconds: float = 0.0) -> Boundary:
        """Where things stand between two steps; waits up to ``wait_seconds`` for a complete pipeline."""
        with self._changed:
            if not self._stitched and wait_seconds:
                self._changed.wait_for(lambda: self._stitched, wait_seconds)
            waiting = 0.0 if self._stitched else time.monotonic() - self._incomplete_since
            return Boundary(self._stamp, self._stitched, self._capacity, waiting)

    @property
    def wait_for_donor_seconds(self) -> float:
        with self._changed:
            return self._plan.limits.wait_for_donor_seconds if self._plan else 30.0

    def submit(self, scheduled_under: Stamp, make: Callable[[Stamp, int], tuple[Step, Step]]) -> Future[Any]:
        """Send one step to all stages. ``make`` gives it for the last stage and for the others.

        The future gives a `StepResult`, or `LOST_STEP`; it never raises, since an exception would end the engine.
        """
        future: Future[Any] = Future()
        with self._changed:
            if not self._stitched or scheduled_under != self._stamp:
                future.set_result(LOST_STEP)
                return future
            number = self._next_step
            self._next_step += 1
            self._in_flight[number] = future
            serving, stamp = self._serving, self._stamp
        last, others = make(stamp, number)
        for channel in serving[:-1]:
            channel.send(others)
        serving[-1].send(last)
        return future

    def rolled_back(self, stamp: Stamp, requests: int, tokens: int, seconds: float) -> None:
        """The scheduler has stepped back to delivered tokens for the topology of ``stamp``."""
        with self._changed:
            self._tokens_recomputed_total += tokens
            going = self._recovery
            if going is None:
                return
            # Twice for one recovery if the engine thread looked while it was going on.
            before = going.record.phases_ms.get("rollBack", 0.0)
            phases = {**going.record.phases_ms, "rollBack": before + _ms(seconds)}
            going.record = going.record.model_copy(
                update={
                    "requests": going.record.requests + requests,
                    "tokens_recomputed": going.record.tokens_recomputed + tokens,
                    "phases_ms": phases,
                }
            )

    def note_load(self, running: int, waiting: int) -> None:
        self._load = (running, waiting)
        if running or waiting or self._recovery is None:
            return
        with self._changed:
            if self._recovery is not None and self._stitched:  # nobody is left whose token could end it
                self._finish_recovery(time.monotonic())

    def _on_result(self, result: StepResult) -> None:
        with self._changed:
            if result.stamp != self._stamp:
                return
            future = self._in_flight.pop(result.step, None)
            if self._recovery is not None and self._stitched and any(result.sampled_token_ids):
                self._finish_recovery(time.monotonic())
        if future is not None:
            future.set_result(result)

    # --- state (any thread) ------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        with self._changed:
            plan, running, waiting = self._plan, *self._load
            serving = {channel.id.stage: channel.id for channel in self._serving} if self._stitched else {}
            own = self._stitched and plan is not None and is_home(plan, self._assignment)
            stages = tuple(
                StageServing(
                    stage=place,
                    served_by=serving.get(place),
                    own_connected=self._channels[ref.id].connected,
                    donors_connected=sum(self._channels[donor.id].connected for donor in plan.donors[place]),
                )
                for place, ref in enumerate(plan.stages if plan else ())
                if plan is not None
            )
            return EngineState(
                instance=self._instance,
                phase=self._phase(own),
                message=self._failure or self._message(),
                term=self._stamp.term,
                epoch=self._stamp.epoch,
                plan_version=plan.version if plan else 0,
                serving=self._stitched,
                on_own_stages=own,
                stages=stages,
                recoveries=tuple(self._recoveries),
                recoveries_total=self._recoveries_total,
                requests_running=running,
                requests_waiting=waiting,
                tokens_recomputed_total=self._tokens_recomputed_total,
            )

    def _phase(self, own: bool) -> EnginePhase:
        if self._failure:
            return EnginePhase.FAILED
        if self._stitched:
            return EnginePhase.SERVING if own else EnginePhase.DEGRADED
        if self._plan is None:
            return EnginePhase.STARTING
        if self._stamp.epoch == 0:
            return EnginePhase.ATTACHING
        return EnginePhase.RECOVERING if is_complete(self._assignment) else EnginePhase.WAITING

    def _message(self) -> str:
        if self._stitched:
            return ""
        if self._plan is None:
            return "waits for its plan"
        own = [self._channels[ref.id] for ref in self._plan.stages]
        unusable = [channel for channel in own if channel.trouble or not channel.connected]
        if not unusable and self._stamp.epoch > 0:
            unusable = [channel for channel in own if not channel.has_kv]
        if not unusable:
            return "stitches its stages"
        troubles = [channel.trouble for channel in unusable if channel.trouble]
        return "; ".join([f"waits for stage {', '.join(str(channel.id) for channel in unusable)}", *troubles])

    # --- the conductor thread ----------------------------------------------------------------------------------

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
        if isinstance(event, Event) and self._channels.get(event.channel.id) is not event.channel:
            return  # of a channel that a newer plan has replaced
        match event:
            case Plan():
                self._adopt_plan(event)
            case Connected():
                self._prepare(event.channel)
                self._settle_topology(event.channel.id, None, time.monotonic())
            case Misfit():
                self._fail_if_own(event)
            case Lost():
                logger.warning("stage %s is lost: %s (%s)", event.channel.id, event.reason, event.detail)
                self._settle_topology(event.channel.id, event.reason, event.at)
            case LinkReported():
                if event.report.stamp == self._stamp:
                    self._suspects.append((event.at + LINK_GRACE_SECONDS, event))
                    timer = threading.Timer(LINK_GRACE_SECONDS, self._events.put, (self._blame_links,))
                    timer.daemon = True
                    timer.start()
            case StepRefused():
                if event.report.stamp == self._stamp:
                    logger.error("stage %s refused a step: %s", event.channel.id, event.report.reason)
                    self._bar(event.channel.id)
                    self._settle_topology(event.channel.id, LossReason.SELF, event.at)
            case _:
                event()
                self._settle_topology(None, None, time.monotonic())

    def _tick(self) -> None:
        if self._plan is None:
            return
        now = time.monotonic()
        for channel in self._channels.values():
            # A stage keeps the interval that it was greeted with, whatever a newer plan says.
            limit = max(self._plan.limits.heartbeat_timeout_seconds, 2 * channel.heartbeat_interval_seconds)
            if (silent := channel.silent_seconds(now)) > limit:
                channel.drop(LossReason.SILENCE, f"nothing heard for {silent:.1f} s")

    def _adopt_plan(self, plan: Plan) -> None:
        with self._changed:
            if self._plan is not None and plan.version <= self._plan.version:
                return
            if self._plan is not None and len(plan.stages) != len(self._plan.stages):
                logger.error(
                    "plan %d has %d stages, this engine was started for %d: ignored",
                    plan.version,
                    len(plan.stages),
                    len(self._plan.stages),
                )
                return
            wanted = {ref.id: ref for ref in (*plan.stages, *(donor for donors in plan.donors for donor in donors))}
            stale = [
                channel for name, channel in self._channels.items() if name not in wanted or wanted[name] != channel.ref
            ]
            for channel in stale:
                del self._channels[channel.id]
            fresh = [self._make_channel(ref, plan) for name, ref in wanted.items() if name not in self._channels]
            for channel in fresh:
                self._channels[channel.id] = channel
            self._plan = plan
            self._changed.notify_all()
        for channel in fresh:
            channel.start()
        for channel in stale:
            channel.close()
        logger.info("plan %d: %d stages, %d donors", plan.version, len(plan.stages), len(wanted) - len(plan.stages))
        self._settle_topology(None, None, time.monotonic())

    def _make_channel(self, ref: StageRef, plan: Plan) -> Channel:
        return Channel(
            ref,
            self._instance,
            self._digest,
            self._token,
            plan.limits.heartbeat_interval_seconds,
            self._events.put,
            self._on_result,
        )

    def _prepare(self, channel: Channel) -> None:
        """Give an own stage that came back without KV its cache, away from this thread."""
        with self._changed:
            self._changed.notify_all()
        if channel.has_kv or channel.id.instance != self._instance or self._allocation is None:
            return
        layout, home_blocks, groups = self._allocation
        future = channel.call(lambda call: AllocateKV(call, layout, home_blocks, groups[channel.id.stage]))

        def allocated(done: Future[Any]) -> None:
            if (error := done.exception()) is None:
                self._events.put(lambda: None)
            elif not isinstance(error, StageGone):
                channel.trouble = f"stage {channel.id} cannot allocate its KV cache: {error}"
                logger.error("%s", channel.trouble)

        future.add_done_callback(allocated)

    def _fail_if_own(self, event: Misfit) -> None:
        logger.error("%s", event.detail)
        with self._changed:
            if event.channel.id.instance == self._instance and self._stamp.epoch == 0:
                self._failure = event.detail
                self._changed.notify_all()

    def _blame_links(self) -> None:
        """Links that broke although both ends live: leave the neighbour that was named alone for a while."""
        now = time.monotonic()
        due, self._suspects = (
            [event for at, event in self._suspects if at <= now],
            [(at, event) for at, event in self._suspects if at > now],
        )
        for event in due:
            if event.report.stamp != self._stamp or not self._stitched:
                continue
            neighbour = dict(enumerate(self._assignment)).get(event.report.stage)
            if neighbour is not None:
                logger.warning("link to stage %s is broken: %s", neighbour, event.report.detail)
                self._bar(neighbour)
                self._settle_topology(neighbour, LossReason.NEIGHBOUR, event.at)

    def _bar(self, stage: StageId) -> None:
        now, last = time.monotonic(), self._barred.get(stage)
        again = last is not None and now - last.until < FORGIVEN_AFTER_SECONDS
        seconds = min(2 * last.seconds, LONGEST_BAR_SECONDS) if last is not None and again else BAR_SECONDS
        self._barred[stage] = _Bar(now + seconds, seconds)

    def _settle_topology(self, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """Bring the pipeline to what `assign` wants; again if a stage fails meanwhile."""
        while self._opened and self._plan is not None:
            now = time.monotonic()
            seen = {
                name: Sight(channel.connected, channel.has_kv, bar.until if (bar := self._barred.get(name)) else 0.0)
                for name, channel in self._channels.items()
            }
            wanted = assign(self._plan, seen, self._assignment, now)
            channels_wanted = tuple(self._channels.get(name) for name in wanted if name is not None)
            # The same stage in another incarnation, or at another address, has nothing of ours.
            was_lost = reason is not None and cause in wanted
            if self._stitched and channels_wanted == self._serving and not was_lost:
                return
            if not is_complete(wanted):
                self._suspend(wanted, cause, reason, at)
                return
            if self._stitch(wanted, cause, reason, at):
                return
            reason = reason or LossReason.SELF

    def _begin(
        self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float
    ) -> tuple[Stamp, tuple[Channel, ...]]:
        """Void the topology at hand. From here the engine thread gets `LOST_STEP` for all that was in flight."""
        with self._changed:
            stamp = self._stamp = Stamp(self._stamp.term, self._stamp.epoch + 1)
            before = self._serving
            lost, self._in_flight = list(self._in_flight.values()), {}
            self._next_step = 0
            if self._stitched or self._incomplete_since == 0.0:
                self._incomplete_since = at
            self._stitched = False
            if stamp.epoch > 1:
                self._record(wanted, cause, reason, at)
        for future in lost:
            future.set_result(LOST_STEP)
        return stamp, before

    def _record(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """Open the record of this re-stitch, or widen the open one: until a token comes, it is one incident."""
        changed = {
            place
            for place, (old, new) in enumerate(zip(self._assignment or wanted, wanted, strict=True))
            if old != new or (reason is not None and new == cause)
        }
        if self._recovery is not None:
            record = self._recovery.record
            self._recovery.record = record.model_copy(update={"stages": tuple(sorted(changed | {*record.stages}))})
            return
        comes_home = all((stage := wanted[place]) is not None and stage.instance == self._instance for place in changed)
        record = Recovery(
            id=uuid.uuid4().hex[:12],
            kind=RecoveryKind.SWAP_BACK if reason is None and comes_home else RecoveryKind.BORROW,
            stages=tuple(sorted(changed)),
            reason=reason,
            detected_at=datetime.now(UTC),
        )
        self._recovery = _Recovery(record, detected=at)

    def _suspend(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """No stage can take a place: fence what is left, and wait."""
        if not self._stitched and not is_complete(self._assignment) and self._assignment:
            self._assignment = wanted
            return
        stamp, before = self._begin(wanted, cause, reason, at)
        for channel in before:
            channel.send(Fence(stamp))
        self._release(stamp, keep=())
        with self._changed:
            self._assignment = wanted
            self._serving = ()
        logger.warning("no donor for stage %s; requests wait", cause)

    def _stitch(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> bool:
        stamp, before = self._begin(wanted, cause, reason, at)
        channels = tuple(self._channels[name] for name in wanted if name is not None)
        for channel in {*before, *channels}:
            channel.send(Fence(stamp))
        fenced = time.monotonic()
        self._borrowed.update(channel for channel in channels if channel.id.instance != self._instance)
        if (refused := self._call_stitch(stamp, channels)) is not None:
            self._bar(refused)
            return False
        self._release(stamp, keep=channels)
        stitched = time.monotonic()
        with self._changed:
            waited = self._recovery is not None and not is_complete(self._assignment) and bool(self._assignment)
            self._assignment = wanted
            self._serving = channels
            self._stitched = True
            self._incomplete_since = 0.0
            if self._recovery is not None:
                going = self._recovery
                start = going.detected
                phases = dict(going.record.phases_ms)
                if waited:
                    phases["wait"] = _ms(at - start)
                    start = at
                phases["fence"] = _ms(fenced - start)
                phases["stitch"] = _ms(stitched - fenced)
                going.record = going.record.model_copy(
                    update={"phases_ms": phases, "served_by": tuple(channel.id for channel in channels)}
                )
                going.stitched = stitched
                if self._load == (0, 0):
                    self._finish_recovery(stitched)
            self._changed.notify_all()
        logger.info("stitched %s at epoch %d", " → ".join(str(channel.id) for channel in channels), stamp.epoch)
        return True

    def _release(self, stamp: Stamp, keep: tuple[Channel, ...]) -> None:
        """Give back the places that donors keep for us, those of attempts that failed included."""
        for channel in self._borrowed.difference(keep):
            channel.send(Release(stamp))
        self._borrowed.intersection_update(keep)

    def _call_stitch(self, stamp: Stamp, channels: tuple[Channel, ...]) -> StageId | None:
        """Stitch all stages at once. Returns the stage that could not, or None."""
        futures: dict[StageId, Future[Stitched]] = {}
        for place, channel in enumerate(channels):
            following = channels[place + 1].ref.address if place + 1 < len(channels) else None
            futures[channel.id] = channel.call(lambda call, following=following: Stitch(call, stamp, following))  # type: ignore[misc]
        wait(futures.values(), STITCH_SECONDS, return_when=FIRST_EXCEPTION)
        if any(isinstance(_error(future), CannotLink) for future in futures.values()):
            # Of a stage that has just died, its neighbour may know before we do.
            wait(futures.values(), LINK_GRACE_SECONDS)
        errors = {stage: error for stage, future in futures.items() if (error := _error(future)) is not None}
        for stage, error in sorted(errors.items(), key=lambda item: _blame(item[1])):
            logger.error("stitch: %s", error)
            return channels[error.place].id if isinstance(error, CannotLink) else stage
        # Who waits in vain for its successor is not to blame, so look from the end.
        for stage, future in reversed(futures.items()):
            if not future.done():
                logger.error("stage %s did not answer to a stitch in %.0f s", stage, STITCH_SECONDS)
                return stage
        self._capacity = min(future.result().capacity_blocks for future in futures.values())
        return None

    def _finish_recovery(self, now: float) -> None:
        """First token after it, or no request to give one. Under `_changed`."""
        going, self._recovery = self._recovery, None
        assert going is not None
        phases = {
            **going.record.phases_ms,
            "resume": _ms(now - going.stitched),
            "total": _ms(now - going.detected),
        }
        self._recoveries.append(going.record.model_copy(update={"phases_ms": phases, "resumed_at": datetime.now(UTC)}))
        self._recoveries_total += 1


def _error(future: Future[Stitched]) -> BaseException | None:
    """Why a call failed; None if it did not, or is not done."""
    return future.exception() if future.done() else None


def _blame(error: BaseException) -> int:
    """Whom to believe first: a stage that has gone is a fact, a link that cannot be made may be its consequence."""
    return 0 if isinstance(error, StageGone) else 2 if isinstance(error, CannotLink) else 1


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 3)
