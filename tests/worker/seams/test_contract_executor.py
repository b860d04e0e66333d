"""EngineCore gets what it asks its executor for, from stages that run nobody's code."""

from __future__ import annotations

import inspect
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from resilientllm_worker.engine.executor import ResilientExecutor
from resilientllm_worker.engine.pipeline import LOST_STEP
from resilientllm_worker.protocol.messages import KVAllocated, KVDescription, KVGroup, Stamp, Step, StepResult
from resilientllm_worker.seams.kv_cache_spec import encode_spec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from tests.worker.seams.builders import a_scheduler_output
from tests.worker.seams.test_contract_kv_cache import attention, of_engine, window
from tests.worker.seams.vllm_source import attributes_of, source_of

OURS = {name for name, value in vars(ResilientExecutor).items() if inspect.isfunction(value)}
ANSWERED_BY_STOCK = {
    # In terms of collective_rpc, which answers them:
    *("supported_tasks", "supports_draft_weight_updates", "reset_mm_cache", "reset_encoder_cache"),
    # Nothing is asked of stages:
    *("register_failure_callback", "is_sleeping", "init_kv_output_aggregator", "init_ec_output_aggregator"),
}
REFUSED = {
    # In terms of collective_rpc, which refuses them: nobody may call into a stage.
    *("add_lora", "remove_lora", "pin_lora", "list_loras", "sleep", "wake_up", "discard", "profile"),
    *("save_sharded_state", "execute_dummy_batch", "take_draft_token_ids", "get_kv_connector_handshake_metadata"),
}


