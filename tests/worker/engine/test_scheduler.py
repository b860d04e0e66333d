"""After a loss every request goes on from the last token that its client got: none twice, none skipped or changed."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from resilientllm_worker.engine.pipeline import Boundary
from resilientllm_worker.protocol.messages import Stamp

from tests.worker.engine.scheduling import Rig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@pytest.fixture
def rig(vllm_config: VllmConfig) -> Rig:
    return Rig(vllm_config)


def test_undisturbed_streams_are_what_the_model_computes(rig: Rig) -> None:
    for name in "abc":
        rig.ask(name, tokens=10)
    rig.run()
    assert set(rig.ends.values()) == {"length"}
    rig.check()


def test_resumed_requests_are_sent_as_new_with_all_their_tokens(rig: Rig) -> None:
    rig.ask("a", tokens=10)
    rig.run(steps=9)
    delivered = len(rig.streams["a"])
    assert 0 < delivered < 10
    rig.lose()
    output = rig.scheduler.schedule()
    (new,) = output.scheduled_new_reqs
    assert new.prefill_token_ids == rig.prompts["a"] + rig.streams["a"]
    assert new.num_computed_tokens == 0
    assert not output.scheduled_cached_reqs.resumed_req_ids


@pytest.mark.parametrize("after", range(1, 14))
def test_a_loss_at_any_time_changes_no_stream(rig: Rig, after: int) -> None:
    rig.ask("a", prompt_tokens=100, tokens=6)  # two chunks
    rig.ask("b", prompt_tokens=3, tokens=6)
    rig.run(steps=after)
    rig.lose()
    rig.run()
    assert rig.ends == {"a": "length", "b": "length"}
    rig.check()


def test_steps_in_flight_at_the_loss_deliver_nothing(rig: Rig) -> None:
    rig.ask("a", tokens=8)
    rig.ask("b", tokens=8)
    rig.run(steps=6)
    while rig.in_flight < 2:
        rig.schedule()
    before = {name: list(stream) for name, stream in rig.streams.items()}
    rig.lose()
    rig.complete()
    rig.complete()
    assert rig.streams == before
    rig.run()
    rig.check()


def test_a_result_that_came_before_the_loss_but_is_looked_at_later_is_computed_again(rig: Rig) -> None:
    rig.ask("a", tokens=8)
    rig.run(steps=4)
    rig.schedule()
    result = rig._flying[-1]
    rig.lose()
    rig._flying[-1] = result
    rig.schedule()  # rolls back while a good result of the old topology waits in the queue
    rig.run()
    rig.check()


def test_several_losses_in_a_row_change_no_stream(rig: Rig) -> None:
    for name in "abcd":
        rig.ask(name, prompt_tokens=40, tokens=12)
    for _ in range(6):
        rig.run(steps=5)
        rig.lose()
    rig.run()
    assert set(rig.ends.values()) == {"length"}
    rig.check()


def test_the_loss_of_everything_while_idle_is_harmless(rig: Rig) -> None:
    rig.ask("a")
    rig.run()
    rig.lose()
    rig.ask("b", prompt=rig.prompts["a"])  # would hit the prefix cache
    rig.run()
    rig.check()


def test_the_prefix_cache_is_of_use_again_after_a_loss(rig: Rig) -> None:
    rig.ask("a", prompt_tokens=48)
    rig.run()
    rig.lose()
    rig.ask("b", prompt=rig.prompts["a"])
    rig.run()
    rig.ask("c", prompt=rig.prompts["a"])
    assert rig.scheduler.schedule().scheduled_new_reqs[0].num_computed_tokens == 32


def test_an_ordinary_preemption_in_flight_at_the_loss_is_dropped_too(rig: Rig) -> None:
    """Its output counts as deliverable for stock vLLM, which would look it up in a result that is none."""
    for group in ("abc", "def"):  # two batches that take turns
        for name in group:
            rig.ask(name, prompt_tokens=10, tokens=140)
        rig.schedule()
    preempted = False
    while rig.scheduler.has_requests():
        rig.step()
        stale = [r for r in rig.scheduler.requests.values() if r.num_stale_output_tokens and not r.drop_stale_output]
        if stale:
            preempted = True
            rig.lose()
            break
    assert preempted, "the KV cache was too large for this test"
    rig.run()
    assert set(rig.ends.values()) == {"length"}
    rig.check()


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_request_that_is_aborted_around_the_loss_leaves_nothing(rig: Rig, when: str) -> None:
    rig.ask("a", tokens=20)
    rig.ask("b", tokens=20)
    rig.run(steps=7)
    if when == "before":
        rig.abort("a")
    rig.lose()
    if when == "between":
        rig.abort("a")
        rig.step()
    else:
        rig.step()
    if when == "after":
        rig.abort("a")
    rig.run()
    assert rig.ends == {"a": "abort", "b": "length"}
    rig.check()


def test_rolling_back_is_told_to_the_pipeline(rig: Rig) -> None:
    rig.ask("a", prompt_tokens=30, tokens=20)
    rig.run(steps=8)
    rig.lose()
    rig.scheduler.schedule()
    assert rig.pipeline.rolled == [(Stamp(1, 2), 1)]
    (tokens,) = rig.pipeline.recomputed
    assert 30 <= tokens < 30 + 20


class TestSmallerDonors:
    def test_no_more_blocks_are_used_than_the_donor_has(self, rig: Rig) -> None:
        for name in "abcde":
            rig.ask(name, prompt_tokens=60, tokens=30)
        rig.run(steps=6)
        rig.lose(capacity=16)
        rig.run()  # the rig counts the blocks
        assert set(rig.ends.values()) == {"length"}
        rig.check()

    def test_all_blocks_are_back_when_the_own_stage_is(self, rig: Rig) -> None:
        rig.ask("a", prompt_tokens=60, tokens=30)
        rig.run(steps=4)
        rig.lose(capacity=16)
        rig.run(steps=8)
        assert rig.free_blocks < 17
        rig.lose()
        rig.run()
        rig.check()
        assert rig.free_blocks == rig.blocks - 1

    def test_a_limit_that_comes_only_with_the_stitch_holds(self, rig: Rig) -> None:
        """The engine may look between the fence and the stitch of one epoch."""
        rig.ask("a", prompt_tokens=60, tokens=20)
        rig.run(steps=4)
        rig.lose(stitched=False)
        rig.run(steps=3)
        at = rig.pipeline.at
        rig.pipeline.at = replace(at, stitched=True, capacity_blocks=16, waiting_seconds=0.0)
        rig.run()
        rig.check()

    def test_the_same_blocks_stay_out_of_use_when_the_prefix_cache_is_reset(self, rig: Rig) -> None:
        rig.lose(capacity=16)
        rig.ask("a", prompt_tokens=60, tokens=4)
        rig.run()
        kept = {block.block_id for block in rig.scheduler._balloon}
        assert rig.scheduler.reset_prefix_cache()
        assert {block.block_id for block in rig.scheduler._balloon} == kept
        rig.runner.content.clear()
        for name in "bcd":
            rig.ask(name, prompt_tokens=60, tokens=4)
        rig.run()
        rig.check()

    def test_a_reset_that_fails_keeps_them_too(self, rig: Rig) -> None:
        rig.lose(capacity=16)
        rig.ask("a", prompt_tokens=60, tokens=9)
        rig.run(steps=3)
        assert not rig.scheduler.reset_prefix_cache()
        rig.run()
        rig.check()


class TestWithoutAPipeline:
    def test_nothing_is_scheduled_and_requests_wait(self, rig: Rig) -> None:
        rig.ask("a", tokens=8)
        rig.run(steps=5)
        rig.lose(stitched=False)
        rig.run(steps=10)
        assert rig.scheduler.requests.keys() == {"a"}
        assert rig.pipeline.load == (0, 1)
        rig.lose()
        rig.run()
        assert rig.ends == {"a": "length"}
        rig.check()

    def test_requests_fail_explicitly_when_they_have_waited_long_enough(self, rig: Rig) -> None:
        rig.ask("old", tokens=8, arrival_time=time.time() - 100)
        rig.ask("new", tokens=8)
        rig.run(steps=5)
        rig.lose(stitched=False)
        rig.pipeline.at = Boundary(rig.pipeline.at.stamp, False, 0, waiting_seconds=31.0)
        rig.run(steps=6)
        assert rig.ends == {"old": "error"}
        assert rig.pipeline.failures == 1
        assert rig.scheduler.requests.keys() == {"new"}
        rig.lose()
        rig.run()
        assert rig.ends == {"old": "error", "new": "length"}
        rig.check()

    def test_nobody_fails_before(self, rig: Rig) -> None:
        rig.ask("old", arrival_time=time.time() - 100)
        rig.lose(stitched=False)
        rig.pipeline.at = Boundary(rig.pipeline.at.stamp, False, 0, waiting_seconds=29.0)
        rig.run(steps=6)
        assert not rig.ends

    def test_a_request_that_comes_meanwhile_is_served_later(self, rig: Rig) -> None:
        rig.lose(stitched=False)
        rig.ask("a")
        rig.run(steps=4)
        rig.lose()
        rig.run()
        rig.check()


class TestUnsupportedRequests:
    @pytest.mark.parametrize(
        "unsupported",
        [{"resumable": True}, {"lora_request": object()}, {"mm_features": [object()]}],
        ids=["streaming input", "LoRA", "multimodal"],
    )
    def test_they_fail_alone_and_before_they_reach_a_stage(self, rig: Rig, unsupported: dict[str, Any]) -> None:
        rig.ask("fine", tokens=12)
        rig.run(steps=3)
        rig.scheduler.add_request(_unsupported(rig, **unsupported))
        rig.streams["odd"] = []
        rig.prompts["odd"], rig.wanted["odd"] = [1], 1
        rig.run()
        assert rig.ends == {"fine": "length", "odd": "error"}
        assert "odd" not in rig.runner.tokens
        rig.check()

    def test_parameters_that_have_no_encoding_are_found_when_the_request_comes(self, rig: Rig) -> None:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=3, extra_args={"what": object()})
        rig.ask("odd", tokens=3, sampling_params=params)
        rig.ask("fine", tokens=3)
        rig.run()
        assert rig.ends == {"fine": "length", "odd": "error"}
        rig.check()


@pytest.mark.parametrize("seed", range(12))
def test_no_sequence_of_events_changes_a_stream_or_leaks_a_block(vllm_config: VllmConfig, seed: int) -> None:
    rig, chance = Rig(vllm_config, seed), random.Random(seed)
    asked = 0
    for _ in range(400):
        what = chance.random()
        if what < 0.12 and asked < 40:
            rig.ask(f"r{asked}", prompt_tokens=chance.randrange(1, 120), tokens=chance.randrange(1, 40))
            asked += 1
        elif what < 0.16:
            rig.lose(capacity=chance.choice([None, 16, 20, 47]), stitched=chance.random() < 0.7)
        elif what < 0.20 and rig.scheduler.requests:
            rig.abort(chance.choice(sorted(rig.scheduler.requests)))
        elif rig.scheduler.has_requests() and rig.in_flight < 2:
            rig.schedule()
        elif rig.in_flight:
            rig.complete()
    rig.lose()
    rig.run()
    rig.check()


def _unsupported(rig: Rig, **what: Any) -> Any:
    from vllm import SamplingParams
    from vllm.v1.request import Request

    features = what.pop("mm_features", None)
    request = Request("odd", [1, 2, 3], SamplingParams(max_tokens=1), None, block_hasher=rig._hasher)
    for name, value in what.items():
        setattr(request, name, value)
    if features is not None:
        request.mm_features = features
    return request
