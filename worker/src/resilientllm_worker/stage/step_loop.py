"""The thread that touches vLLM. It runs a step when its command and its hidden states are both here.

So a tenant whose pipeline is slow never holds up the other. If such a step of each tenant is at hand when the thread is
free, they run in one forward; else tenants take turns. Nobody waits for the other tenant, but for a moment after such a
forward.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from resilientllm_worker.protocol.messages import Pace, Step, StepFailed, StepResult
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.stage.activations import describe
from resilientllm_worker.stage.deadline import Deadlines, size_class
from resilientllm_worker.stage.merge import gather, merged, scatter, share, spans, why_apart
from resilientllm_worker.stage.pace import Steps
from resilientllm_worker.stage.step_clock import StepClock
from resilientllm_worker.stage.step_times import StepTimes
from resilientllm_worker.tenancy.errors import SlotsBusy, TranslationError
from resilientllm_worker.tenancy.translate import from_runner, to_runner, written_blocks
from resilientllm_worker.transport.errors import LinkClosed

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.stage.model import Model
    from resilientllm_worker.stage.progress import Counts
    from resilientllm_worker.stage.tenant import Tenant
    from resilientllm_worker.stage.tenants import Tenants
    from resilientllm_worker.tenancy.blocks import Blocks
    from resilientllm_worker.transport.connection import Connection
    from resilientllm_worker.transport.link import LinkSender, Posted

PACE_STEPS = 16
"""So often the stage sums up how long its steps take."""
SLOTS_BUSY_SECONDS = 0.001
COMPANY_FRACTION = 0.3
"""Of a merged forward's time: how long the step after it waits for the other tenant's.

Both results left at once, and both pipelines are equally long, so the next steps come back close together, but not at
the same moment. If the first of them ran alone, the other would have to wait for all of it, and they would drift apart.
"""
LONGEST_COMPANY_SECONDS = 0.01
"""The forward may have been a long prompt's, and the step after it is not."""


