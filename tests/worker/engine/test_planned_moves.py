"""In a planned move requests go on as they are: with their blocks, and with nothing computed again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.worker.engine.replicated import ReplicatedRig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ALL = 1000


@pytest.fixture
def rig(vllm_config: VllmConfig) -> ReplicatedRig:
    return ReplicatedRig(vllm_config, pool_blocks=48)


def preemptions(rig: ReplicatedRig) -> int:
    return sum(request.num_preemptions for request in rig.scheduler.requests.values())


def move(rig: ReplicatedRig) -> None:
    rig.hold()
    rig.deliver(ALL)
    rig.move()


def move_back(rig: ReplicatedRig) -> None:
    rig.hold()
    rig.deliver(ALL)
    rig.swap_back()


def test_nothing_is_computed_again_there_or_back(rig: ReplicatedRig) -> None:
    for name in "abc":
        rig.ask(name, prompt_tokens=50, tokens=120)
    for change in (move, move_back, move, move_back):
        rig.run(steps=25)
        computed = sum(request.num_computed_tokens for request in rig.scheduler.requests.values())
        rig.pipeline.recomputed.clear()
        rig.pipeline.kept = 0
        change(rig)
        rig.schedule()
        assert rig.pipeline.recomputed == [0, 0, 0]
        assert rig.pipeline.kept >= computed
        assert preemptions(rig) == 0
    rig.run()
    rig.check()


def test_every_request_is_introduced_once_with_all_its_tokens_and_blocks(rig: ReplicatedRig) -> None:
    for name in "ab":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    move(rig)
    output = rig.scheduler.schedule()
    assert sorted(new.req_id for new in output.scheduled_new_reqs) == ["a", "b"]
    assert not output.scheduled_cached_reqs.req_ids
    for new in output.scheduled_new_reqs:
        assert new.prefill_token_ids == rig.prompts[new.req_id] + rig.streams[new.req_id]
        assert new.num_computed_tokens == len(new.prefill_token_ids) - 1
        assert len(new.block_ids[0]) == -(-len(new.prefill_token_ids) // rig.block_size)
        assert output.num_scheduled_tokens[new.req_id] == 1


def test_while_it_holds_what_is_in_flight_is_delivered_and_nothing_else_is_begun(rig: ReplicatedRig) -> None:
    for name in "ab":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    while rig.in_flight < 2:
        rig.schedule()
    before = sum(map(len, rig.streams.values()))
    flying = sum(request.num_in_flight_tokens for request in rig.scheduler.requests.values())
    rig.hold()
    assert sum(map(len, rig.streams.values())) == before + flying
    delivered = {name: list(stream) for name, stream in rig.streams.items()}
    rig.ask("late", prompt_tokens=20)
    rig.run(steps=20)
    assert rig.streams == delivered | {"late": []}
    move(rig)
    rig.run()
    rig.check()


@pytest.mark.parametrize("after", range(1, 8))
def test_a_prompt_that_is_half_computed_goes_along(rig: ReplicatedRig, after: int) -> None:
    """With chunks of 64 tokens, which share the budget with what others decode, so that they end within a block."""
    rig.ask("short", prompt_tokens=10, tokens=60)
    rig.run(steps=6)
    rig.ask("long", prompt_tokens=230, tokens=5)
    rig.run(steps=after)
    move(rig)
    rig.run()
    assert set(rig.pipeline.recomputed) <= {0}
    rig.check()


def test_a_move_that_is_called_off_changes_nothing(rig: ReplicatedRig) -> None:
    """The seal of an open block must not outlive it: else what is full later would pass for what it was then."""
    for name in "ab":
        rig.ask(name, prompt_tokens=50, tokens=100)
    rig.run(steps=20)
    rig.hold()
    rig.deliver(ALL)
    rig.call_off()
    rig.run(steps=20)
    assert not rig.pipeline.rolled
    rig.ask("same", prompt=[*rig.prompts["a"], *rig.streams["a"]][:64])
    rig.scheduler._tell_seals(0.0)
    rig.deliver(ALL)
    rig.lose_own()
    rig.run()
    assert max(rig.pipeline.recomputed) <= rig.block_size
    rig.check()


def test_who_lacks_something_there_is_stepped_back_alone(rig: ReplicatedRig) -> None:
    for name in "abc":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    rig.hold()
    rig.deliver(len(rig.pending) - 1)
    (missing,) = rig.pending
    rig.move()
    rig.schedule()
    (stepped_back,) = [r for r in rig.scheduler.requests.values() if r.num_preemptions]
    assert len(rig.pipeline.recomputed) == 3
    assert sorted(rig.pipeline.recomputed)[:2] == [0, 0]
    assert 0 < max(rig.pipeline.recomputed) <= rig.block_size
    assert missing.owner == rig.scheduler._cache._owners[stepped_back.request_id].number
    rig.run()
    rig.check()


@pytest.mark.parametrize("pool", [16, 20])
def test_more_than_the_donor_has_room_for_is_stepped_back(vllm_config: VllmConfig, pool: int) -> None:
    rig = ReplicatedRig(vllm_config, pool)
    for name in "abcd":
        rig.ask(name, prompt_tokens=100, tokens=40)
    rig.run(steps=30)
    move(rig)
    rig.schedule()
    assert preemptions(rig) > 0
    rig.run()
    rig.check()


def test_a_loss_in_the_middle_costs_what_is_not_kept_yet(rig: ReplicatedRig) -> None:
    for name in "ab":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    rig.scheduler._tell_seals(0.0)
    rig.deliver(ALL)
    rig.hold()
    rig.lose_own()
    rig.run()
    assert 0 < max(rig.pipeline.recomputed) <= rig.block_size
    rig.check()


def test_nobody_is_stepped_back_while_it_is_not_known_yet_what_the_newcomer_has(rig: ReplicatedRig) -> None:
    for name in "ab":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    rig.hold()
    rig.deliver(ALL)
    rig.move(stitched_later=True)
    rig.schedule()
    assert rig.pipeline.recomputed == [0, 0]
    assert [requests for _, requests in rig.pipeline.rolled] == [0, 2], "each counts once"
    rig.run()
    rig.check()


def test_a_request_that_is_aborted_while_it_holds_leaves_nothing(rig: ReplicatedRig) -> None:
    for name in "abc":
        rig.ask(name, prompt_tokens=50, tokens=60)
    rig.run(steps=20)
    rig.hold()
    rig.abort("a")
    rig.deliver(ALL)
    rig.move()
    rig.abort("b")
    rig.run()
    assert rig.pipeline.recomputed == [0]
    rig.check()


def test_prompt_logprobs_are_computed_from_the_beginning(rig: ReplicatedRig) -> None:
    """Those of the first chunks are in the runner that was left."""
    from vllm import SamplingParams

    params: dict[str, Any] = {"temperature": 0, "max_tokens": 5, "ignore_eos": True}
    rig.ask("long", prompt_tokens=230, tokens=5, sampling_params=SamplingParams(prompt_logprobs=1, **params))
    rig.ask("plain", prompt_tokens=10, tokens=60)
    rig.run(steps=3)
    move(rig)
    rig.schedule()
    assert rig.scheduler.requests["long"].num_preemptions == 1
    assert rig.scheduler.requests["plain"].num_preemptions == 0
    rig.run()
    rig.check()
