"""vLLM's own scheduler with ours on top, over stages of paper: they know what a runner knows, and no more.

The stages compute the next token from all tokens that they were told of a request, and note what every KV block holds.
So a token that was never sent, sent twice, or a block that is read but lost, changes the stream.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from resilientllm_worker.engine import meeting_point
from resilientllm_worker.engine.pipeline import LOST_STEP, Boundary
from resilientllm_worker.engine.stitching import Holding
from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import Seal, Stamp

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

VOCABULARY = 250
DEPTH = 2
"""Steps in flight: as many as stages."""


def next_token(tokens: list[int]) -> int:
    """Depends on every token and its place."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def undisturbed(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@dataclass
class FakePipeline:
    """What the scheduler sees of a `Pipeline`."""

    at: Boundary
    wait_for_donor_seconds: float = 30.0
    load: tuple[int, int] = (0, 0)
    rolled: list[tuple[Stamp, int]] = field(default_factory=list)
    """Stamp and running requests of every roll back."""
    recomputed: list[int] = field(default_factory=list)
    """For every request that went on after one, how many tokens."""
    kept: int = 0
    failures: int = 0
    """Requests that waited in vain."""
    seals: list[Seal] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    held_under: Stamp | None = None

    def held(self, stamp: Stamp) -> None:
        assert self.at.hold
        self.held_under = stamp

    def boundary(self, wait_seconds: float = 0.0) -> Boundary:
        return self.at

    def note_load(self, running: int, waiting: int) -> None:
        self.load = (running, waiting)

    def rolled_back(self, boundary: Boundary, requests: int, seconds: float) -> None:
        self.rolled.append((boundary.stamp, requests))

    def resumed(self, recomputed: list[int], kept: list[int]) -> None:
        self.recomputed += recomputed
        self.kept += sum(kept)

    def failed(self, requests: int) -> None:
        self.failures += requests

    def set_cache(self, block_tokens: int, obstacle: str) -> None:
        assert not obstacle

    def seal(self, sealed_under: Stamp, seals: list[Seal], ended: list[int]) -> bool:
        if not self.at.stitched or sealed_under != self.at.stamp:
            return False
        self.seals += seals
        self.ended += ended
        return True

    def forget(self, stamp: Stamp, place: int, blocks: NDArray[np.int32]) -> None:
        self.forgotten += blocks.tolist()