class StepLoop:
    """Other threads ask it for what has to happen between two steps; counts and times may be read by any."""

    def __init__(self, model: Model, tenants: Tenants, merges: bool) -> None:
        """``merges``: steps of home and guest that are both at hand run in one forward, where that is possible."""
        self._model = model
        self._tenants = tenants
        self._merges = merges
        self._changed = tenants.changed
        # Under `_changed`.
        self._calls: deque[Callable[[], None]] = deque()
        self._void_prefixes: set[str] = set()
        self._running: set[int] = set()
        self._turn = 0
        self._stopping = False
        # Written by the loop alone.
        self.steps_done = 0
        self.merged_steps_done = 0
        self.clock = StepClock()
        self.deadlines = Deadlines()
        self.step_times = StepTimes()
        self.pace: Pace | None = None
        """Of `_steps`, which the loop alone may look at."""
        self._steps = Steps()
        self._company_seconds = 0.0
        """How long the next step waits for the other tenant's, if that is not at hand."""

    def run(self) -> None:
        """Run steps until `stop`, or until the model fails, which is raised: the stage cannot serve after that."""
        while (work := self._next()) is not None:
            if isinstance(work, tuple):
                self._run_turns(*work)
            else:
                work()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def call(self, work: Callable[[], Any]) -> Any:
        """Run ``work`` in this thread, between steps, and return what it returns, or raise what it raises.

        Only `ValueError` and `Unsupported` are the caller's; anything else ends the stage.
        """
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(work())
            except (ValueError, Unsupported) as error:
                future.set_exception(error)

        with self._changed:
            self.call_soon(call)
        return future.result()

    # --- under the tenants' lock, for other threads ------------------------------------------------------------

    def call_soon(self, work: Callable[[], None]) -> None:
        """Run ``work`` between two steps. It is not waited for."""
        self._calls.append(work)
        self._changed.notify_all()

    def forget(self, prefix: str) -> None:
        """The requests of this prefix are void: vLLM is told with the next step."""
        self._void_prefixes.add(prefix)

    def runs(self, instance: int) -> bool:
        """Whether a step of this instance is in the runner."""
        return instance in self._running

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    # --- what to do next ---------------------------------------------------------------------------------------

    def _next(self) -> Callable[[], None] | tuple[list[_Turn], list[str]] | None:
        with self._changed:
            while True:
                if self._stopping:
                    return None
                if self._calls:
                    return self._calls.popleft()
                ready = self._ready()
                if not ready:
                    self._changed.wait()
                elif len(ready) == 1 and self._company_seconds and sum(each.stitched for each in self._tenants) > 1:
                    company, self._company_seconds = self._company_seconds, 0.0
                    self._changed.wait_for(lambda: self._stopping or self._calls or len(self._ready()) != 1, company)
                else:
                    break
            ready.sort(key=lambda candidate: candidate.last_served)
            room = self._model.merging_room() if self._merges and len(ready) > 1 else None
            steps = [step for tenant in ready if (step := self._ready_step(tenant)) is not None]
            if room is None or why_apart(steps, room) is not None:
                del ready[1:]
            self._running = {tenant.instance for tenant in ready}
            void = list(self._void_prefixes)
            self._void_prefixes.clear()
            return [self._take(tenant) for tenant in ready], void

    def _ready(self) -> list[Tenant]:
        return [tenant for tenant in self._tenants if self._ready_step(tenant) is not None]

    def _ready_step(self, tenant: Tenant) -> Step | None:
        return tenant.fencing.next_step(needs_states=self._tenants.stage > 0)

    def _take(self, tenant: Tenant) -> _Turn:
        self._turn += 1
        tenant.last_served = self._turn
        tenant.fencing, step, inbound = tenant.fencing.take()
        assert tenant.blocks is not None and tenant.engine is not None, "a tenant without them is not stitched"
        return _Turn(tenant, step, inbound, tenant.blocks, tenant.outbound, tenant.engine, tenant.counts)

    # --- turns -------------------------------------------------------------------------------------------------

    def _run_turns(self, turns: list[_Turn], void: list[str]) -> None:
        """``turns`` are of different tenants, and what is wrong with one of them is no matter of the others."""
        answers: list[tuple[Connection, StepResult | StepFailed]] = []
        ready: list[tuple[_Turn, Step]] = []
        for turn in turns:
            try:
                ready.append((turn, self._translate(turn)))
            except TranslationError as error:
                answers.append((turn.engine, turn.failed(error)))
        batches = [ready] if ready else []
        while batches:
            batch = batches.pop(0)
            try:
                answers += self._run_batch(batch, void)
                void = []
            except Malformed as error:
                if len(batch) > 1:
                    batches = [[each] for each in batch]
                else:
                    ((turn, _),) = batch
                    answers.append((turn.engine, turn.failed(error)))
        self._end_turns(void)
        for engine, answer in answers:
            engine.tell(answer)

    def _run_batch(self, batch: list[tuple[_Turn, Step]], void: list[str]) -> list[tuple[Connection, StepResult]]:
        """One forward for all of ``batch``. Raises `Malformed`, and then nothing has happened."""
        turns, steps = [turn for turn, _ in batch], [step for _, step in batch]
        step, inbound = steps[0], turns[0].inbound

        def send(tensors: dict[str, torch.Tensor]) -> Sent:
            return Sent([turns[0].post(tensors)], self.clock)

        if len(batch) > 1:
            step = merged(steps)
            order, own_orders = self._model.row_order(step), [self._model.row_order(each) for each in steps]
            where = spans(order, own_orders, dict(step.num_scheduled_tokens))
            inbounds = [turn.inbound for turn in turns if turn.inbound is not None]
            inbound = gather(where, inbounds) if inbounds else None

            def send(tensors: dict[str, torch.Tensor]) -> Sent:
                posted = [turn.post(scatter(where, place, tensors)) for place, turn in enumerate(turns)]
                return Sent(posted, self.clock)

        if void:
            known = [request for request in self._model.requests() if request.startswith(tuple(void))]
            step = msgspec.structs.replace(step, finished=[*step.finished, *known])
        size = size_class(step)
        self.clock.begin(self.deadlines.allowed(size))
        try:
            result = self._model.run(step, inbound, send if turns[0].outbound is not None else None)
        finally:
            took = self.clock.end()
            self.deadlines.observe(size, took)
            self._steps.observe(size, took)
            self.step_times.observe(took)
            self._company_seconds = min(COMPANY_FRACTION * took, LONGEST_COMPANY_SECONDS) if len(batch) > 1 else 0.0
            self.steps_done += 1
            if self.steps_done % PACE_STEPS == 0:
                self.pace = self._steps.pace()
            self.merged_steps_done += len(batch) > 1
            for turn in turns:
                turn.counts.done = turn.step.step
        if result is None:
            return []
        if len(batch) == 1:
            return [(turns[0].engine, from_runner(result, turns[0].tenant.prefix))]
        return [(turn.engine, from_runner(turn.share_of(result), turn.tenant.prefix)) for turn in turns]

    def _translate(self, turn: _Turn) -> Step:
        """The step as the runner is to see it. What it writes has no seals any more. Raises `TranslationError`."""
        assert self._model.kv is not None
        block_size = self._model.kv.block_size
        while True:
            try:
                step = to_runner(turn.step, turn.tenant.prefix, turn.blocks, block_size)
                break
            except SlotsBusy:  # a replica is being written where this step needs a slot: a matter of one batch
                with self._changed:
                    self._changed.wait(SLOTS_BUSY_SECONDS)
        with self._changed:
            turn.tenant.unsealed(turn.blocks.overwrite(written_blocks(turn.step, block_size)))
        return step

    def _end_turns(self, still_void: list[str]) -> None:
        """``still_void``: prefixes of requests that the runner was to forget in this step, and did not."""
        with self._changed:
            self._running = set()
            self._void_prefixes.update(still_void)
            self._changed.notify_all()


@dataclass(frozen=True)
class _Turn:
    """A tenant's step as it was taken to be run, and who its outcome is for: a fence meanwhile changes neither.

    The outcome bears the step's stamp, so whoever gets it knows whether it is void.
    """

    tenant: Tenant
    step: Step
    inbound: dict[str, torch.Tensor] | None
    blocks: Blocks
    outbound: LinkSender | None
    engine: Connection
    counts: Counts

    def post(self, tensors: dict[str, torch.Tensor]) -> Posted:
        assert self.outbound is not None
        header, buffers = describe(tensors, self.step.stamp, self.step.step)
        self.tenant.link_sent_bytes += sum(tensor.nbytes for tensor in header.tensors)
        return self.outbound.post(header, buffers)

    def share_of(self, result: StepResult) -> StepResult:
        return share(result, self.tenant.prefix, self.step.stamp, self.step.step)

    def failed(self, error: Exception) -> StepFailed:
        return StepFailed(self.step.stamp, self.step.step, str(error))


class Sent:
    """What was posted, as vLLM wants it: after `wait` its memory is free, whatever became of the links."""

    def __init__(self, posted: list[Posted], clock: StepClock) -> None:
        self._posted = posted
        self._clock = clock

    def wait(self) -> None:
        with self._clock.standing():
            for each in self._posted:
                with contextlib.suppress(LinkClosed):  # told to the engine by the link itself
                    each.wait()
