"""A stage is slow if it leaves both its history and its twins behind, for a while; and the figures say by how much."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from resilientllm_api.engine_state import Slowness
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.stragglers import HOLD_SECONDS, Watch, judge
from resilientllm_worker.protocol.messages import Pace
from resilientllm_worker.stage.pace import Steps

TICK = 0.1
OWN, TWIN, THIRD, OTHER_PLACE = (StageId.parse(name) for name in ("0.1", "1.1", "2.1", "1.0"))


def pace(ratio: float = 1.0, seconds: float = 0.02, steps: int = 0, size: int = 3) -> Pace:
    return Pace(steps, ratio, [(size, seconds)])


def after(
    seconds: float,
    own: Callable[[int], Pace],
    twins: Mapping[StageId, Pace],
    before: Mapping[StageId, Watch] | None = None,
) -> dict[StageId, Watch]:
    """The watches after so long, at every tick of which ``own`` gives the stage's pace."""
    watches, start = dict(before or {}), before[OWN].at if before else 0.0
    for tick in range(round(seconds / TICK)):
        watches = judge(watches, {OWN: own(tick)}, {OWN: own(tick), **twins}, start + (tick + 1) * TICK)
    return watches


def slow(watches: Mapping[StageId, Watch]) -> Slowness | None:
    return watches[OWN].slow


def test_one_that_leaves_its_history_and_its_twin_behind_is_said_to_be() -> None:
    watches = after(HOLD_SECONDS + 1, lambda tick: pace(2.2, steps=tick), {TWIN: pace()})
    assert slow(watches) == Slowness(history=2.2, twins=2.2)


def test_not_at_once() -> None:
    assert slow(after(HOLD_SECONDS - 1, lambda tick: pace(2.2, steps=tick), {TWIN: pace()})) is None


def test_not_if_all_are_slower_than_before() -> None:
    assert slow(after(60, lambda tick: pace(3.0, steps=tick), {TWIN: pace(2.8)})) is None


def test_not_if_it_has_always_been_slower_than_its_twin() -> None:
    assert slow(after(60, lambda tick: pace(1.0, seconds=0.08, steps=tick), {TWIN: pace()})) is None


def test_not_beside_the_fastest_of_several_but_beside_their_middle() -> None:
    fast, middle, slow_one = pace(seconds=0.005), pace(seconds=0.02), pace(seconds=0.03)
    fourth = StageId.parse("3.1")
    watches = after(
        60, lambda tick: pace(1.6, seconds=0.015, steps=tick), {TWIN: fast, THIRD: middle, fourth: slow_one}
    )
    assert slow(watches) is None


def test_not_without_a_twin_of_its_place_and_a_size_of_steps_that_both_have_had() -> None:
    assert slow(after(60, lambda tick: pace(5.0, steps=tick), {OTHER_PLACE: pace()})) is None
    assert slow(after(60, lambda tick: pace(5.0, steps=tick), {TWIN: pace(size=9)})) is None


def test_not_by_an_old_burst_of_one_that_is_idle_since() -> None:
    assert slow(after(600, lambda tick: pace(5.0, steps=min(tick, 20)), {TWIN: pace()})) is None


def test_an_engine_that_slept_has_not_seen_it_for_long() -> None:
    watches = judge({OWN: Watch(0.0, 0)}, {OWN: pace(5.0, steps=1)}, {TWIN: pace()}, now=3600.0)
    assert slow(watches) is None


def test_what_is_said_stands_until_it_has_caught_up_with_its_twin_for_a_while() -> None:
    watches = after(HOLD_SECONDS + 1, lambda tick: pace(2.2, steps=tick), {TWIN: pace()})
    wobbling = after(60, lambda tick: pace(1.4, steps=1000 + tick), {TWIN: pace()}, watches)
    assert slow(wobbling) == Slowness(history=2.2, twins=2.2)
    assert slow(after(HOLD_SECONDS + 1, lambda tick: pace(1.1, steps=9000 + tick), {TWIN: pace()}, wobbling)) is None


def test_half_an_hour_of_noise_is_no_straggler() -> None:
    """Steps that vary by half, now and then a long one, and a machine that is slower for all for minutes at a time."""
    chance = random.Random(7)
    stages, watches, alarms, now = {OWN: Steps(), TWIN: Steps()}, dict[StageId, Watch](), 0, 0.0
    shared = 1.0
    while now < 1800.0:
        if chance.random() < TICK / 90:
            shared = chance.uniform(0.7, 4.0)
        for steps in stages.values():
            for _ in range(2):
                size = 11 if chance.random() < 0.05 else 3
                long = chance.uniform(1, 30) if chance.random() < 0.02 else 1.0
                steps.observe(size, (1.0 if size == 11 else 0.03) * chance.uniform(0.5, 1.5) * long * shared)
        now += TICK
        paces = {name: found for name, steps in stages.items() if (found := steps.pace()) is not None}
        watches = judge(watches, {name: found for name, found in paces.items() if name == OWN}, paces, now)
        alarms += OWN in watches and watches[OWN].slow is not None
    assert alarms == 0
