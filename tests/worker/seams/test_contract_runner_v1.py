"""V1's runner gets requests that come back in the way it can take them, and its generators can be taken back."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from resilientllm_worker.seams.runner_v1 import RewindableGenerator, RunnerV1, put_in_order
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from tests.worker.seams.builders import a_new_request, a_scheduler_output
from tests.worker.seams.vllm_source import source_of

RUNNER = "v1/worker/gpu_model_runner.py"


def a_runner(*known: str) -> Any:
    batch = SimpleNamespace(
        req_id_to_index=dict.fromkeys(known), generators={}, req_ids=list(known), vocab_size=8, removed=[]
    )
    batch.remove_request = batch.removed.append
    return SimpleNamespace(requests=dict.fromkeys(known), input_batch=batch, device=torch.device("cpu"))


def back(request: str = "n", **changes: Any) -> Any:
    """A request that was stepped back after two tokens."""
    return a_new_request(request, prefill_token_ids=[11, 12, 13, 21, 22], **changes)


def test_a_fresh_request_is_passed_on() -> None:
    output = a_scheduler_output(a_new_request())
    prepared = RunnerV1().prepare(a_runner(), output)
    assert prepared.scheduled_new_reqs == output.scheduled_new_reqs
    assert prepared.finished_req_ids == set()


def test_a_request_that_was_stepped_back_before_its_first_token_is_finished_first() -> None:
    prepared = RunnerV1().prepare(a_runner("n"), a_scheduler_output(a_new_request()))
    assert prepared.finished_req_ids == {"n"}
    assert [new.req_id for new in prepared.scheduled_new_reqs] == ["n"]


def test_a_request_that_comes_back_with_output_resumes() -> None:
    runner = a_runner()
    prepared = RunnerV1().prepare(runner, a_scheduler_output(back(num_computed_tokens=2)))
    assert not prepared.scheduled_new_reqs
    cached = prepared.scheduled_cached_reqs
    assert cached.req_ids == ["c", "n"] and cached.resumed_req_ids == {"n"}
    assert cached.num_output_tokens == [4, 2] and cached.num_computed_tokens == [9, 2]
    assert cached.new_block_ids[1] == ([1, 2],)
    assert runner.requests["n"].output_token_ids == [21, 22]
    assert runner.requests["n"].prompt_token_ids == [11, 12, 13]


def test_its_old_row_is_given_up_and_it_is_not_finished() -> None:
    runner = a_runner("n")
    prepared = RunnerV1().prepare(runner, a_scheduler_output(back(), finished_req_ids={"n", "gone"}))
    assert runner.input_batch.removed == ["n"]
    assert prepared.finished_req_ids == {"gone"}


class TestRows:
    """Hidden states carry no names: sender and receiver must have the same order, whatever each of them ran before."""

    @pytest.mark.parametrize("before", [["a", "b", "c"], ["c", "a", "b"], ["b", "a", "c"], ["c", "b", "a"]])
    def test_are_in_the_order_of_the_step(self, before: list[str]) -> None:
        batch = a_batch(before)
        put_in_order(batch, {"a": 1, "b": 5, "c": 1})
        assert batch.req_ids == ["a", "b", "c"]
        assert [batch.token_ids_cpu[row, 0] for row in range(3)] == [ord("a"), ord("b"), ord("c")]

    def test_are_put_in_order_before_the_attention_backend_looks(self) -> None:
        batch = a_batch(["b", "a"])
        seen: list[list[str]] = []
        runner = SimpleNamespace(
            input_batch=batch,
            _may_reorder_batch=lambda output: seen.append(list(batch.req_ids)),
            intermediate_tensors=0,
        )
        with patch("vllm.distributed.parallel_state.get_pp_group", return_value=SimpleNamespace(is_first_rank=True)):
            RunnerV1().after_allocation(runner)
        runner._may_reorder_batch(SimpleNamespace(num_scheduled_tokens={"a": 1, "b": 1}))
        assert seen == [["a", "b"]]

    def test_are_foretold_only_if_no_attention_backend_wants_others_first(self) -> None:
        adapter = RunnerV1()
        assert adapter.row_order(None, {"b": 5, "a": 1}) == ["b", "a"]
        assert adapter.knows_rows(SimpleNamespace(reorder_batch_threshold=None))
        assert not adapter.knows_rows(SimpleNamespace(reorder_batch_threshold=1))
        source = source_of(RUNNER, "GPUModelRunner", "_may_reorder_batch")
        assert "if self.reorder_batch_threshold is not None" in source
        assert source.count("input_batch") == 1, "V1 reorders its batch for another reason too"

    def test_of_v1_on_a_cpu_are_foretold(self) -> None:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

        assert CPUAttentionMetadataBuilder.reorder_batch_threshold is None, "on a CPU, tenants take turns now"

    def test_are_all_there_when_v1_may_reorder_them_and_nothing_is_made_of_them_before(self) -> None:
        source = source_of(RUNNER, "GPUModelRunner", "_update_states")
        assert source.index("input_batch.condense()") < source.index("self._may_reorder_batch(scheduler_output)")
        assert source.index("self._may_reorder_batch(scheduler_output)") < source.index(
            "input_batch.refresh_metadata()"
        )


def a_batch(requests: list[str]) -> InputBatch:
    """V1's own, with rows in this order."""
    batch = InputBatch(
        max_num_reqs=4,
        max_model_len=8,
        max_num_batched_tokens=8,
        device=torch.device("cpu"),
        vocab_size=300,
        block_sizes=[4],
        max_num_blocks_per_req=[2],
    )
    for request in requests:
        batch.add_request(
            CachedRequestState(
                req_id=request,
                prompt_token_ids=[ord(request)],
                mm_features=[],
                sampling_params=SamplingParams(),
                generator=None,
                block_ids=([1],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
        )
    return batch


def test_lists_stay_parallel_when_no_tokens_are_sent() -> None:
    cached = CachedRequestData(["c"], set(), [], {}, [None], [9], [4])
    prepared = RunnerV1().prepare(a_runner(), a_scheduler_output(back(), scheduled_cached_reqs=cached))
    assert len(prepared.scheduled_cached_reqs.new_token_ids) == 2


def test_a_seeded_generator_stands_where_it_stood_after_the_same_draws() -> None:
    runner = a_runner()
    RunnerV1().prepare(runner, a_scheduler_output(back(sampling_params=SamplingParams(temperature=1.0, seed=5))))
    undisturbed = torch.Generator().manual_seed(5)
    for _ in range(2):
        torch.randint(0, 2**31, (1,), generator=undisturbed)
    assert torch.equal(runner.requests["n"].generator.get_state(), undisturbed.get_state())


def test_a_request_without_a_seed_has_no_generator() -> None:
    runner = a_runner()
    RunnerV1().prepare(runner, a_scheduler_output(back(sampling_params=SamplingParams(temperature=1.0))))
    assert runner.requests["n"].generator is None


class TestRewindableGenerators:
    def test_setting_the_offset_takes_back_all_draws_since_the_mark(self) -> None:
        generator = RewindableGenerator(torch.Generator().manual_seed(3))
        torch.randint(9, (5,), generator=generator)
        generator.mark()
        first = torch.randint(2**31, (4,), generator=generator)
        generator.set_offset(generator.get_offset() - 4)
        assert torch.equal(torch.randint(2**31, (4,), generator=generator), first)

    def test_they_go_on_where_the_original_stands(self) -> None:
        original = torch.Generator().manual_seed(3)
        torch.randint(9, (5,), generator=original)
        rewindable = RewindableGenerator(original)
        assert torch.equal(torch.randint(99, (4,), generator=rewindable), torch.randint(99, (4,), generator=original))

    def test_before_sampling_every_generator_of_the_batch_is_one_and_is_marked(self) -> None:
        runner = a_runner("a")
        runner.requests["a"] = SimpleNamespace(generator=None)
        runner.input_batch.generators[0] = torch.Generator().manual_seed(1)
        RunnerV1().before_sampling(runner)
        generator = runner.input_batch.generators[0]
        assert isinstance(generator, RewindableGenerator)
        assert runner.requests["a"].generator is generator
        drawn = torch.randint(99, (4,), generator=generator)
        generator.set_offset(0)
        assert torch.equal(torch.randint(99, (4,), generator=generator), drawn)

    def test_torch_still_needs_them(self) -> None:
        with pytest.raises(RuntimeError):
            torch.Generator().get_offset()

    def test_vllm_still_takes_draws_back_by_offset(self) -> None:
        source = source_of(RUNNER, "GPUModelRunner", "_bookkeeping_sync")
        assert "set_offset(" in source and "get_offset()" in source, "look at RewindableGenerator"


def test_the_state_that_is_installed_has_the_fields_that_vllm_wants() -> None:
    fields = {each.name for each in dataclasses.fields(CachedRequestState)}
    needed = {
        each.name
        for each in dataclasses.fields(CachedRequestState)
        if each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
    }
    given = {
        *("req_id", "prompt_token_ids", "mm_features", "sampling_params", "generator", "block_ids"),
        *("num_computed_tokens", "output_token_ids", "lora_request"),
    }
    assert needed <= given <= fields, f"CachedRequestState has changed: needs {needed}, has {fields}"


def test_the_batch_is_changed_by_the_names_that_vllm_knows() -> None:
    assert list(inspect.signature(InputBatch.remove_request).parameters) == ["self", "req_id"]
    constructor = inspect.getsource(InputBatch.__init__)
    assert "self.generators" in constructor and "self.req_id_to_index" in constructor


def test_vllm_reads_the_lists_that_are_filled() -> None:
    source = source_of(RUNNER, "GPUModelRunner", "_update_states")
    assert "resumed_req_ids" in source and "finished_req_ids" in source


def test_vllm_still_draws_once_for_every_token() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    assert "torch.randint(" in inspect.getsource(topk_topp_sampler), "look at _generator_after in seams/runner_v1.py"