class FakePipeline:
    """Runs a step at once, or loses it."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, Step]] = []
        self.lost = False
        self.allocated: object = None

    def allocate_kv(self, *order: Any) -> list[KVAllocated]:
        self.allocated = order
        return [KVAllocated(1, order[1], 8, 0.5, 0.0)]

    def open(self) -> None:
        pass

    def submit(self, stamp: Stamp, make: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.lost:
            future.set_result(LOST_STEP)
            return future
        last, others = make(stamp, len(self.steps))
        self.steps.append((last, others))
        requests = [request for request, _ in last.num_scheduled_tokens]
        future.set_result(StepResult(stamp, last.step, requests, [[7] for _ in requests], None, [], None))
        return future


@pytest.fixture
def executor() -> Any:
    """One whose stages have described themselves; nothing of it needs a socket."""
    executor = ResilientExecutor.__new__(ResilientExecutor)
    executor._pipeline = FakePipeline()  # type: ignore[assignment]
    executor._kept, executor._unsent_finished = None, []
    executor._descriptions = [
        KVDescription(1, [[(f"layer{stage}", encode_spec(attention()))]], [["LBHNC"]], [1000 + stage], ["generate"])
        for stage in range(2)
    ]
    return executor


def a_step(**changes: Any) -> SchedulerOutput:
    output = a_scheduler_output(**changes)
    output.resilient_stamp = Stamp(1, 1)
    return output


def test_every_abstract_method_is_there() -> None:
    assert not ResilientExecutor.__abstractmethods__, "Executor asks for more: look at engine/executor.py"


def test_engine_core_calls_nothing_that_was_not_looked_at() -> None:
    called = attributes_of("v1/engine/core.py", "self.model_executor", "model_executor")
    unknown = called - OURS - ANSWERED_BY_STOCK - REFUSED
    assert not unknown, f"EngineCore calls {sorted(unknown)} on its executor: answer or refuse it in engine/executor.py"
    assert {"execute_model", "sample_tokens", "initialize_from_config", "get_kv_cache_specs"} <= called


@pytest.mark.parametrize("name", sorted(OURS & set(vars(Executor))))
def test_what_is_replaced_takes_what_the_stock_method_takes(name: str) -> None:
    stock = list(inspect.signature(getattr(Executor, name)).parameters)
    ours = list(inspect.signature(getattr(ResilientExecutor, name)).parameters)
    assert ours == stock, f"Executor.{name} takes {stock} now"


def test_nothing_is_replaced_that_vllm_no_longer_has() -> None:
    replaced = {name for name in OURS if not name.startswith("_")}
    assert replaced <= set(dir(Executor)), f"Executor has no {sorted(replaced - set(dir(Executor)))} any more"


def test_the_constructor_still_calls_ours() -> None:
    assert "self._init_executor()" in source_of("v1/executor/abstract.py", "Executor", "__init__")


def test_engine_core_makes_the_executor_before_the_scheduler() -> None:
    """The scheduler looks for the pipeline at the meeting point."""
    source = source_of("v1/engine/core.py", "EngineCore", "__init__")
    assert source.index("self.model_executor = ") < source.index("self.scheduler")


@pytest.mark.parametrize("loop", ["step", "step_with_batch_queue"])
def test_engine_core_only_asks_a_step_for_its_result(loop: str) -> None:
    """`_Decoded` is a future in name only."""
    source = source_of("v1/engine/core.py", "EngineCore", loop)
    assert ".result()" in source
    for other in ("add_done_callback", ".exception(", ".cancel(", "wait("):
        assert other not in source, f"EngineCore.{loop} uses {other} on futures: look at engine/executor.py"


class TestAttaching:
    def test_answers_come_in_rank_order(self, executor: Any) -> None:
        assert [list(specs) for specs in executor.get_kv_cache_specs()] == [["layer0"], ["layer1"]]
        assert executor.get_kv_cache_specs()[0]["layer0"] == attention()
        assert executor.determine_available_memory() == [1000, 1001]
        assert executor.get_supported_kv_cache_layouts() == [["LBHNC"], ["LBHNC"]]

    def test_stages_get_the_groups_that_were_planned_for_all(
        self, executor: Any, vllm_config: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stages: list[dict[str, KVCacheSpec]] = [{"layer0": window(), "layer1": window()}, {"layer2": attention()}]
        executor.vllm_config = vllm_config
        monkeypatch.setattr(vllm_config.cache_config, "kv_cache_layout", "LBHNC")
        executor.set_kv_cache_layout("LBHNC")
        executor.initialize_from_config(of_engine(vllm_config, stages, blocks=96))
        sliding, full = encode_spec(window()), encode_spec(attention())
        assert executor._pipeline.allocated == (
            "LBHNC",
            96,
            {
                0: [KVGroup(["layer0"], sliding), KVGroup(["layer1"], sliding), KVGroup([], full)],
                1: [KVGroup([], sliding), KVGroup([], sliding), KVGroup(["layer2"], full)],
            },
        )

    def test_stock_methods_are_answered(self, executor: Any) -> None:
        assert executor.supported_tasks == ("generate",)
        assert not executor.supports_draft_weight_updates()
        executor.reset_mm_cache()
        executor.reset_encoder_cache()

    @pytest.mark.parametrize("method", ["sleep", "add_lora", "my_own_method", lambda worker: None])
    def test_nobody_calls_into_a_stage(self, executor: Any, method: Any) -> None:
        with pytest.raises(NotImplementedError, match="no remote calls"):
            executor.collective_rpc(method, None, (), None)


class TestSteps:
    def test_a_step_goes_out_with_its_sampling(self, executor: Any) -> None:
        assert executor.execute_model(a_step(), non_block=True).result() is None
        assert not executor._pipeline.steps
        result = executor.sample_tokens(None, non_block=True).result()
        assert isinstance(result, ModelRunnerOutput)
        assert (result.req_ids, result.sampled_token_ids) == (["c"], [[7]])

    def test_without_a_batch_queue_it_is_waited_for(self, executor: Any) -> None:
        assert executor.execute_model(a_step()) is None
        assert executor.sample_tokens(None).sampled_token_ids == [[7]]

    def test_a_lost_step_is_no_error(self, executor: Any) -> None:
        executor._pipeline.lost = True
        executor.execute_model(a_step(), non_block=True)
        assert executor.sample_tokens(None, non_block=True).result() is LOST_STEP

    def test_a_step_of_nothing_goes_nowhere(self, executor: Any) -> None:
        empty = SchedulerOutput.make_empty()
        assert executor.execute_model(empty, non_block=True).result() is EMPTY_MODEL_RUNNER_OUTPUT
        assert executor.execute_model(empty) is EMPTY_MODEL_RUNNER_OUTPUT
        assert not executor._pipeline.steps

    def test_what_a_step_of_nothing_finishes_is_told_with_the_next(self, executor: Any) -> None:
        empty = SchedulerOutput.make_empty()
        empty.finished_req_ids = {"gone"}
        executor.execute_model(empty, non_block=True)
        for finished in (["gone"], []):
            executor.execute_model(a_step(), non_block=True)
            executor.sample_tokens(None, non_block=True)
            assert executor._pipeline.steps[-1][0].finished == finished

    def test_only_the_last_stage_gets_the_grammar(self, executor: Any) -> None:
        import numpy as np

        grammar = SimpleNamespace(structured_output_request_ids=["c"], grammar_bitmask=np.ones((1, 4), dtype=np.int32))
        executor.execute_model(a_step(), non_block=True)
        executor.sample_tokens(grammar, non_block=True)
        last, others = executor._pipeline.steps[0]
        assert last.grammar is not None and others.grammar is None

    def test_sampling_without_a_step_is_an_error(self, executor: Any) -> None:
        with pytest.raises(RuntimeError, match="without execute_model"):
            executor.sample_tokens(None)