class Runner:
    """State of all stages' runners, as far as vLLM's protocol goes."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.content: dict[int, list[int]] = {}
        """What was written into each block since the KV cache was last lost."""
        self.ids: set[int] = set()
        """Blocks named since then: a donor keeps a slot for each."""

    def lose_everything(self) -> None:
        self.tokens, self.blocks, self.content, self.ids = {}, {}, {}, set()

    def run(self, output: SchedulerOutput) -> dict[str, list[int]]:
        """Tokens sampled, for each request of the step; none for one that is still in its prompt."""
        for request in output.finished_req_ids:
            self.tokens.pop(request, None)
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids or ())
            (self.blocks[new.req_id],) = [list(group) for group in new.block_ids]
            starts[new.req_id] = new.num_computed_tokens
            self._read(new.req_id, new.num_computed_tokens)
        cached = output.scheduled_cached_reqs
        for place, request in enumerate(cached.req_ids):
            assert request in self.tokens, f"the runner does not know {request}"
            # As vLLM does: of the tokens sent, only those that are not known yet.
            known, sent = self.tokens[request], cached.new_token_ids[place]
            missing = cached.num_computed_tokens[place] + len(sent) - len(known)
            known += sent[len(sent) - missing :] if missing > 0 else []
            if (more := cached.new_block_ids[place]) is not None:
                self.blocks[request] += more[0]
            starts[request] = cached.num_computed_tokens[place]
        return {request: self._step(request, starts[request], n) for request, n in output.num_scheduled_tokens.items()}

    def _read(self, request: str, computed: int) -> None:
        size = self._block_size
        for place in range(computed // size):
            block = self.blocks[request][place]
            expected = self.tokens[request][: (place + 1) * size]
            assert self.content.get(block) == expected, f"{request} reads block {block}, which holds something else"

    def _step(self, request: str, start: int, count: int) -> list[int]:
        tokens, end, size = self.tokens[request], start + count, self._block_size
        assert end <= len(tokens), f"{request} is to compute tokens that nobody sent"
        self.ids.update(self.blocks[request])
        for place in range(start // size, -(-end // size)):
            self.content[self.blocks[request][place]] = tokens[: min(end, (place + 1) * size)]
        return [next_token(tokens)] if end == len(tokens) else []


class Rig:
    """Steps the scheduler as EngineCore does, with several steps in flight."""

    def __init__(self, config: VllmConfig, seed: int = 0) -> None:
        import torch
        from resilientllm_worker.engine.scheduler import ResilientScheduler
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash, resolve_kv_cache_block_sizes
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        self.block_size = int(config.cache_config.block_size)
        self.blocks = int(config.cache_config.num_gpu_blocks_override or 0)
        config.cache_config.num_gpu_blocks = self.blocks
        spec = FullAttentionSpec(block_size=self.block_size, num_kv_heads=2, head_size=32, dtype=torch.float32)
        layout = KVCacheConfig(self.blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        scheduler_size, hash_size = resolve_kv_cache_block_sizes(layout, config)
        layout = replace(layout, hash_block_size=hash_size, cache_hit_alignment_tokens=scheduler_size)
        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(hash_size, hash_function)
        self.pipeline = FakePipeline(Boundary(Stamp(1, 1), True, self.blocks - 1, 0.0))
        meeting_point.introduce(config.instance_id, self.pipeline)  # type: ignore[arg-type]
        try:
            self.scheduler = ResilientScheduler(
                vllm_config=config,
                kv_cache_config=layout,
                structured_output_manager=StructuredOutputManager(config),
                include_finished_set=False,
                log_stats=False,
                block_size=scheduler_size,
                hash_block_size=hash_size,
            )
        finally:
            meeting_point.leave(config.instance_id)
        self.runner = Runner(self.block_size)
        self.random = random.Random(seed)
        self._flying: deque[tuple[SchedulerOutput, Any]] = deque()
        self.prompts: dict[str, list[int]] = {}
        self.wanted: dict[str, int] = {}
        self.streams: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}

    # --- what a test does ---------------------------------------------------------------------------------------

    def ask(
        self, name: str, prompt_tokens: int = 20, tokens: int = 8, prompt: list[int] | None = None, **more: Any
    ) -> None:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.prompts[name] = prompt or [self.random.randrange(VOCABULARY) for _ in range(prompt_tokens)]
        self.wanted[name] = tokens
        self.streams[name] = []
        params = more.pop("sampling_params", None) or SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        self.scheduler.add_request(Request(name, self.prompts[name], params, None, block_hasher=self._hasher, **more))

    def abort(self, name: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.ends[name] = "abort"

    def lose(self, capacity: int | None = None, stitched: bool = True) -> None:
        """A stage is lost: all KV that requests rely on, and all steps in flight. Another stands in, or none."""
        stamp = Stamp(self.pipeline.at.stamp.term, self.pipeline.at.stamp.epoch + 1)
        capacity = self.blocks - 1 if capacity is None else capacity
        nothing = Holding(0, stamp, unpack_blocks(b""), unpack_numbers(b""))
        self.pipeline.at = Boundary(stamp, stitched, capacity, 0.0 if stitched else 0.001, (nothing,))
        self._flying = deque(
            (output, LOST_STEP if output.num_scheduled_tokens else old) for output, old in self._flying
        )
        self.runner.lose_everything()

    def schedule(self) -> None:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        output = self.scheduler.schedule()
        if not output.num_scheduled_tokens:
            self._flying.append((output, EMPTY_MODEL_RUNNER_OUTPUT))
        elif output.resilient_stamp != self.pipeline.at.stamp or not self.pipeline.at.stitched:
            self._flying.append((output, LOST_STEP))
        else:
            self._flying.append((output, self._result(self.runner.run(output))))
            assert len(self.runner.ids) <= self.pipeline.at.capacity_blocks, "more blocks than the donor has slots"

    def complete(self) -> None:
        """The oldest step in flight comes back."""
        output, result = self._flying.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for each in outputs.outputs:
                self.streams[each.request_id] += each.new_token_ids
                if each.finish_reason is not None:
                    self.ends[each.request_id] = str(each.finish_reason)

    def step(self) -> None:
        """As EngineCore's loop: fill the queue first, else take the oldest."""
        if self.scheduler.has_requests() and len(self._flying) < DEPTH:
            self.schedule()
        else:
            self.complete()

    def run(self, steps: int | None = None) -> None:
        """Until nobody wants anything any more, or for some steps."""
        done = 0
        while (self.scheduler.has_requests() or self._flying) and done != steps:
            self.step()
            done += 1
            assert done < 5000, "no progress"

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    @property
    def free_blocks(self) -> int:
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def expected(self, name: str) -> list[int]:
        return undisturbed(self.prompts[name], self.wanted[name])

    def check(self) -> None:
        """Every stream is a prefix of what it should be, all of it unless it was aborted, and nothing is left over."""
        for name, stream in self.streams.items():
            if self.ends[name] == "length":
                assert stream == self.expected(name), name
            else:
                assert stream == self.expected(name)[: len(stream)], name
        assert not self.scheduler.requests
        assert not self.scheduler.running
        balloon = self.blocks - 1 - self.pipeline.at.capacity_blocks
        assert self.free_blocks == self.blocks - 1 - max(0, balloon), "KV blocks leaked"

    def _result(self, sampled: dict[str, list[int]]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        requests = list(sampled)
        index = {request: place for place, request in enumerate(requests)}
        return ModelRunnerOutput(req_ids=requests, req_id_to_index=index, sampled_token_ids=list(sampled.values()))
