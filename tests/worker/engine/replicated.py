"""vLLM's scheduler with ours on top, two stages of paper, and a keeper of the second one's sealed blocks.

The stages know what a runner knows, and their KV cache holds, for each slot, the tokens that were written there. What
they hold, and what the keeper holds, is kept in the books that a real stage uses. A block that is read is compared with
the tokens that it should hold, on both stages, so a hit on content that is not there cannot pass.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from resilientllm_worker.engine.pipeline import LOST_STEP, Boundary
from resilientllm_worker.engine.stitching import Holding
from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import CachedRequests, Seal, Stamp, Step
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.pool import Pool
from resilientllm_worker.tenancy.translate import to_runner, written_blocks

from tests.worker.engine.scheduling import FakePipeline, Rig, next_token

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from resilientllm_worker.tenancy.blocks import Blocks
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

PREFIX = "0/"


class PaperStage:
    """One stage's runner and KV cache, as far as one instance uses them."""

    def __init__(self, blocks: Blocks, block_size: int) -> None:
        self.blocks = blocks
        self.content: dict[int, list[int]] = {}
        """By slot."""
        self._block_size = block_size
        self._tokens: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}

    def forget_requests(self) -> None:
        self._tokens, self._tables = {}, {}

    def run(self, step: Step) -> tuple[dict[str, list[int]], list[int]]:
        """What is sampled for each request, and the blocks whose seals are void now."""
        ours = to_runner(step, PREFIX, self.blocks, self._block_size)
        voided = self.blocks.overwrite(written_blocks(step, self._block_size))
        for request in ours.finished:
            self._tokens.pop(request, None)
        starts: dict[str, int] = {}
        for new in ours.new:
            self._tokens[new.request] = list(new.prefill_token_ids or new.prompt_token_ids)
            self._tables[new.request] = list(new.block_ids[0])
            starts[new.request] = new.num_computed_tokens
            self._read_open(new.request, new.num_computed_tokens)
        for place, request in enumerate(ours.cached.requests):
            starts[request] = self._go_on(ours.cached, place, request)
        for name, count in ours.num_scheduled_tokens:
            self._write(name, starts[name], starts[name] + count)
        # As in a forward pass, where a request may read what another one of the batch has just written.
        for name, _ in ours.num_scheduled_tokens:
            self._read(name, starts[name])
        sampled = {name: self._sample(name, starts[name] + count) for name, count in ours.num_scheduled_tokens}
        return {name.removeprefix(PREFIX): tokens for name, tokens in sampled.items()}, voided

    def _go_on(self, cached: CachedRequests, place: int, request: str) -> int:
        known, sent = self._tokens[request], cached.new_token_ids[place]
        missing = cached.num_computed_tokens[place] + len(sent) - len(known)
        known += sent[len(sent) - missing :] if missing > 0 else []
        if (more := cached.new_block_ids[place]) is not None:
            self._tables[request] += more[0]
        return cached.num_computed_tokens[place]

    def _read(self, request: str, computed: int) -> None:
        size = self._block_size
        for place in range(computed // size):
            slot, expected = self._tables[request][place], self._tokens[request][: (place + 1) * size]
            assert self.content.get(slot) == expected, f"{request} reads slot {slot}, which holds something else"

    def _read_open(self, request: str, computed: int) -> None:
        """What the step adds to is there."""
        full, begun = divmod(computed, self._block_size)
        if begun:
            slot, expected = self._tables[request][full], self._tokens[request][:computed]
            assert self.content[slot][:computed] == expected, f"{request} adds to slot {slot}, which lacks something"

    def _write(self, request: str, start: int, end: int) -> None:
        tokens, size = self._tokens[request], self._block_size
        assert end <= len(tokens), f"{request} is to compute tokens that nobody sent"
        for place in range(start // size, -(-end // size)):
            self.content[self._tables[request][place]] = tokens[: min(end, (place + 1) * size)]

    def _sample(self, request: str, end: int) -> list[int]:
        tokens = self._tokens[request]
        return [next_token(tokens)] if end == len(tokens) else []


class ReplicatingPipeline(FakePipeline):
    """Tells the stages of the rig what the engine tells them."""

    rig: ReplicatedRig

    def seal(self, sealed_under: Stamp, seals: list[Seal], ended: list[int]) -> bool:
        if not super().seal(sealed_under, seals, ended):
            return False
        self.rig.sealed(seals, ended)
        return True

    def forget(self, stamp: Stamp, place: int, blocks: NDArray[np.int32]) -> None:
        super().forget(stamp, place, blocks)
        self.rig.void(self.rig.stages[place].blocks.forget(blocks.tolist()))


class ReplicatedRig(Rig):
    """The second of two stages can be lost; whoever keeps its blocks then stands in, and it may come back.

    What the replicator of a real stage does is done here by `deliver`, a step at a time.
    """

    def __init__(self, config: VllmConfig, pool_blocks: int, seed: int = 0) -> None:
        super().__init__(config, seed)
        pipeline = ReplicatingPipeline(self.pipeline.at)
        pipeline.rig = self
        self.pipeline = pipeline
        self.scheduler._pipeline = pipeline  # type: ignore[assignment]
        self.pool = Pool(self.blocks, pool_blocks)
        self.keeper = PaperStage(self.pool.tenant(0), self.block_size)
        first, own = (self._home() for _ in range(2))
        self.stages = [first, own]
        self.own: PaperStage | None = own
        self._target: PaperStage | None = self.keeper
        self.pending: deque[Seal] = deque()
        self._void: set[int] = set()
        self._numbers: list[int] = []
        self._step = 0

    # --- what a test does ---------------------------------------------------------------------------------------

    def deliver(self, count: int = 1) -> None:
        """The oldest sealed blocks that wait reach the keeper, after word of those that are of no use any more."""
        if count and self.pending and self._target is not None:
            self._target.blocks.forget(self._void)
            self._void.clear()
        for _ in range(min(count, len(self.pending))):
            seal = self.pending.popleft()
            assert self._target is not None
            (source,) = self.stages[1].blocks.translate([seal.block])
            (slot,) = self._target.blocks.place([seal])
            if slot is not None:
                self._target.content[slot] = list(self.stages[1].content[source])
                self._target.blocks.commit([seal], [slot])

    def lose_own(self, stitched_later: bool = False) -> None:
        """kill -9 of the own stage: whoever keeps its blocks stands in."""
        assert self.own is not None and self.stages[1] is self.own
        self.own = None
        self._take_over(self.keeper, None, self.pool.capacity, stitched_later)

    def come_back(self) -> None:
        """The own stage starts again, empty. The donor sends it what it has."""
        assert self.own is None
        self.own = self._home()
        self.own.blocks.stop_serving()
        self._redirect(self.own)

    def swap_back(self) -> None:
        assert self.own is not None and self.stages[1] is self.keeper
        self._take_over(self.own, self.keeper, self.blocks - 1)

    def hold(self) -> None:
        """The pipeline is to change while it works; returns when nothing is in flight any more."""
        self.pipeline.at = replace(self.pipeline.at, hold=True)
        self.pipeline.held_under = None
        while self.scheduler.has_requests() and self.pipeline.held_under is None:
            self.step()

    def call_off(self) -> None:
        self.pipeline.at = replace(self.pipeline.at, hold=False)

    def move(self, stitched_later: bool = False) -> None:
        """To the keeper, while the own stage works, which then keeps what the keeper has."""
        assert self.own is not None and self.stages[1] is self.own
        self._take_over(self.keeper, self.own, self.pool.capacity, stitched_later)

    def lose_keeper(self) -> None:
        """The keeper is replaced by one that keeps nothing yet."""
        assert self.stages[1] is self.own
        self.pool = Pool(self.blocks, self.pool.capacity)
        self.keeper = PaperStage(self.pool.tenant(0), self.block_size)
        self._redirect(self.keeper)

    # --- the pipeline's part ------------------------------------------------------------------------------------

    def sealed(self, seals: list[Seal], ended: list[int]) -> None:
        assert [seal.number for seal in seals] == sorted({seal.number for seal in seals}), "numbers rise"
        assert not seals or not self._numbers or seals[0].number > self._numbers[-1], "numbers are never used again"
        self._numbers += [seal.number for seal in seals]
        for stage in self.stages:
            assert [seal.number for seal in stage.blocks.seal(seals)] == [seal.number for seal in seals]
            stage.blocks.end(ended)
        if self._target is not None:
            self.pending += seals

    def void(self, blocks: list[int]) -> None:
        """What these held on the second stage is of no use any more."""
        gone = set(blocks)
        self.pending = deque(seal for seal in self.pending if seal.block not in gone)
        self._void |= gone

    def _take_over(
        self, stage: PaperStage, keeper: PaperStage | None, capacity: int, stitched_later: bool = False
    ) -> None:
        at = self.pipeline.at
        stamp = Stamp(at.stamp.term, at.stamp.epoch + 1)
        self._flying = deque(
            (output, LOST_STEP if output.num_scheduled_tokens else old) for output, old in self._flying
        )
        self.stages[1].blocks.stop_serving()
        self.stages[1] = stage
        stage.blocks.stop_serving()
        stage.blocks.serve()
        for each in self.stages:
            each.forget_requests()
        blocks, numbers = stage.blocks.held()
        new = Holding(1, stamp, unpack_blocks(blocks), unpack_numbers(numbers))
        whole = Boundary(stamp, True, capacity, 0.0, (*at.newcomers, new))
        if stitched_later:
            self.pipeline.at = replace(whole, stitched=False, newcomers=(), waiting_seconds=0.001, hold=False)
            self.schedule()
        self.pipeline.at = whole
        self._redirect(keeper)

    def _redirect(self, target: PaperStage | None) -> None:
        self._target = target
        self.pending.clear()
        self._void.clear()
        if target is None:
            return
        held = dict(zip(*(part.tolist() for part in self._held(target)), strict=True))
        here = self.stages[1].blocks.seals()
        target.blocks.forget(set(held) - {seal.block for seal, _ in here if held.get(seal.block) == seal.number})
        self.pending.extend(seal for seal, _ in here if held.get(seal.block) != seal.number)

    def _held(self, stage: PaperStage) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        blocks, numbers = stage.blocks.held()
        return unpack_blocks(blocks), unpack_numbers(numbers)

    def schedule(self) -> None:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        output = self.scheduler.schedule()
        at = self.pipeline.at
        if at.stitched and self.scheduler._stamp == at.stamp:
            self.pipeline.at = replace(at, newcomers=())
        if not output.num_scheduled_tokens:
            self._flying.append((output, EMPTY_MODEL_RUNNER_OUTPUT))
        elif output.resilient_stamp != at.stamp or not at.stitched:
            self._flying.append((output, LOST_STEP))
        else:
            self._flying.append((output, self._result(self._run(output))))

    def _run(self, output: SchedulerOutput) -> dict[str, list[int]]:
        from resilientllm_worker.seams.scheduler_output import encode_step

        self._step += 1
        step = encode_step(output, None, self.pipeline.at.stamp, self._step)
        (first, _), (last, voided) = [stage.run(step) for stage in self.stages]
        assert first == last
        self.void(voided)
        return last

    def _home(self) -> PaperStage:
        stage = PaperStage(HomeBlocks(self.blocks), self.block_size)
        stage.blocks.serve()
        return stage
