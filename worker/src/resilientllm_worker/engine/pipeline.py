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
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resilientllm_api.engine_state import EngineState, LossReason, RecoveryKind
from resilientllm_api.plan import Plan, ReplicationMode, StageId, StageRef

from resilientllm_worker.engine.bars import Bars
from resilientllm_worker.engine.channel import (
    CallFailed,
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
from resilientllm_worker.engine.detection import Detector, silence_limit
from resilientllm_worker.engine.move import Move, Phase, advance
from resilientllm_worker.engine.recoveries import Recoveries
from resilientllm_worker.engine.report import View, engine_state
from resilientllm_worker.engine.silence import TICK_SECONDS
from resilientllm_worker.engine.stitching import LINK_GRACE_SECONDS, Holding, Incarnations, stitch_all
from resilientllm_worker.engine.suspicion import Suspicion
from resilientllm_worker.engine.topology import Assignment, Sight, assign, is_complete, keepers
from resilientllm_worker.protocol.blocks import pack_blocks
from resilientllm_worker.protocol.fencing import is_awaited, next_term
from resilientllm_worker.protocol.messages import (
    AllocateKV,
    DescribeKV,
    Fence,
    Flush,
    Forget,
    KVAllocated,
    KVDescription,
    KVGroup,
    Message,
    Release,
    ReplicateTo,
    Seal,
    Sealed,
    Stamp,
    Step,
    StepResult,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

ALLOCATE_SECONDS = 600.0
CAUGHT_UP_SECONDS = 0.25
"""A returning stage has caught up when no sealed block has been waiting for longer, and few are waiting at all."""
FEW_BLOCKS = 32
CATCH_UP_SECONDS = 60.0
"""After so long it takes its place as it is: a donor that serves two tenants is the worse evil."""
MOVE_SECONDS = 8.0
"""A stage that is about to end is left so long before, whoever has caught up."""


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
    newcomers: tuple[Holding, ...] = ()
    """Stages that came into the pipeline since the scheduler last rolled back. The others have all that was sealed."""
    replicates: bool = True
    """The plan wants copies of sealed blocks; if not, nothing needs to be sealed."""
    hold: bool = False
    """The pipeline is to change while it works: schedule nothing, and say so when all steps are back (`held`)."""


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
        self._block_tokens = 0
        self._replication_obstacle = "the engine starts"
        self._incomplete_since = time.monotonic()
        self._failure = ""
        self._opened = False
        self._newcomers: tuple[Holding, ...] = ()
        self._move: Move | None = None
        self._held = False
        """For `_move`: the scheduler holds still, and nothing is in flight."""
        self._recoveries = Recoveries()
        self._in_flight: dict[int, Future[Any]] = {}
        self._next_step = 0
        self._load = (0, 0)
        self._steps_total = 0
        # The conductor's own.
        self._assignment: Assignment = ()
        self._incarnations: Incarnations = ()
        """Of the stages that were last stitched, in pipeline order: another incarnation has lost all KV."""
        self._keepers: dict[Channel, StageRef | None] = {}
        """Where each serving stage was last told to replicate to, on the connection at hand."""
        self._next_tick = time.monotonic()
        self._bars = Bars()
        self._detector = Detector(time.monotonic())
        self._asked: set[Channel] = set()
        """Stages that may keep a place for us: they were asked to stitch, and not released since."""
        self._allocation: tuple[str, int, dict[int, list[KVGroup]]] | None = None
        self._suspects: list[tuple[float, LinkReported]] = []
        self._leaving_since: dict[StageId, float] = {}
        self._flushing: list[Future[Any]] = []
        """Answers of stages that are to be left."""
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
                    raise AttachFailed(f"waited {limit:.0f} s; {self.state().message}")
                self._changed.wait(0.2)
            for channel in (self._channels[ref.id] for ref in self._plan.stages):
                if channel.welcome is not None and channel.welcome.stages != len(self._plan.stages):
                    raise AttachRefused(
                        f"plan {self._plan.version} has {len(self._plan.stages)} stages, but stage {channel.id} was "
                        f"started as one of {channel.welcome.stages}: correct the plan or --pipeline-parallel-size"
                    )
            seen = [c.welcome.stamp.term for c in self._channels.values() if c.connected and c.welcome is not None]
            self._stamp = Stamp(next_term(time.time_ns() // 1000, seen), 0)

    def describe_kv(self) -> list[KVDescription]:
        """What every own stage needs, in pipeline order."""
        return [answer for answer in self._call_own(lambda stage: DescribeKV) if isinstance(answer, KVDescription)]

    def allocate_kv(self, layout: str, home_blocks: int, groups: dict[int, list[KVGroup]]) -> list[KVAllocated]:
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

    def set_cache(self, block_tokens: int, obstacle: str) -> None:
        """What the scheduler says of its KV cache: tokens in a block, and why it cannot be replicated, if so."""
        with self._changed:
            self._block_tokens, self._replication_obstacle = block_tokens, obstacle
        self._events.put(lambda: None)

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
        """Where things stand between two steps; waits up to ``wait_seconds`` until there is something to do."""
        with self._changed:
            if wait_seconds:
                self._changed.wait_for(lambda: self._stitched and not self._held, wait_seconds)
            waiting = 0.0 if self._stitched else time.monotonic() - self._incomplete_since
            replicates = self._plan is not None and self._plan.replication is not ReplicationMode.NONE
            hold = self._move is not None
            return Boundary(self._stamp, self._stitched, self._capacity, waiting, self._newcomers, replicates, hold)

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
            channel.send_step(others)
        serving[-1].send_step(last)
        return future

    def held(self, stamp: Stamp) -> None:
        """Nothing of this topology is in flight, nothing will be, and all that was computed under it is sealed."""
        with self._changed:
            if self._held or self._move is None or stamp != self._stamp:
                return
            self._held = True
        self._events.put(lambda: None)

    def rolled_back(self, boundary: Boundary, requests: int, seconds: float) -> None:
        """The scheduler has stepped back to delivered tokens, and kept what all of ``boundary.newcomers`` hold."""
        with self._changed:
            if boundary.stitched:
                self._newcomers = tuple(new for new in self._newcomers if new.stamp > boundary.stamp)
            self._recoveries.rolled_back(requests, seconds)

    def resumed(self, recomputed: list[int], kept: list[int]) -> None:
        """Requests that were rolled back are scheduled again; see `Recoveries.resumed`."""
        with self._changed:
            self._recoveries.resumed(recomputed, kept)

    def failed(self, requests: int) -> None:
        """So many requests waited in vain for a stage that can stand in."""
        with self._changed:
            self._recoveries.failed(requests)

    def seal(self, sealed_under: Stamp, seals: list[Seal], ended: list[int]) -> bool:
        """Tell the serving stages which blocks are sealed. False if the topology has changed: nobody was told."""
        with self._changed:
            if not self._stitched or sealed_under != self._stamp:
                return False
            serving = self._serving
        message = Sealed(sealed_under, seals, ended)
        for channel in serving:
            channel.send(message)
        return True

    def forget(self, stamp: Stamp, place: int, blocks: NDArray[np.int32]) -> None:
        """Tell the stage at ``place`` what of its sealed content nobody will ask for."""
        with self._changed:
            if not self._stitched or stamp != self._stamp:
                return
            channel = self._serving[place]
        channel.send(Forget(stamp, pack_blocks(blocks)))

    def note_load(self, running: int, waiting: int) -> None:
        self._load = (running, waiting)
        if running or waiting or not self._recoveries.going:
            return
        with self._changed:
            if self._stitched:  # nobody is left whose token could end it
                self._recoveries.finish(time.monotonic())

    def _on_result(self, result: StepResult) -> None:
        with self._changed:
            if not is_awaited(self._stamp, self._in_flight, result.stamp, result.step):
                return
            future = self._in_flight.pop(result.step)
            self._steps_total += 1
            if self._recoveries.going and self._stitched and any(result.sampled_token_ids):
                self._recoveries.finish(time.monotonic())
        future.set_result(result)

    # --- state (any thread) ------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        with self._changed:
            return engine_state(
                View(
                    instance=self._instance,
                    plan=self._plan,
                    channels=self._channels,
                    stamp=self._stamp,
                    assignment=self._assignment,
                    serving=self._serving if self._stitched else (),
                    moves_to=self._move.wanted if self._move is not None else None,
                    keepers={channel.id: keeper for channel, keeper in self._keepers.items()},
                    block_tokens=self._block_tokens,
                    obstacle=self._replication_obstacle,
                    failure=self._failure,
                    recoveries=self._recoveries,
                    load=self._load,
                    steps_total=self._steps_total,
                    slow=self._detector.slow,
                )
            )

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
                with self._changed:
                    self._keepers.pop(event.channel, None)
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
                if event.report.stamp == self._stamp:
                    self._suspects.append((event.at + LINK_GRACE_SECONDS, event))
                    timer = threading.Timer(LINK_GRACE_SECONDS, self._events.put, (self._blame_links,))
                    timer.daemon = True
                    timer.start()
            case StepRefused():
                if event.report.stamp == self._stamp:
                    logger.error("stage %s refused a step: %s", event.channel.id, event.report.reason)
                    self._bars.add(event.channel.id, time.monotonic())
                    self._settle_topology(event.channel.id, LossReason.SELF, event.at)
            case _:
                event()
                self._settle_topology(None, None, time.monotonic())

    def _tick(self) -> None:
        if self._plan is None:
            return
        now, limits, channels = time.monotonic(), self._plan.limits, list(self._channels.values())
        for channel, seconds in self._detector.silent(channels, limits, now):
            channel.drop(LossReason.SILENCE, f"nothing heard for {seconds:.1f} s")
        slow = self._detector.slow
        self._detector.look(self._instance, channels, now)
        for stage, how in self._detector.slow.items():
            if stage not in slow:
                logger.warning("stage %s is slow: %s", stage, how)
        if self._stitched and (suspicion := self._detector.suspect(self._stamp, self._serving, limits)) is not None:
            self._act_on(suspicion, now)

    def _act_on(self, suspicion: Suspicion, now: float) -> None:
        """The pipeline does not move, because of one of its stages: go on without that."""
        stage, reason = self._serving[suspicion.place], suspicion.reason
        if reason is LossReason.UNREACHABLE:  # as if the connection had broken in both directions, it is dialled anew
            stage.drop(reason, suspicion.detail)
            return
        culprit = stage.id
        if reason is LossReason.NEIGHBOUR:
            culprit = self._detector.culprit(self._serving[suspicion.place - 1].id, culprit, now)
        logger.warning("stage %s holds up the pipeline: %s; goes on without %s", stage.id, suspicion.detail, culprit)
        self._bars.add(culprit, now)
        self._settle_topology(culprit, reason, now)

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
            plan.limits,
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
                self._bars.add(neighbour, now)
                self._settle_topology(neighbour, LossReason.NEIGHBOUR, event.at)

    def _settle_topology(self, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """Bring the pipeline to what `assign` wants; again if a stage fails meanwhile."""
        if cause not in self._assignment:
            reason = None  # whatever else is to be done is not because of it
        if reason is None and (loss := self._loss_ahead()) is not None:
            cause, reason, at = loss.channel.id, loss.reason, loss.at
        while self._opened and self._plan is not None:
            now = time.monotonic()
            seen = self._seen()
            wanted = assign(self._plan, seen, self._assignment, now, self._keeping())
            channels_wanted = tuple(self._channels.get(name) for name in wanted if name is not None)
            # The same stage in another incarnation, or at another address, has nothing of ours.
            was_lost = reason is not None and cause in wanted
            if self._stitched and channels_wanted == self._serving and not was_lost:
                if self._move is not None:
                    self._stop_moving()
                break
            if not is_complete(wanted):
                self._suspend(wanted, cause, reason, at)
                break
            if not was_lost and not self._is_ready(wanted, seen, now):
                break
            if self._stitch(wanted, cause, reason, at):
                break
            reason = reason or LossReason.SELF
        self._direct_replication()

    def _loss_ahead(self) -> Lost | None:
        """Of a serving stage, that shows already, and is not the next event."""
        return next((each.loss for each in self._serving if each.loss is not None and not each.connected), None)

    # --- planned moves -----------------------------------------------------------------------------------------

    def _is_ready(self, wanted: Assignment, seen: Mapping[StageId, Sight], now: float) -> bool:
        """Whether to stitch ``wanted`` at once. If not, a planned move to it is being prepared, step by step."""
        if not self._loses_nothing(wanted, seen, now):
            return True
        move = self._move
        if move is None or move.wanted != wanted:
            move = Move(wanted, now if move is None else move.began)
            logger.info("moves to %s", " → ".join(map(str, wanted)))
        before, move = move.phase, advance(move, self._held, all(future.done() for future in self._flushing), now)
        if move.phase is Phase.FLUSH and before is not Phase.FLUSH:
            self._flush(wanted)
        with self._changed:
            self._move = move
            self._changed.notify_all()
        return move.phase is Phase.STITCH

    def _loses_nothing(self, wanted: Assignment, seen: Mapping[StageId, Sight], now: float) -> bool:
        """Whether all that requests have computed can go along to ``wanted``, and there are any."""
        if not self._stitched or self._load == (0, 0) or self._plan is None:
            return False
        for server, stage in zip(self._serving, wanted, strict=True):
            if self._channels.get(server.id) is not server or server.id in self._plan.lost:
                return False
            if not seen[server.id].usable(now):
                return False
            if stage is None or stage == server.id:
                continue
            keeper = self._keepers.get(server)
            if keeper is None or keeper.id != stage:
                return False
            if self._move is None and not _copies_keep_up(server, self._channels[stage]):
                return False  # it is moved to because waiting longer was the worse evil
        return True

    def _flush(self, wanted: Assignment) -> None:
        stamp = self._stamp
        leaving = [server for server, stage in zip(self._serving, wanted, strict=True) if server.id != stage]
        self._flushing = [server.call(lambda call: Flush(call, stamp)) for server in leaving]

        def flushed(done: Future[Any]) -> None:
            if done.exception() is None:  # else the stage is lost, and that is told with its reason
                self._events.put(lambda: None)

        for future in self._flushing:
            future.add_done_callback(flushed)

    def _stop_moving(self) -> None:
        """There is nothing to move to any more: requests go on where they are."""
        with self._changed:
            self._move, self._held = None, False
            self._changed.notify_all()

    # --- where copies go ---------------------------------------------------------------------------------------

    def _seen(self) -> dict[StageId, Sight]:
        leaving = {name for name, channel in self._channels.items() if channel.ends_at is not None}
        if self._plan is not None:
            leaving.update(self._plan.leaving)
        now = time.monotonic()
        self._leaving_since = {name: self._leaving_since.get(name, now) for name in leaving}
        return {
            name: Sight(
                channel.connected,
                channel.has_kv,
                self._bars.until(name),
                self._has_caught_up(channel, now),
                leaving=channel.ends_at is not None,
                stuck=name in self._detector.stuck,
            )
            for name, channel in self._channels.items()
        }

    def _has_caught_up(self, channel: Channel, now: float) -> bool:
        """Whether a stage could take the place of the one that serves there with next to nothing to compute."""
        if self._plan is None or not self._stitched or not channel.usable:
            return True
        server = self._serving[channel.id.stage]
        if server is channel or self._replication_obstacle or self._plan.replication is ReplicationMode.NONE:
            return True
        if self._move is not None and channel.id in self._move.wanted:
            return True  # what it lacks now is sent in the move
        patience_ends = max(channel.usable_since, self._leaving_since.get(server.id, 0.0)) + CATCH_UP_SECONDS
        if server.ends_at is not None:
            patience_ends = min(patience_ends, server.ends_at - MOVE_SECONDS)
        if now > patience_ends:
            return True
        return _copies_keep_up(server, channel)

    def _direct_replication(self) -> None:
        """Tell every serving stage where its sealed blocks are to be kept, if that has changed."""
        if not self._stitched or self._plan is None:
            return
        wanted: dict[Channel, StageRef | None] = {}
        # A change means to send everything again; while nothing runs that is cheap, and brings back the plan's order.
        keeping = self._keeping() if self._load != (0, 0) else ()
        chosen = keepers(self._plan, self._seen(), self._assignment, keeping, time.monotonic())
        for channel, keeper in zip(self._serving, chosen, strict=True):
            ref = self._channels[keeper].ref if keeper is not None and not self._replication_obstacle else None
            wanted[channel] = ref
            if self._keepers.get(channel) != ref:
                channel.send(ReplicateTo(self._stamp, ref.address if ref is not None else None))
                logger.info("blocks of stage %s are kept by %s", channel.id, ref.id if ref else "nobody")
        for channel in self._keepers.keys() - wanted.keys():
            channel.send(ReplicateTo(self._stamp, None))
        with self._changed:
            self._keepers = wanted

    def _keeping(self) -> Assignment:
        """Who keeps the copies of every place now."""
        told = [self._keepers.get(channel) for channel in self._serving]
        return tuple(ref.id if ref is not None else None for ref in told)

    def _begin(
        self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float
    ) -> tuple[Stamp, tuple[Channel, ...]]:
        """Void the topology at hand. From here the engine thread gets `LOST_STEP` for all that was in flight."""
        move = self._move if reason is None else None
        with self._changed:
            self._move, self._held = None, False
            stamp = self._stamp = Stamp(self._stamp.term, self._stamp.epoch + 1)
            before = self._serving
            lost, self._in_flight = list(self._in_flight.values()), {}
            self._next_step = 0
            if self._stitched or self._incomplete_since == 0.0:
                self._incomplete_since = at
            self._stitched = False
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
            for place, (old, new) in enumerate(zip(self._assignment or wanted, wanted, strict=True))
            if old != new or (reason is not None and new == cause)
        }
        began, marks = (at, ()) if move is None else (move.began, move.marks)
        self._recoveries.begin(changed, self._kind(changed, wanted, reason), reason, began, marks)

    def _kind(self, changed: set[int], wanted: Assignment, reason: LossReason | None) -> RecoveryKind:
        if reason is not None or self._plan is None:
            return RecoveryKind.BORROW
        if all((stage := wanted[place]) is not None and stage.instance == self._instance for place in changed):
            return RecoveryKind.SWAP_BACK
        before = [self._assignment[place] for place in changed]
        still_work = all(
            stage in self._channels and self._channels[stage].usable and stage not in self._plan.lost
            for stage in before
            if stage is not None
        )
        return RecoveryKind.MOVE if still_work and None not in before else RecoveryKind.BORROW

    def _suspend(self, wanted: Assignment, cause: StageId | None, reason: LossReason | None, at: float) -> None:
        """No stage can take a place: fence what is left, and wait."""
        if not self._stitched and not is_complete(self._assignment) and self._assignment:
            self._assignment = wanted
            return
        stamp, before = self._begin(wanted, cause, reason, at)
        for channel in before:
            channel.send(Fence(stamp))
        self._release(stamp, {channel for channel in self._asked if channel.id.instance != self._instance})
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
        self._asked.update(channels)
        assert self._plan is not None
        silence_seconds = max(silence_limit(channel, self._plan.limits) for channel in channels)
        answer = stitch_all(stamp, channels, self._incarnations, silence_seconds)
        if isinstance(answer, StageId):
            self._bars.add(answer, time.monotonic())
            return False
        self._incarnations = answer.incarnations
        self._release(stamp, self._asked.difference(channels))
        stitched = time.monotonic()
        with self._changed:
            waited = not is_complete(self._assignment) and bool(self._assignment)
            self._assignment = wanted
            self._serving = channels
            self._stitched = True
            self._capacity = answer.capacity_blocks
            self._newcomers += answer.newcomers
            self._incomplete_since = 0.0
            self._recoveries.stitched(tuple(channel.id for channel in channels), at, fenced, stitched, waited)
            if self._load == (0, 0):
                self._recoveries.finish(stitched)
            self._changed.notify_all()
        logger.info("stitched %s at epoch %d", " → ".join(str(channel.id) for channel in channels), stamp.epoch)
        return True

    def _release(self, stamp: Stamp, channels: set[Channel]) -> None:
        """Give back the places that these keep for us, also if that was for an attempt that failed."""
        for channel in channels:
            channel.send(Release(stamp))
        self._asked -= channels


def _copies_keep_up(server: Channel, keeper: Channel) -> bool:
    """Whether the keeper has what the stage at work has sealed, but for the last moment's, as of its last heartbeat."""
    report = server.replication
    return (
        report is not None
        and report.connected
        and report.address == keeper.ref.address
        and report.lag_seconds < CAUGHT_UP_SECONDS
        and report.lag_blocks <= max(FEW_BLOCKS, report.sealed_blocks // 16)
    )
