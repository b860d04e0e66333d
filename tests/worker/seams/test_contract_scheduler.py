"""vLLM's scheduler has the parts that ours turns. What they do together is tested in tests/worker/engine."""

from __future__ import annotations

import inspect

import pytest
from resilientllm_worker.engine.scheduler import ResilientScheduler
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from tests.worker.seams.vllm_source import source_of

SCHEDULER = "v1/core/sched/scheduler.py"


def parameters(function: object) -> list[str]:
    return [each for each in inspect.signature(function).parameters if each != "self"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Scheduler._preempt_request, ["request", "timestamp", "drop_stale_output"]),
        (Scheduler.finish_requests, ["request_ids", "finished_status"]),
        (KVCacheManager.reset_prefix_cache, []),
        (KVCacheManager.get_block_ids, ["request_id"]),
        (NewRequestData.from_request, ["request", "block_ids", "prefill_token_ids", "uses_mrope"]),
        (BlockPool.get_new_blocks, ["num_blocks"]),
        (BlockPool.free_blocks, ["ordered_blocks"]),
        (BlockPool.touch, ["blocks"]),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_what_we_call_takes_what_we_give(method: object, expected: list[str]) -> None:
    assert parameters(method) == expected, "look at engine/scheduler.py"


@pytest.mark.parametrize("name", ["add_request", "schedule", "update_from_output", "reset_prefix_cache"])
def test_what_we_replace_takes_what_the_stock_method_takes(name: str) -> None:
    assert parameters(getattr(ResilientScheduler, name)) == parameters(getattr(Scheduler, name))


@pytest.mark.parametrize(
    "attribute",
    [
        *("requests", "running", "waiting", "grammar_compile_error_reqs", "prev_step_scheduled_req_ids"),
        *("use_v2_model_runner", "kv_cache_manager", "vllm_config"),
    ],
)
def test_the_scheduler_has_the_state_that_we_change(attribute: str) -> None:
    assert f"self.{attribute}" in source_of(SCHEDULER, "Scheduler", "__init__"), "look at engine/scheduler.py"


@pytest.mark.parametrize(
    "counter",
    [
        *("num_computed_tokens", "num_in_flight_tokens", "num_stale_output_tokens", "drop_stale_output"),
        *("arrival_time", "num_prompt_tokens", "_all_token_ids"),
    ],
)
def test_a_request_has_the_counters_that_we_read(counter: str) -> None:
    assert counter in Request("r", [1], None, _pooling(), arrival_time=3.0).__dict__


def test_arrival_is_wall_clock_time() -> None:
    """Requests that wait for a donor are overdue by it."""
    assert "time.time()" in inspect.getsource(Request.__init__)


def test_requests_in_the_list_of_errors_fail_with_the_next_output() -> None:
    source = source_of(SCHEDULER, "Scheduler", "update_from_output")
    assert "grammar_compile_error_reqs" in source and "FINISHED_ERROR" in source


def test_dropped_output_is_skipped_before_it_is_looked_up() -> None:
    """Else an empty output in place of a lost one would be an error."""
    source = source_of(SCHEDULER, "Scheduler", "update_from_output")
    assert source.index("drop_stale_output") < source.index("req_id_to_index[")


def test_resumed_requests_are_new_ones_for_v2() -> None:
    source = source_of(SCHEDULER, "Scheduler", "schedule")
    assert "self.use_v2_model_runner" in source and "scheduled_new_reqs.extend(scheduled_resumed_reqs)" in source


def test_a_step_can_carry_the_stamp_that_it_was_scheduled_under() -> None:
    output = SchedulerOutput.make_empty()
    output.resilient_stamp = (1, 2)
    assert output.resilient_stamp == (1, 2)
    assert output.total_num_scheduled_tokens == 0


def test_preempting_frees_all_blocks_at_once() -> None:
    """A roll-back resets the prefix cache right after it."""
    assert "_free_request_blocks(request)" in source_of(SCHEDULER, "Scheduler", "_preempt_request")


def _pooling() -> object:
    from vllm import PoolingParams

    return PoolingParams()
