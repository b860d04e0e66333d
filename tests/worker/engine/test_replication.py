"""Requests go on from replicas: exactly what every stage has is kept, whatever happened before, and nothing leaks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.worker.engine.replicated import ReplicatedRig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@pytest.fixture
def rig(vllm_config: VllmConfig) -> ReplicatedRig:
    return ReplicatedRig(vllm_config, pool_blocks=48)


def test_only_the_open_block_is_computed_again_if_all_others_are_kept(rig: ReplicatedRig) -> None:
    for name in "abc":
        rig.ask(name, prompt_tokens=100, tokens=30)
    rig.run(steps=30)
    rig.scheduler._tell_seals(0.0)
    rig.deliver(1000)
    rig.lose_own()
    rig.run()
    assert len(rig.pipeline.recomputed) == 3
    assert max(rig.pipeline.recomputed) <= rig.block_size
    assert rig.pipeline.kept >= 3 * 96
    rig.check()


def test_what_was_not_delivered_is_computed_again(rig: ReplicatedRig) -> None:
    rig.ask("a", prompt_tokens=100, tokens=30)
    rig.run(steps=12)
    rig.scheduler._tell_seals(0.0)
    waiting = len(rig.pending)
    assert waiting > 4
    rig.deliver(waiting - 2)
    rig.lose_own()
    rig.run()
    (recomputed,) = rig.pipeline.recomputed
    assert 2 * rig.block_size <= recomputed <= 3 * rig.block_size
    rig.check()


def test_a_swap_back_computes_the_open_blocks_only(rig: ReplicatedRig) -> None:
    for name in "ab":
        rig.ask(name, prompt_tokens=60, tokens=80)
    rig.run(steps=20)
    rig.lose_own()
    rig.run(steps=20)
    rig.scheduler._tell_seals(0.0)
    rig.come_back()
    rig.deliver(1000)
    rig.pipeline.recomputed.clear()
    rig.swap_back()
    rig.run()
    assert len(rig.pipeline.recomputed) == 2
    assert max(rig.pipeline.recomputed) <= rig.block_size
    rig.check()


def test_what_is_of_no_use_is_forgotten(rig: ReplicatedRig) -> None:
    """The donor holds content of a block that the engine has handed out again since."""
    rig.ask("a", prompt_tokens=100, tokens=3)
    rig.run()
    rig.deliver(1000)
    assert len(rig.keeper.blocks.seals()) == 6
    rig.lose_own()
    rig.scheduler._cache._numbers[rig.keeper.blocks.seals()[-1][0].block] = 0  # handed out, and the step lost with it
    rig.ask("b", prompt_tokens=20, tokens=3)
    rig.run()
    assert len(rig.pipeline.forgotten) == 1
    rig.check()


def test_a_replica_of_what_was_in_a_block_before_is_not_used(rig: ReplicatedRig) -> None:
    for name in "abcd":
        rig.ask(name, prompt_tokens=150, tokens=20)
    rig.run()
    rig.deliver(1000)
    held = len(rig.keeper.blocks.seals())
    for name in "efgh":
        rig.ask(name, prompt_tokens=150, tokens=30)
    rig.run(steps=40)
    rig.scheduler._tell_seals(0.0)
    assert len(rig.keeper.blocks.seals()) == held, "nothing was told to the keeper since"
    assert len(rig.pending) > 8, "the same blocks were sealed with other content"
    rig.lose_own()
    rig.run()
    assert len(rig.pipeline.forgotten) >= len(rig.pipeline.recomputed)
    rig.check()


def test_nothing_is_sealed_while_the_plan_wants_no_copies(rig: ReplicatedRig) -> None:
    rig.pipeline.at = replace(rig.pipeline.at, replicates=False)
    rig.ask("a", prompt_tokens=100, tokens=60)
    rig.run(steps=12)
    rig.scheduler._tell_seals(0.0)
    assert not rig.pipeline.seals
    rig.pipeline.at = replace(rig.pipeline.at, replicates=True)
    rig.run(steps=10)
    rig.scheduler._tell_seals(0.0)
    assert len(rig.pipeline.seals) >= 6, "those that were full before are sealed as soon as they are wanted"
    rig.run()
    rig.check()


class Machine(RuleBasedStateMachine):
    """Requests come and go, blocks are sealed, sent, reused and dropped, and stages are lost at any moment."""

    config: VllmConfig

    @initialize(pool=st.sampled_from([16, 20, 47, 48, 60]), seed=st.integers(0, 1000))
    def start(self, pool: int, seed: int) -> None:
        self.rig = ReplicatedRig(self.config, pool, seed)
        self.asked = 0
        for _ in range(4):
            self.ask(100, 60, False)

    @precondition(lambda self: len(self.rig.scheduler.requests) < 7)
    @rule(prompt=st.integers(20, 130), tokens=st.integers(1, 70), shared=st.booleans())
    def ask(self, prompt: int, tokens: int, shared: bool) -> None:
        name = f"r{self.asked}"
        self.asked += 1
        head = list(range(100, 150)) if shared else []
        words = head + [self.rig.random.randrange(200) for _ in range(prompt)]
        self.rig.ask(name, tokens=tokens, prompt=words)

    @rule(steps=st.integers(1, 60), told=st.integers(1, 4), delivered=st.integers(0, 3))
    def work(self, steps: int, told: int, delivered: int) -> None:
        """``told``: stages hear of seals at every so many steps; ``delivered``: blocks that go out in each."""
        for step in range(steps):
            self.rig.run(steps=1)
            if step % told == 0:
                self.rig.scheduler._tell_seals(0.0)
            self.rig.deliver(delivered)

    @rule(count=st.integers(1, 40))
    def deliver(self, count: int) -> None:
        self.rig.deliver(count)

    @rule(which=st.randoms(use_true_random=False))
    def abort(self, which: object) -> None:
        if self.rig.scheduler.requests:
            self.rig.abort(which.choice(sorted(self.rig.scheduler.requests)))  # type: ignore[attr-defined]

    @precondition(lambda self: self.rig.stages[1] is self.rig.own)
    @rule(late=st.booleans())
    def lose_own(self, late: bool) -> None:
        self.rig.lose_own(late)

    @precondition(lambda self: self.rig.own is None)
    @rule()
    def come_back(self) -> None:
        self.rig.come_back()

    @precondition(lambda self: self.rig.own is not None and self.rig.stages[1] is self.rig.keeper)
    @rule()
    def swap_back(self) -> None:
        self.rig.swap_back()

    @precondition(lambda self: self.rig.own is not None)
    @rule(delivered=st.sampled_from([0, 3, 1000]))
    def hold(self, delivered: int) -> None:
        """Until a move, a loss or `call_off`, nothing is scheduled."""
        self.rig.hold()
        self.rig.deliver(delivered)

    @precondition(lambda self: self.rig.pipeline.at.hold)
    @rule()
    def call_off(self) -> None:
        self.rig.call_off()

    @precondition(lambda self: self.rig.stages[1] is self.rig.own)
    @rule(late=st.booleans())
    def move(self, late: bool) -> None:
        """Mostly after `hold`, but it may have taken too long."""
        self.rig.move(late)

    @precondition(lambda self: self.rig.stages[1] is self.rig.own)
    @rule()
    def lose_keeper(self) -> None:
        self.rig.lose_keeper()

    @invariant()
    def no_block_is_used_by_two(self) -> None:
        if not hasattr(self, "rig"):
            return
        pool = self.rig.scheduler.kv_cache_manager.block_pool
        free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
        owned: dict[int, int] = {}
        tables = self.rig.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
        for table in tables.values():
            for block in table:
                owned[block.block_id] = owned.get(block.block_id, 0) + 1
        for block in self.rig.scheduler._balloon:
            owned[block.block_id] = owned.get(block.block_id, 0) + 1
        assert not free & owned.keys()
        assert all(pool.blocks[block].ref_cnt == users for block, users in owned.items())
        assert len(free) + len(owned) == self.rig.blocks - 1, "KV blocks leaked"

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.call_off()
            self.rig.schedule()  # an idle engine notices a loss when it is asked again
            self.rig.run()
            self.rig.check()


def test_nothing_that_happens_gives_a_false_hit_or_a_leak(vllm_config: VllmConfig) -> None:
    machine = type("Machine", (Machine,), {"config": vllm_config})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
