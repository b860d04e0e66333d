"""The pipeline of one instance, as vLLM's engine thread sees it: attached once, then steps in flight.

The conductor keeps it whole, in a thread of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import Plan, ReplicationMode, StageId

from resilientllm_worker.engine.channel import CallFailed, Channel, StageGone
from resilientllm_worker.engine.conductor import Conductor
from resilientllm_worker.engine.report import View, engine_state
from resilientllm_worker.engine.shared import LOST_STEP, LostStep, Shared
from resilientllm_worker.engine.stitching import Holding
from resilientllm_worker.protocol.blocks import pack_blocks
from resilientllm_worker.protocol.fencing import is_awaited, next_term
from resilientllm_worker.protocol.messages import (
    AllocateKV,
    DescribeKV,
    Forget,
    KVAllocated,
    KVDescription,
    KVGroup,
    Message,
    Seal,
    Sealed,
    Stamp,
    Step,
    StepResult,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LOST_STEP", "AttachFailed", "AttachRefused", "Boundary", "LostStep", "Pipeline"]

logger = logging.getLogger(__name__)

ALLOCATE_SECONDS = 600.0


class AttachFailed(Exception):
    """The instance could not be put together in time; a new attempt may succeed."""


class AttachRefused(AttachFailed):
    """The instance cannot be put together from what it is given; the message says what to do."""


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
        self._shared = Shared(instance)
        self._conductor = Conductor(self._shared, digest, token, self._on_result)

    # --- attaching (engine thread, once) -----------------------------------------------------------------------

    def set_plan(self, plan: Plan) -> None:
        self._conductor.put(plan)

    def wait_connected(self) -> None:
        """Wait for a plan and for all own stages.

        Raises:
            AttachRefused: a stage does not fit.
            AttachFailed: the plan's ``attachTimeoutSeconds`` have passed.
        """
        shared = self._shared
        started = time.monotonic()
        with shared.changed:
            while True:
                if shared.failure:
                    raise AttachRefused(shared.failure)
                missing = self._missing_own()
                if shared.plan is not None and not missing:
                    break
                limit = shared.plan.limits.attach_timeout_seconds if shared.plan else 3600.0
                if time.monotonic() - started > limit:
                    raise AttachFailed(f"waited {limit:.0f} s; {self.state().message}")
                shared.changed.wait(0.2)
            for channel in (shared.channels[ref.id] for ref in shared.plan.stages):
                if channel.welcome is not None and channel.welcome.stages != len(shared.plan.stages):
                    raise AttachRefused(
                        f"plan {shared.plan.version} has {len(shared.plan.stages)} stages, but stage {channel.id} was "
                        f"started as one of {channel.welcome.stages}: correct the plan or --pipeline-parallel-size"
                    )
            seen = [c.welcome.stamp.term for c in shared.channels.values() if c.connected and c.welcome is not None]
            shared.stamp = Stamp(next_term(time.time_ns() // 1000, seen), 0)

    def describe_kv(self) -> list[KVDescription]:
        """What every own stage needs, in pipeline order."""
        return [answer for answer in self._call_own(lambda stage: DescribeKV) if isinstance(answer, KVDescription)]

    def allocate_kv(self, layout: str, home_blocks: int, groups: dict[int, list[KVGroup]]) -> list[KVAllocated]:
        """Agree the KV cache with all own stages, and remember it for stages that come back without."""
        self._shared.allocation = (layout, home_blocks, groups)
        answers = self._call_own(lambda stage: lambda call: AllocateKV(call, layout, home_blocks, groups[stage]))
        return [answer for answer in answers if isinstance(answer, KVAllocated)]

    def open(self, timeout_seconds: float = 60.0) -> None:
        """Stitch for the first time and return when it is done."""
        shared = self._shared
        shared.opened = True
        self._conductor.look_again()
        with shared.changed:
            if not shared.changed.wait_for(lambda: shared.stitched or bool(shared.failure), timeout_seconds):
                raise AttachFailed(
                    f"could not stitch the stages of instance {shared.instance} in {timeout_seconds:.0f} s"
                )
            if shared.failure:
                raise AttachRefused(shared.failure)

    def set_cache(self, block_tokens: int, obstacle: str) -> None:
        """What the scheduler says of its KV cache: tokens in a block, and why it cannot be replicated, if so."""
        shared = self._shared
        with shared.changed:
            shared.block_tokens, shared.replication_obstacle = block_tokens, obstacle
        self._conductor.look_again()

    def close(self) -> None:
        self._conductor.stop()
        for channel in self._shared.channels.values():
            channel.close()

    def _own_channels(self) -> list[Channel]:
        shared = self._shared
        with shared.changed:
            assert shared.plan is not None
            return [shared.channels[ref.id] for ref in shared.plan.stages]

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
        shared = self._shared
        if shared.plan is None:
            return []
        return [ref.id for ref in shared.plan.stages if not shared.channels[ref.id].connected]

    # --- steps (engine thread) ---------------------------------------------------------------------------------

    def boundary(self, wait_seconds: float = 0.0) -> Boundary:
        """Where things stand between two steps; waits up to ``wait_seconds`` until there is something to do."""
        shared = self._shared
        with shared.changed:
            if wait_seconds:
                shared.changed.wait_for(lambda: shared.stitched and not shared.held, wait_seconds)
            waiting = 0.0 if shared.stitched else time.monotonic() - shared.incomplete_since
            replicates = shared.plan is not None and shared.plan.replication is not ReplicationMode.NONE
            hold = shared.move is not None
            return Boundary(
                shared.stamp,
                shared.stitched,
                shared.capacity,
                waiting,
                shared.newcomers,
                replicates,
                hold,
            )

    @property
    def wait_for_donor_seconds(self) -> float:
        shared = self._shared
        with shared.changed:
            return shared.plan.limits.wait_for_donor_seconds if shared.plan else 30.0

    def submit(self, scheduled_under: Stamp, make: Callable[[Stamp, int], tuple[Step, Step]]) -> Future[Any]:
        """Send one step to all stages. ``make`` gives it for the last stage and for the others.

        The future gives a `StepResult`, or `LOST_STEP`; it never raises, since an exception would end the engine.
        """
        shared = self._shared
        future: Future[Any] = Future()
        with shared.changed:
            if not shared.stitched or scheduled_under != shared.stamp:
                future.set_result(LOST_STEP)
                return future
            number = shared.next_step
            shared.next_step += 1
            shared.in_flight[number] = future
            serving, stamp = shared.serving, shared.stamp
        last, others = make(stamp, number)
        for channel in serving[:-1]:
            channel.send_step(others)
        serving[-1].send_step(last)
        return future

    def held(self, stamp: Stamp) -> None:
        """Nothing of this topology is in flight, nothing will be, and all that was computed under it is sealed."""
        shared = self._shared
        with shared.changed:
            if shared.held or shared.move is None or stamp != shared.stamp:
                return
            shared.held = True
        self._conductor.look_again()

    def rolled_back(self, boundary: Boundary, requests: int, seconds: float) -> None:
        """The scheduler has stepped back to delivered tokens, and kept what all of ``boundary.newcomers`` hold."""
        shared = self._shared
        with shared.changed:
            if boundary.stitched:
                shared.newcomers = tuple(new for new in shared.newcomers if new.stamp > boundary.stamp)
            shared.recoveries.rolled_back(requests, seconds)

    def resumed(self, recomputed: list[int], kept: list[int]) -> None:
        """Requests that were rolled back are scheduled again; see `Recoveries.resumed`."""
        with self._shared.changed:
            self._shared.recoveries.resumed(recomputed, kept)

    def failed(self, requests: int) -> None:
        """So many requests waited in vain for a stage that can stand in."""
        with self._shared.changed:
            self._shared.recoveries.failed(requests)

    def seal(self, sealed_under: Stamp, seals: list[Seal], ended: list[int]) -> bool:
        """Tell the serving stages which blocks are sealed. False if the topology has changed: nobody was told."""
        shared = self._shared
        with shared.changed:
            if not shared.stitched or sealed_under != shared.stamp:
                return False
            serving = shared.serving
        message = Sealed(sealed_under, seals, ended)
        for channel in serving:
            channel.send(message)
        return True

    def forget(self, stamp: Stamp, place: int, blocks: NDArray[np.int32]) -> None:
        """Tell the stage at ``place`` what of its sealed content nobody will ask for."""
        shared = self._shared
        with shared.changed:
            if not shared.stitched or stamp != shared.stamp:
                return
            channel = shared.serving[place]
        channel.send(Forget(stamp, pack_blocks(blocks)))

    def note_load(self, running: int, waiting: int) -> None:
        shared = self._shared
        shared.load = (running, waiting)
        if running or waiting or not shared.recoveries.going:
            return
        with shared.changed:
            if shared.stitched:  # nobody is left whose token could end it
                shared.recoveries.finish(time.monotonic())

    def _on_result(self, result: StepResult) -> None:
        shared = self._shared
        with shared.changed:
            if not is_awaited(shared.stamp, shared.in_flight, result.stamp, result.step):
                return
            future = shared.in_flight.pop(result.step)
            shared.steps_total += 1
            if shared.recoveries.going and shared.stitched and any(result.sampled_token_ids):
                shared.recoveries.finish(time.monotonic())
        future.set_result(result)

    # --- state (any thread) ------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        shared = self._shared
        with shared.changed:
            return engine_state(
                View(
                    instance=shared.instance,
                    plan=shared.plan,
                    channels=shared.channels,
                    stamp=shared.stamp,
                    assignment=shared.assignment,
                    serving=shared.serving if shared.stitched else (),
                    moves_to=shared.move.wanted if shared.move is not None else None,
                    keepers={channel.id: keeper for channel, keeper in shared.keepers.items()},
                    block_tokens=shared.block_tokens,
                    obstacle=shared.replication_obstacle,
                    failure=shared.failure,
                    recoveries=shared.recoveries,
                    load=shared.load,
                    steps_total=shared.steps_total,
                    slow=self._conductor.slow,
                )
            )
