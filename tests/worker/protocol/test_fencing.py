"""Nothing of an older topology, and no engine that was replaced, changes anything. And every rule is needed for it."""

from __future__ import annotations

import random
from functools import cache
from types import ModuleType
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from resilientllm_worker.protocol import fencing
from resilientllm_worker.protocol.messages import Stamp

from tests.worker.protocol.mutants import mutants
from tests.worker.protocol.world import Connection, Link, Play, Setting, Violation, World, begin

TWO_STAGES = ((0,), (1,))
WITH_DONOR = ((0,), (1, 2))
WITH_KEEPER = ((0, 1),)
"""One place, and two stages for it: each keeps the other's blocks."""

EXHAUSTIVE = {
    "two engines with two stages": Setting(TWO_STAGES, (1, 1), steps=1, endings=True),
    "two engines with a donor": Setting(WITH_DONOR, (1, 1), steps=1),
    "one engine with stages that restart": Setting(TWO_STAGES, (2,), steps=1, crashes=1),
    "one engine that stitches twice": Setting(TWO_STAGES, (2,), steps=1, endings=True),
    "replicas of two engines, of which one moves": Setting(WITH_KEEPER, (2, 1), replicates=True),
    "replicas while stages restart": Setting(WITH_KEEPER, (1, 1), replicates=True, crashes=1),
}
SMALL = (
    Setting(TWO_STAGES, (1,), steps=1, endings=True),
    Setting(TWO_STAGES, (1,), steps=2),
    Setting(WITH_KEEPER, (1, 1), replicates=True),
    Setting(WITH_KEEPER, (2,), replicates=True),
    Setting(TWO_STAGES, (1, 1), steps=1, one_term=True),
    Setting(TWO_STAGES, (2,), steps=1),
    Setting(TWO_STAGES, (1, 1), steps=1),
    Setting(TWO_STAGES, (2,), endings=True),
    Setting(WITH_KEEPER, (1, 1), replicates=True, endings=True),
)
"""Together they need every rule."""
MUTANTS = list(mutants())


def explore(setting: Setting, rules: Any = fencing) -> set[str]:
    """All worlds that there can be, breadth first. Returns what happened in any. Raises `Violation`."""
    play, start = Play(setting, rules), begin(setting, rules)
    seen, edge = {start}, [start]
    while edge:
        found: dict[World, None] = {}
        for world in edge:
            found.update((after, None) for _, after in play.moves(world) if after not in seen)
        seen.update(found)
        edge = list(found)
    return play.facts


@cache
def facts(setting: Setting) -> frozenset[str]:
    return frozenset(explore(setting))


@pytest.mark.parametrize("setting", EXHAUSTIVE.values(), ids=EXHAUSTIVE)
def test_whatever_happens_in_a_small_world_nothing_old_counts(setting: Setting) -> None:
    explore(setting)


def test_the_instance_is_served_and_its_blocks_are_kept() -> None:
    """A world in which nothing is obeyed would be as safe."""
    delivered = facts(Setting(TWO_STAGES, (1, 1), steps=1))
    assert {f"engine {engine} delivers step 0 of {Stamp(1 + engine, 1)} by (0, 1)" for engine in (0, 1)} <= delivered
    kept = facts(Setting(WITH_KEEPER, (2,), replicates=True))
    assert f"stage 1 stores for {Stamp(1, 1)}" in kept
    assert f"stage 1 is stitched by {Stamp(1, 2)} with seals of [0]" in kept


@pytest.mark.parametrize("rules", [module for _, module in MUTANTS], ids=[name for name, _ in MUTANTS])
def test_no_rule_can_be_left_out(rules: ModuleType) -> None:
    """Without it, something happens that must not, or cannot happen that must."""
    for setting in SMALL:
        try:
            if facts(setting) - explore(setting, rules):
                return
        except (Violation, AttributeError, LookupError, TypeError, ValueError):
            return
    pytest.fail("nobody would notice")


def test_two_engines_with_one_term_would_take_each_others_blocks_for_their_own() -> None:
    """Which is why a term is drawn from a clock of microseconds, above all that were seen."""
    with pytest.raises(Violation, match="numbered"):
        explore(Setting(WITH_KEEPER, (1, 1), replicates=True, one_term=True))


LARGER = (
    Setting(WITH_DONOR, (3, 2), steps=3, endings=True, crashes=2),
    Setting(((0, 1), (2, 3), (4,)), (2, 2, 2), steps=2, endings=True, crashes=1),
    Setting(((0, 1, 2),), (4, 3, 2), replicates=True, endings=True, crashes=1),
)


class LargerWorld(RuleBasedStateMachine):
    """Now and then something happens to it; in between, all do their work, in any order."""

    @initialize(setting=st.sampled_from(LARGER))
    def create(self, setting: Setting) -> None:
        self.play, self.world = Play(setting), begin(setting)

    def choose(self, choice: int, disturbs: bool) -> None:
        moves = [after for move, after in self.play.moves(self.world) if is_disturbance(move) is disturbs]
        changes = [after for after in moves if after != self.world]
        if changes:
            self.world = changes[choice % len(changes)]

    @rule(choice=st.integers(0, 1000))
    def disturb(self, choice: int) -> None:
        self.choose(choice, disturbs=True)

    @rule(moves=st.integers(5, 40), seed=st.integers(0, 2**32))
    def work(self, moves: int, seed: int) -> None:
        """By a seed: what hypothesis likes to draw rarely does all of what one token needs."""
        choices = random.Random(seed)
        for _ in range(moves):
            self.choose(choices.randrange(1000), disturbs=False)

    def teardown(self) -> None:
        for good in ("delivers", "stores"):
            if any(good in fact for fact in self.play.facts):
                event(good)


def is_disturbance(move: object) -> bool:
    """An engine stitches, a stage crashes, or a connection ends."""
    return isinstance(move, tuple) and (move[1] in ("stitches", "crashes") or isinstance(move[1], Connection | Link))


LargerWorld.TestCase.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
test_whatever_happens_in_a_larger_world_nothing_old_counts = LargerWorld.TestCase


@given(clock=st.integers(0, 2**60), seen=st.lists(st.integers(0, 2**60)))
def test_a_term_is_above_all_that_were_seen(clock: int, seen: list[int]) -> None:
    term = fencing.next_term(clock, seen)
    assert term >= clock
    assert all(term > each for each in (0, *seen))
