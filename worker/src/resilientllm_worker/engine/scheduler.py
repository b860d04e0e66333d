"""Seam: vLLM's Scheduler. Steps back to delivered tokens when the pipeline changed, and holds still while it is broken.

What the new pipeline has of the requests' KV stays in the prefix cache, so that only the rest is computed again. A
request of which it has everything goes on where it is: so nothing is computed again after a planned move.

Made for vLLM 0.32; relies on ``_preempt_request``, the in-flight and stale counters of `Request`, and
``grammar_compile_error_reqs`` (requests in it fail explicitly at the next ``update_from_output``).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from resilientllm_worker.engine.meeting_point import pipeline_of
from resilientllm_worker.engine.pipeline import Boundary, LostStep
from resilientllm_worker.protocol.messages import Seal, Stamp
from resilientllm_worker.seams.prefix_cache import PrefixCache
from resilientllm_worker.seams.scheduler_output import send_anew, unsupported_in_request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

HOLD_SECONDS = 0.05
"""How long the engine thread waits for a complete pipeline before it looks at aborts and new requests again."""
SEALS_LINGER_SECONDS = 0.02
"""Stages are told of sealed blocks at most so often: each telling costs as much as a small step's command."""


class ResilientScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Resumed requests go out as new ones with all their tokens, for both of vLLM's runners: a stage may never
        # have seen them.
        self.use_v2_model_runner = True
        self._pipeline = pipeline_of(self.vllm_config.instance_id)
        boundary = self._pipeline.boundary()
        self._stamp: Stamp = boundary.stamp
        self._settled = True
        """Whether it is known what the pipeline of this stamp holds; not before it is stitched."""
        self._balloon: list[KVCacheBlock] = []
        self._rejected: set[str] = set()
        self._cache = PrefixCache(self.kv_cache_manager)
        self._seals: list[Seal] = []
        self._ended: list[int] = []
        self._seals_told = 0.0
        self._owed: dict[str, int] = {}
        """Requests that a re-stitch met and that are not scheduled again yet: how many of their tokens had KV."""
        self._strangers: set[str] = set()
        """Those of them that still run: no stage knows them."""
        self._limit(boundary.capacity_blocks)
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        obstacle = self._cache.obstacle
        if ranks > 1:
            obstacle = f"stages of {ranks} tensor-parallel ranks are not replicated yet"
        self._can_replicate = not obstacle
        self._replicates = self._can_replicate and boundary.replicates
        self._pipeline.set_cache(self._cache.block_tokens, obstacle)

    # --- vLLM's interface --------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if (problem := _unsupported(request)) is not None:
            logger.error("request %s fails: %s is not supported yet", request.request_id, problem)
            self.grammar_compile_error_reqs.add(request.request_id)
            self._rejected.add(request.request_id)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        boundary = self._pipeline.boundary(HOLD_SECONDS)
        self._roll_back_to(boundary)
        self._replicates = self._can_replicate and boundary.replicates
        self._pipeline.note_load(len(self.running), len(self.waiting))
        if not boundary.stitched:
            self._fail_overdue(boundary.waiting_seconds)
            return SchedulerOutput.make_empty()
        self._rejected &= self.requests.keys()
        if self._rejected:  # empty steps until they have failed, which happens when a step comes back
            return SchedulerOutput.make_empty()
        if boundary.hold:
            self._hold()
            return SchedulerOutput.make_empty()
        self._tell_seals(SEALS_LINGER_SECONDS)
        output = super().schedule(throttle_prefills)
        output.resilient_stamp = self._stamp
        self._cache.go_on(output.num_scheduled_tokens.keys())
        self._ended += self._cache.end(output.finished_req_ids)
        if self._strangers:
            self._introduce(output)
        if self._owed:
            self._note_resumed(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if isinstance(model_runner_output, LostStep):
            self._roll_back_to(self._pipeline.boundary())
            # All requests of a lost step are marked to drop its output, so stock accounting drains it by itself.
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        elif self._replicates and scheduler_output.num_scheduled_tokens:
            self._seal(scheduler_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._pipeline.note_load(len(self.running), len(self.waiting))
        if not self.running:
            self._tell_seals(0.0)  # vLLM asks for no more steps
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        held = self._balloon
        self._deflate()
        try:
            done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
            if done:
                self._cache.forget_all()
        finally:
            # The same blocks again: a donor has room for no more ids than those that were left over.
            self.kv_cache_manager.block_pool.touch(held)
            self._balloon = held
        return done

    # --- sealing -----------------------------------------------------------------------------------------------

    def _seal(self, done: SchedulerOutput) -> None:
        """Seal what the requests of a step have filled, before stock code may take their blocks away."""
        if done.resilient_stamp != self._stamp:
            return  # of an older topology: all of its requests have been rolled back
        processed: list[tuple[Request, int]] = []
        for name, scheduled in done.num_scheduled_tokens.items():
            request = self.requests.get(name)
            # With stale output it was preempted while in flight: its blocks are not its own any more.
            if request is None or request.is_finished() or request.num_stale_output_tokens:
                continue
            processed.append((request, request.num_computed_tokens - request.num_in_flight_tokens + scheduled))
        self._seals += self._cache.seal(processed)

    def _tell_seals(self, linger_seconds: float) -> None:
        """Stages get orders and steps in one sequence, so a block that a later step takes is never sealed too late."""
        if not (self._seals or self._ended) or time.monotonic() - self._seals_told < linger_seconds:
            return
        self._seals_told = time.monotonic()
        seals, ended = self._cache.valid(self._seals), self._ended
        self._seals, self._ended = [], []
        if not self._pipeline.seal(self._stamp, seals, ended):
            self._cache.unseal(seals)

    # --- another pipeline --------------------------------------------------------------------------------------

    def _hold(self) -> None:
        """The pipeline is about to change while it works: when all steps are back, what they computed goes along."""
        if any(request.num_in_flight_tokens for request in self.requests.values()):
            return
        self._seals += self._cache.seal_all(self.running)
        self._tell_seals(0.0)
        self._pipeline.held(self._stamp)

    def _roll_back_to(self, boundary: Boundary) -> None:
        """Step back to delivered tokens if the topology has changed. What was computed on lost KV is computed again."""
        if boundary.stamp == self._stamp and (self._settled or not boundary.stitched):
            return
        started = time.monotonic()
        for request in self.requests.values():
            # Earlier preemptions too: their outputs in flight are as lost as the others.
            if request.num_stale_output_tokens > 0:
                request.drop_stale_output = True
        self._cache.unseal(self._seals)
        self._seals = []
        forgettable: list[NDArray[np.int32]] = []
        if boundary.stitched:
            forgettable = self._cache.keep([(new.blocks, new.numbers) for new in boundary.newcomers])
        running = list(self.running)
        staying = {request for request in running if self._can_stay(request)}
        self.running[:] = [request for request in running if request in staying]
        for request in reversed(running):
            if request not in staying:
                self._step_back(request, started)
        self.prev_step_scheduled_req_ids.clear()
        self._deflate()
        if boundary.stitched:
            while not self._limit(boundary.capacity_blocks) and self.running:
                self._step_back(self.running.pop(), started)
            self._strangers = {request.request_id for request in self.running}
            self._owed.update((request.request_id, request.num_computed_tokens) for request in self.running)
        self._stamp, self._settled = boundary.stamp, boundary.stitched
        # Who stays is counted when it is sure.
        requests = len(running) - (0 if boundary.stitched else len(self.running))
        self._pipeline.rolled_back(boundary, requests, time.monotonic() - started)
        if boundary.stitched:
            for new, blocks in zip(boundary.newcomers, forgettable, strict=True):
                if len(blocks):
                    self._pipeline.forget(boundary.stamp, new.place, blocks)

    def _can_stay(self, request: Request) -> bool:
        """Whether it can go on as it is, with its blocks: nothing of it is in flight, and every stage has all of it."""
        params = request.sampling_params
        if request.num_in_flight_tokens or params is None:
            return False
        if params.prompt_logprobs is not None and request.num_computed_tokens < request.num_prompt_tokens:
            return False  # those of the prompt's first part are in the runner, and nowhere else
        return self._cache.has_all(request)

    def _step_back(self, request: Request, now: float) -> None:
        """``request`` is not in `running` any more."""
        self._owed[request.request_id] = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        self._preempt_request(request, now, drop_stale_output=True)

    def _introduce(self, output: SchedulerOutput) -> None:
        """Requests that stayed as they were are new to the stages' runners."""
        anew = self._strangers.intersection(output.scheduled_cached_reqs.req_ids)
        if anew:
            blocks_of = self.kv_cache_manager.get_block_ids
            requests = [self.requests[name] for name in anew]
            send_anew(
                output,
                {
                    request.request_id: NewRequestData.from_request(
                        request, blocks_of(request.request_id), request._all_token_ids
                    )
                    for request in requests
                },
            )
        # Those that were preempted since come as new ones anyway.
        self._strangers = {
            name for name in self._strangers - output.num_scheduled_tokens.keys() if name in self.requests
        }

    def _note_resumed(self, output: SchedulerOutput) -> None:
        recomputed: list[int] = []
        kept: list[int] = []
        for new in output.scheduled_new_reqs:
            if (owed := self._owed.pop(new.req_id, None)) is not None:
                recomputed.append(max(0, owed - new.num_computed_tokens))
                kept.append(min(owed, new.num_computed_tokens))
        if recomputed:
            self._pipeline.resumed(recomputed, kept)
        self._owed = {name: owed for name, owed in self._owed.items() if name in self.requests}

    def _fail_overdue(self, waiting_seconds: float) -> None:
        """Requests that waited for a donor longer than the plan allows fail, with an error that clients can see."""
        limit = self._pipeline.wait_for_donor_seconds
        if waiting_seconds < limit:
            return
        now, failing = time.time(), self.grammar_compile_error_reqs
        late = [name for name, request in self.requests.items() if now - request.arrival_time >= limit]
        if overdue := [name for name in late if name not in failing]:
            logger.error("%d requests fail: no stage could stand in for %.0f s", len(overdue), waiting_seconds)
            failing.update(overdue)
            self._pipeline.failed(len(overdue))

    # --- the balloon: blocks that the pipeline cannot hold -------------------------------------------------------

    def _limit(self, capacity_blocks: int) -> bool:
        """Keep out of use what the smallest serving stage has no room for: never a block that has content there.

        False if requests have too many blocks for that.
        """
        pool = self.kv_cache_manager.block_pool
        excess = pool.num_gpu_blocks - 1 - capacity_blocks - len(self._balloon)  # the null block is nobody's
        if excess <= 0:
            return True
        spare = self._cache.spare(excess)
        pool.touch(spare)
        self._balloon.extend(spare)
        return len(spare) == excess

    def _deflate(self) -> None:
        if self._balloon:
            self.kv_cache_manager.block_pool.free_blocks(self._balloon)
            self._balloon = []


def _unsupported(request: Request) -> str | None:
    if request.resumable:
        return "streaming input"  # such a session keeps KV blocks while it waits, and cannot be stepped back
    return unsupported_in_request(request)
