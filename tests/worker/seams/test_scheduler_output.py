"""What the scheduler says is what the runner hears, or the engine is told that it cannot be said."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import CachedRequests, Grammar, NewRequest, Step
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.seams.scheduler_output import decode_step, encode_step, send_anew, unsupported
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, SchedulerOutput

from tests.worker.seams.builders import STAMP, a_new_request, a_scheduler_output, over_the_wire

NOTHING = CachedRequests([], [], [], [], [])


def carried(
    output: SchedulerOutput, grammar: GrammarOutput | None = None
) -> tuple[SchedulerOutput, GrammarOutput | None]:
    assert unsupported(output) is None
    return decode_step(over_the_wire(encode_step(output, grammar, STAMP, 1)))


class TestSendingAnew:
    @pytest.mark.parametrize("tokens", [[[5], [6]], []], ids=["several stages", "one stage"])
    def test_a_running_request_becomes_a_new_one_with_what_the_step_says_of_it(self, tokens: list[list[int]]) -> None:
        cached = CachedRequestData(["c", "d"], set(), tokens, {}, [([7],), None], [9, 3], [4, 1])
        output = a_scheduler_output(scheduled_cached_reqs=cached, num_scheduled_tokens={"c": 1, "d": 1})
        send_anew(output, {"c": a_new_request("c", num_computed_tokens=10, block_ids=([1, 7],))})
        (new,) = output.scheduled_new_reqs
        assert (new.req_id, new.num_computed_tokens, new.block_ids) == ("c", 9, ([1, 7],))
        rest = CachedRequestData(["d"], set(), tokens[1:], {}, [None], [3], [1])
        assert output.scheduled_cached_reqs == rest
        assert list(carried(output)[0].num_scheduled_tokens) == ["c", "d"]

    def test_who_is_not_in_the_step_stays_out(self) -> None:
        output = a_scheduler_output()
        send_anew(output, {"x": a_new_request("x")})
        assert not output.scheduled_new_reqs
        assert output.scheduled_cached_reqs.req_ids == ["c"]


class TestAStep:
    def test_arrives_as_it_was(self) -> None:
        output = a_scheduler_output(
            a_new_request("n", num_computed_tokens=2),
            finished_req_ids={"f", "g"},
            preempted_req_ids={"p"},
            new_block_ids_to_zero=[1, 2],
            kv_cache_block_copies=[KVCacheBlockCopy(1, 2)],
        )
        found, grammar = carried(output)
        assert grammar is None
        assert found == output

    def test_keeps_the_batch_order(self) -> None:
        output = a_scheduler_output(*(a_new_request(name) for name in "zay"))
        assert list(carried(output)[0].num_scheduled_tokens) == ["z", "a", "y", "c"]

    def test_without_requests_still_says_who_has_finished(self) -> None:
        output = SchedulerOutput.make_empty()
        output.finished_req_ids = {"f"}
        found, _ = carried(output)
        assert found.finished_req_ids == {"f"} and found.total_num_scheduled_tokens == 0

    def test_of_one_stage_only_carries_no_sampled_tokens(self) -> None:
        output = a_scheduler_output()
        output.scheduled_cached_reqs.new_token_ids = []
        assert carried(output)[0] == output

    def test_carries_requests_that_got_no_blocks(self) -> None:
        output = a_scheduler_output()
        output.scheduled_cached_reqs.new_block_ids = [None]
        assert carried(output)[0].scheduled_cached_reqs.new_block_ids == [None]


class TestANewRequest:
    def test_that_is_fresh_travels_with_its_prompt_once(self) -> None:
        step = encode_step(a_scheduler_output(a_new_request()), None, STAMP, 1)
        assert step.new[0].prefill_token_ids is None
        (request,) = carried(a_scheduler_output(a_new_request()))[0].scheduled_new_reqs
        assert request.prefill_token_ids == request.prompt_token_ids == [11, 12, 13]

    def test_that_is_resumed_has_its_output_too(self) -> None:
        tokens = [11, 12, 13, 99]
        output = a_scheduler_output(a_new_request(prefill_token_ids=tokens))
        (request,) = carried(output)[0].scheduled_new_reqs
        assert request.prefill_token_ids == tokens and request.prompt_token_ids == tokens[:3]

    def test_is_a_snapshot_of_tokens_that_the_scheduler_goes_on_to_append_to(self) -> None:
        tokens = [11, 12, 13, 99]
        step = encode_step(a_scheduler_output(a_new_request(prefill_token_ids=tokens)), None, STAMP, 1)
        tokens.append(100)
        assert step.new[0].prefill_token_ids == [11, 12, 13, 99]

    @pytest.mark.parametrize(
        "params",
        [
            SamplingParams(),
            SamplingParams(temperature=0.0, max_tokens=7, min_tokens=2, ignore_eos=True),
            SamplingParams(seed=2**62, top_p=0.9, top_k=5, min_p=0.1, presence_penalty=0.5, frequency_penalty=0.1),
            SamplingParams(stop=["a", "ü"], stop_token_ids=[1, 2], bad_words=["x"], logit_bias={3: -1.5}),
            SamplingParams(logprobs=5, prompt_logprobs=2, allowed_token_ids=[1, 2], logprob_token_ids=None),
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="[ab]+")),
            SamplingParams(extra_args={"nested": [1, {"a": None}]}),
        ],
        ids=lambda params: str(params)[:60],
    )
    def test_keeps_its_sampling_parameters(self, params: SamplingParams) -> None:
        params.update_from_generation_config({"eos_token_id": [2, 5]}, eos_token_id=2)
        (request,) = carried(a_scheduler_output(a_new_request(sampling_params=params)))[0].scheduled_new_reqs
        assert request.sampling_params == params
        assert request.sampling_params.sampling_type == params.sampling_type
        assert request.sampling_params.all_stop_token_ids == params.all_stop_token_ids
        assert request.sampling_params.eos_token_id == params.eos_token_id


class TestAGrammar:
    def test_arrives_with_its_rows_in_order(self) -> None:
        bitmask = np.array([[-1, 5], [0, -(2**31)]], dtype=np.int32)
        _, grammar = carried(a_scheduler_output(), GrammarOutput(["c", "d"], bitmask, [0, 0]))
        assert grammar is not None
        assert grammar.structured_output_request_ids == ["c", "d"] and grammar.num_acceptable_drafts == [0, 0]
        assert grammar.grammar_bitmask.dtype == np.int32 and (grammar.grammar_bitmask == bitmask).all()

    def test_is_a_copy_of_memory_that_the_next_step_overwrites(self) -> None:
        bitmask = np.full((1, 2), 3, dtype=np.int32)
        step = encode_step(a_scheduler_output(), GrammarOutput(["c"], bitmask), STAMP, 1)
        bitmask[:] = 0
        assert step.grammar is not None and step.grammar.bitmask == np.full((1, 2), 3, dtype=np.int32).tobytes()

    @pytest.mark.filterwarnings("error")
    def test_can_become_a_tensor_without_a_warning(self) -> None:
        bitmask = np.zeros((1, 2), dtype=np.int32)
        _, grammar = carried(a_scheduler_output(), GrammarOutput(["c"], bitmask))
        assert grammar is not None
        torch.from_numpy(grammar.grammar_bitmask)

    def test_of_a_slice_of_a_larger_bitmask_has_its_rows_only(self) -> None:
        bitmask = np.arange(12, dtype=np.int32).reshape(3, 4)[::2]
        _, grammar = carried(a_scheduler_output(), GrammarOutput(["c", "d"], bitmask))
        assert grammar is not None and (grammar.grammar_bitmask == bitmask).all()


UNSUPPORTED_IN_BATCH: list[tuple[str, dict[str, Any]]] = [
    ("speculative", {"scheduled_spec_decode_tokens": {"c": [1]}}),
    ("speculative", {"num_invalid_spec_tokens": {"c": 1}}),
    ("speculative", {"num_spec_tokens_to_schedule": 2}),
    ("multimodal", {"scheduled_encoder_inputs": {"c": [0]}}),
    ("multimodal", {"free_encoder_mm_hashes": ["h"]}),
    ("KV connector", {"kv_connector_metadata": object()}),
    ("KV connector", {"has_sync_kv_loads": True}),
    ("encoder cache", {"ec_connector_metadata": object()}),
    ("encoder cache", {"ec_manager_metadata": object()}),
    ("auxiliary", {"aux_output_connector_metadata": object()}),
]
UNSUPPORTED_IN_REQUEST: list[tuple[str, dict[str, Any]]] = [
    ("multimodal", {"mm_features": [object()]}),
    ("pooling", {"pooling_params": object(), "sampling_params": None}),
    ("LoRA", {"lora_request": object()}),
    ("embeddings", {"prompt_embeds": torch.zeros(1), "prompt_token_ids": None}),
    ("embeddings", {"prompt_is_token_ids": [True, False]}),
    ("replay", {"replay_start": 16}),
    ("prompt_logprob_token_ids", {"sampling_params": SamplingParams(prompt_logprob_token_ids=[[1, 2]])}),
    ("no encoding", {"sampling_params": SamplingParams(extra_args={"x": object()})}),
]


class TestUnsupported:
    @pytest.mark.parametrize(("word", "changes"), UNSUPPORTED_IN_BATCH)
    def test_things_in_a_batch_are_named(self, word: str, changes: dict[str, Any]) -> None:
        assert word in str(unsupported(a_scheduler_output(**changes)))

    @pytest.mark.parametrize(("word", "changes"), UNSUPPORTED_IN_REQUEST)
    def test_things_in_a_request_are_named_with_it(self, word: str, changes: dict[str, Any]) -> None:
        found = str(unsupported(a_scheduler_output(a_new_request("odd", **changes))))
        assert word in found and "request odd" in found

    def test_resumed_requests_in_the_older_form_are_named_with_the_remedy(self) -> None:
        cached = CachedRequestData(["c"], {"c"}, [[5]], {"c": [1]}, [([7],)], [9], [4])
        assert "use_v2_model_runner" in str(unsupported(a_scheduler_output(scheduled_cached_reqs=cached)))

    def test_parameters_are_not_sent_in_part_either(self) -> None:
        output = a_scheduler_output(a_new_request(sampling_params=SamplingParams(extra_args={"x": object()})))
        with pytest.raises(Unsupported, match="request n"):
            encode_step(output, None, STAMP, 1)


def a_wire_step(**changes: Any) -> Step:
    fields: dict[str, Any] = {
        "stamp": STAMP,
        "step": 1,
        "new": [],
        "cached": NOTHING,
        "num_scheduled_tokens": [],
        "finished": [],
        "preempted": [],
        "zero_block_ids": [],
        "block_copies": [],
        "grammar": None,
    }
    return Step(**fields | changes)


@pytest.mark.parametrize(
    "step",
    [
        a_wire_step(cached=CachedRequests(["a"], [], [], [1], [1]), num_scheduled_tokens=[("a", 1)]),
        a_wire_step(cached=CachedRequests(["a", "b"], [[1]], [None] * 2, [1] * 2, [1] * 2)),
        a_wire_step(num_scheduled_tokens=[("a", 1)]),
        a_wire_step(cached=CachedRequests(["a"], [], [None], [1], [1]), num_scheduled_tokens=[("b", 1)]),
        a_wire_step(cached=CachedRequests(["a"], [], [None], [1], [1]), num_scheduled_tokens=[("a", 0)]),
        a_wire_step(cached=CachedRequests(["a"], [], [None], [1], [1]), num_scheduled_tokens=[("a", 1), ("a", 1)]),
        a_wire_step(grammar=Grammar(["a"], bytes(7), 2)),
        a_wire_step(grammar=Grammar(["a"], b"", 0)),
        a_wire_step(new=[NewRequest("a", [1], None, b"\xc1", ([1],), 0)], num_scheduled_tokens=[("a", 1)]),
        a_wire_step(new=[NewRequest("a", [1], None, b"\x81\xa1n\xa1x", ([1],), 0)], num_scheduled_tokens=[("a", 1)]),
    ],
)
def test_a_step_that_contradicts_itself_is_malformed(step: Step) -> None:
    with pytest.raises(Malformed):
        decode_step(step)


@given(
    params=st.binary(max_size=30),
    requests=st.lists(st.sampled_from("abc"), max_size=3),
    tokens=st.lists(st.tuples(st.sampled_from("abcn"), st.integers(-1, 3)), max_size=4),
    lengths=st.integers(0, 3),
    grammar=st.none()
    | st.builds(Grammar, st.lists(st.just("a"), max_size=2), st.binary(max_size=9), st.integers(-2, 3)),
)
@settings(max_examples=300, deadline=None)
def test_any_step_decodes_or_is_malformed(
    params: bytes, requests: list[str], tokens: list[tuple[str, int]], lengths: int, grammar: Grammar | None
) -> None:
    step = a_wire_step(
        new=[NewRequest("n", [1], None, params, ([1],), 0)],
        cached=CachedRequests(requests, [], [None] * lengths, [1] * lengths, [1] * len(requests)),
        num_scheduled_tokens=tokens,
        grammar=grammar,
    )
    try:
        output, _ = decode_step(step)
    except Malformed:
        return
    assert output.total_num_scheduled_tokens == sum(count for _, count in tokens)


class TestTheScheduler:
    """What vLLM's own scheduler fills in once `use_v2_model_runner` is set, whichever runner serves."""

    def made_by_vllm(self, *, async_scheduling: bool) -> CachedRequestData:
        from vllm.v1.core.sched.scheduler import Scheduler

        scheduler = SimpleNamespace(
            use_pp=True,
            use_v2_model_runner=True,
            scheduler_config=SimpleNamespace(async_scheduling=async_scheduling),
            prev_step_scheduled_req_ids=set(),
        )
        request = SimpleNamespace(
            request_id="a",
            all_token_ids=[11, 12, 13, 14],
            num_computed_tokens=3,
            num_output_tokens=1,
            num_output_placeholders=0,
        )
        blocks = SimpleNamespace(get_block_ids=lambda allow_none: None)
        return Scheduler._make_cached_request_data(scheduler, [request], [], {"a": 1}, {}, {"a": blocks})

    def test_sends_sampled_tokens_along_the_pipeline_when_it_schedules_in_step(self) -> None:
        assert self.made_by_vllm(async_scheduling=False).new_token_ids == [[14]]

    def test_sends_none_when_it_schedules_ahead(self) -> None:
        assert self.made_by_vllm(async_scheduling=True).new_token_ids == []

    @pytest.mark.parametrize("async_scheduling", [False, True])
    def test_never_sends_whole_token_lists_of_running_requests(self, async_scheduling: bool) -> None:
        cached = self.made_by_vllm(async_scheduling=async_scheduling)
        assert not cached.all_token_ids and not cached.resumed_req_ids
