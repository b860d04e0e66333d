"""Seam: vLLM's Scheduler. Steps back to delivered tokens when the pipeline changed, and holds still while it is broken.

Made for vLLM 0.32; relies on ``_preempt_request``, the in-flight and stale counters of `Request`, and
``grammar_compile_error_reqs`` (requests in it fail explicitly at the next ``update_from_output``).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from resilientllm_worker.engine.meeting_point import pipeline_of
from resilientllm_worker.engine.pipeline import Boundary, LostStep
from resilientllm_worker.protocol.messages import Stamp
from resilientllm_worker.seams.scheduler_output import unsupported_in_request

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

HOLD_SECONDS = 0.05
"""How long the engine thread waits for a complete pipeline before it looks at aborts and new requests again."""


class ResilientScheduler(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Resumed requests go out as new ones with all their tokens, for both of vLLM's runners: a stage may never
        # have seen them.
        self.use_v2_model_runner = True
        self._pipeline = pipeline_of(self.vllm_config.instance_id)
        boundary = self._pipeline.boundary()
        self._stamp: Stamp = boundary.stamp
        self._balloon: list[KVCacheBlock] = []
        self._rejected: set[str] = set()
        self._limit(boundary.capacity_blocks)

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
        self._pipeline.note_load(len(self.running), len(self.waiting))
        if not boundary.stitched:
            self._fail_overdue(boundary.waiting_seconds)
            return SchedulerOutput.make_empty()
        self._rejected &= self.requests.keys()
        if self._rejected:  # empty steps until they have failed, which happens when a step comes back
            return SchedulerOutput.make_empty()
        output = super().schedule(throttle_prefills)
        output.resilient_stamp = self._stamp
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if isinstance(model_runner_output, LostStep):
            self._roll_back_to(self._pipeline.boundary())
            # All requests of a lost step are marked to drop its output, so stock accounting drains it by itself.
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._pipeline.note_load(len(self.running), len(self.waiting))
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        held = self._balloon
        self._deflate()
        try:
            done: bool = super().reset_prefix_cache(reset_running_requests, reset_connector)
        finally:
            # The same blocks again: a donor has room for no more ids than those that were left over.
            self.kv_cache_manager.block_pool.touch(held)
            self._balloon = held
        return done

    # --- rolling back ------------------------------------------------------------------------------------------

    def _roll_back_to(self, boundary: Boundary) -> None:
        """Step back to delivered tokens if the topology has changed. What was computed on lost KV is computed again."""
        if boundary.stamp == self._stamp:
            if boundary.stitched and not self._balloon:
                self._limit(boundary.capacity_blocks)
            return
        started = time.monotonic()
        for request in self.requests.values():
            # Earlier preemptions too: their outputs in flight are as lost as the others.
            if request.num_stale_output_tokens > 0:
                request.drop_stale_output = True
        requests = len(self.running)
        tokens = sum(max(0, request.num_computed_tokens - request.num_in_flight_tokens) for request in self.running)
        while self.running:
            self._preempt_request(self.running.pop(), started, drop_stale_output=True)
        self.prev_step_scheduled_req_ids.clear()
        self._deflate()
        if not self.kv_cache_manager.reset_prefix_cache():
            raise RuntimeError("KV blocks are still in use after all requests were rolled back")
        if boundary.stitched:
            self._limit(boundary.capacity_blocks)
        self._stamp = boundary.stamp
        self._pipeline.rolled_back(boundary.stamp, requests, tokens, time.monotonic() - started)

    def _fail_overdue(self, waiting_seconds: float) -> None:
        """Requests that waited for a donor longer than the plan allows fail, with an error that clients can see."""
        limit = self._pipeline.wait_for_donor_seconds
        if waiting_seconds < limit:
            return
        now = time.time()
        overdue = [request.request_id for request in self.requests.values() if now - request.arrival_time >= limit]
        if overdue:
            logger.error("%d requests fail: no stage could stand in for %.0f s", len(overdue), waiting_seconds)
            self.grammar_compile_error_reqs.update(overdue)

    # --- the balloon: blocks that the pipeline cannot hold -------------------------------------------------------

    def _limit(self, capacity_blocks: int) -> None:
        """Keep out of use what the smallest serving stage has no room for."""
        usable = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # the null block is nobody's
        self._inflate(max(0, usable - capacity_blocks) - len(self._balloon))

    def _inflate(self, blocks: int) -> None:
        if blocks > 0:
            self._balloon.extend(self.kv_cache_manager.block_pool.get_new_blocks(blocks))

    def _deflate(self) -> None:
        if self._balloon:
            self.kv_cache_manager.block_pool.free_blocks(self._balloon)
            self._balloon = []


def _unsupported(request: Request) -> str | None:
    if request.resumable:
        return "streaming input"  # such a session keeps KV blocks while it waits, and cannot be stepped back
    return unsupported_in_request(request)
