"""The condition ReplicationHealthy: what it says of every state of the engines, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_api.crd import Condition
from resilientllm_api.engine_state import EnginePhase, EngineState
from resilientllm_api.plan import StageId
from resilientllm_operator.actions import Announce
from resilientllm_operator.conditions import conditions
from resilientllm_operator.failure_domains import ranked_donors
from resilientllm_operator.instances import instance_statuses
from resilientllm_operator.replication import LAG_LIMIT_SECONDS, LAG_MENDED_SECONDS, lag_to_show, replication_healthy
from resilientllm_operator.world import World

from tests.operator.builders import (
    NOW,
    borrowed,
    condition,
    decided,
    engine_state,
    healthy_world,
    keeping,
    new_world,
    of_type,
    pod,
    settled,
    silent,
    stage,
    status_of,
    with_engine,
    with_place,
    with_pod,
    with_pods,
    with_spec,
)

NOTHING_SAID: dict[str, Any] = {"kept_by": None, "healthy": False}
RANKS = {**NOTHING_SAID, "supported": False, "message": "stages of 2 tensor-parallel ranks are not replicated yet"}


def everywhere(state: EngineState, **changes: Any) -> EngineState:
    for each in state.stages:
        state = with_place(state, each.stage, **changes)
    return state


def with_connections(state: EngineState, place: int, **changes: Any) -> EngineState:
    stages = tuple(each.model_copy(update=changes) if each.stage == place else each for each in state.stages)
    return state.model_copy(update={"stages": stages})


def alone(state: EngineState, place: int) -> EngineState:
    """No stage of another instance answers for the place."""
    return with_connections(with_place(state, place, **NOTHING_SAID, message="nobody"), place, donors_connected=0)


HEALTHY = engine_state(0)

CASES: dict[str, tuple[EngineState, str, str]] = {
    "all places are kept": (HEALTHY, "True", "Replicating"),
    "a lag below the limit": (with_place(HEALTHY, 1, lag_seconds=LAG_LIMIT_SECONDS), "True", "Replicating"),
    "a lag above the limit": (with_place(HEALTHY, 1, lag_seconds=LAG_LIMIT_SECONDS + 1), "False", "Lagging"),
    "a keeper that is not reached": (with_place(HEALTHY, 1, healthy=False), "False", "NotReplicating"),
    "nobody yet, though one lives": (with_place(HEALTHY, 1, **NOTHING_SAID, message="x"), "False", "NotReplicating"),
    "only the own stage lives": (alone(HEALTHY, 1), "False", "NoKeeper"),
    "a donor stands in, alone": (borrowed(0, 1, donor=1), "False", "NoKeeper"),
    "nobody serves the place": (
        with_connections(
            engine_state(0, phase=EnginePhase.WAITING, replication=()),
            1,
            own_connected=False,
            donors_connected=0,
            served_by=None,
        ),
        "False",
        "NoKeeper",
    ),
    "the same obstacle everywhere": (everywhere(HEALTHY, **RANKS), "False", "NotSupported"),
    "an obstacle outweighs a lost stage": (
        with_connections(everywhere(HEALTHY, **RANKS), 1, donors_connected=0),
        "False",
        "NotSupported",
    ),
    "a lost stage outweighs a lag": (with_place(alone(HEALTHY, 1), 0, lag_seconds=60.0), "False", "NoKeeper"),
    "a lag outweighs what is not known": (
        engine_state(0, replication=(keeping(0, 1, lag_seconds=60.0),)),
        "False",
        "Lagging",
    ),
    "an older plan without replication": (engine_state(0, replication=()), "Unknown", "EngineSilent"),
    "an engine that attaches": (
        engine_state(0, phase=EnginePhase.ATTACHING, replication=(), serving=False),
        "Unknown",
        "EngineSilent",
    ),
    "an engine that failed": (
        engine_state(0, phase=EnginePhase.FAILED, replication=(), serving=False),
        "Unknown",
        "EngineSilent",
    ),
    "the moment of a re-stitch": (engine_state(0, phase=EnginePhase.RECOVERING, replication=()), "True", "Replicating"),
}


def found(world: World) -> tuple[str, str, str]:
    return condition(world, "ReplicationHealthy")


@pytest.mark.parametrize(("state", "status", "reason"), CASES.values(), ids=CASES.keys())
class TestOneEngine:
    def test_decides_status_and_reason(self, state: EngineState, status: str, reason: str) -> None:
        assert found(with_engine(healthy_world(), 0, state))[:2] == (status, reason)

    def test_is_told_of_the_other_instance_alike(self, state: EngineState, status: str, reason: str) -> None:
        world = with_engine(with_engine(healthy_world(), 1, state), 0, HEALTHY)
        assert found(world)[:2] == (status, reason)

    def test_changes_no_other_condition(self, state: EngineState, status: str, reason: str) -> None:
        """Of what the engine says of its copies, none reaches Ready, Available, Degraded or Progressing."""

        def others(world: World) -> list[Condition]:
            found = conditions(world, instance_statuses(world, ranked_donors(world), NOW), [], NOW)
            return [each for each in found if each.type != "ReplicationHealthy"]

        without = state.model_copy(update={"replication": HEALTHY.replication})
        world = healthy_world()
        assert others(with_engine(world, 0, state)) == others(with_engine(world, 0, without))

    def test_is_decided_once(self, state: EngineState, status: str, reason: str) -> None:
        assert decided(settled(with_engine(healthy_world(), 0, state))) == []


class TestMessages:
    def test_name_the_lost_stage_its_pod_and_what_helps(self) -> None:
        world = with_pod(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1)), stage(0, 1), ready=False)
        _, _, message = found(world)
        lost = pod(world.object, stage(0, 1)).name
        assert "Fewer than two of the stages 0.1, 1.1 can be reached" in message
        assert f"0.1 is not ready (pod {lost})" in message
        assert "With spec.instances of 3 or more one lost stage leaves a keeper" in message

    def test_tell_a_lost_stage_once_though_both_instances_miss_it(self) -> None:
        world = with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))
        world = with_engine(world, 1, alone(engine_state(1), 1))
        assert found(world)[2].count("Fewer than two") == 1

    def test_name_both_ends_of_a_lag(self) -> None:
        world = with_engine(healthy_world(), 0, with_place(HEALTHY, 1, lag_seconds=9.0))
        _, _, message = found(world)
        for slot in (stage(0, 1), stage(1, 1)):
            each = pod(world.object, slot)
            assert f"stage {slot.stage_id} (pod {each.name} on node {each.node})" in message

    def test_give_the_engines_own_words_where_replication_is_not_supported(self) -> None:
        world = with_engine(healthy_world(), 0, everywhere(HEALTHY, **RANKS))
        assert "stages of 2 tensor-parallel ranks are not replicated yet" in found(world)[2]

    def test_name_the_silent_engine(self) -> None:
        status, reason, message = found(silent(healthy_world(), 0))
        assert (status, reason) == ("Unknown", "EngineSilent")
        assert "engine of instance 0 (tiny-0-engine-" in message

    def test_of_many_places_are_cut_short(self) -> None:
        world = healthy_world(stages=6)
        lagging = everywhere(engine_state(0, 6), lag_seconds=9.0)
        message = found(with_engine(world, 0, lagging))[2]
        assert message.count("Copies of place") == 3
        assert message.endswith("(and 3 more)")


class TestSpec:
    def test_mode_none_is_false_with_a_reason_of_its_own(self) -> None:
        status, reason, message = found(healthy_world(replication={"mode": "None"}))
        assert (status, reason) == ("False", "Disabled")
        assert "computed again from their tokens" in message

    def test_mode_none_is_no_warning(self) -> None:
        switched_off = with_spec(healthy_world(), replication={"mode": "None"})
        assert of_type(decided(switched_off), Announce) == []

    def test_one_instance_cannot_replicate_and_is_ready(self) -> None:
        world = healthy_world(instances=1)
        status, reason, message = found(world)
        assert (status, reason) == ("False", "NoKeeper")
        assert "set spec.instances to 2 or more" in message
        assert condition(world, "Ready")[0] == "True"

    def test_an_object_that_is_being_made_does_not_know_yet(self) -> None:
        assert found(new_world())[:2] == ("Unknown", "EngineSilent")
        assert of_type(decided(with_pods(new_world())), Announce) == []


class TestTransitions:
    def test_are_announced_once(self) -> None:
        lagging = with_engine(healthy_world(), 0, with_place(HEALTHY, 1, lag_seconds=9.0))
        (event,) = of_type(decided(lagging), Announce)
        assert (event.reason, event.warning) == ("ReplicationUnhealthy", True)
        assert "Copies of place 0.1" in event.note

        (event,) = of_type(decided(with_engine(settled(lagging), 0, HEALTHY)), Announce)
        assert (event.reason, event.warning) == ("ReplicationHealthy", False)

    def test_a_lag_about_the_limit_does_not_flap(self) -> None:
        world = settled(with_engine(healthy_world(), 0, with_place(HEALTHY, 1, lag_seconds=LAG_LIMIT_SECONDS + 1)))
        between = with_engine(world, 0, with_place(HEALTHY, 1, lag_seconds=LAG_LIMIT_SECONDS - 1))
        assert found(between)[1] == "Lagging"
        assert found(with_engine(world, 0, with_place(HEALTHY, 1, lag_seconds=LAG_MENDED_SECONDS)))[0] == "True"

    def test_a_new_operator_keeps_what_the_last_one_wrote(self) -> None:
        lagging = settled(with_engine(healthy_world(), 0, with_place(HEALTHY, 1, lag_seconds=9.0)))
        assert found(replace(lagging, engines={}))[:2] == ("False", "Lagging")
        assert decided(replace(lagging, engines={})) == []

    def test_but_not_of_another_spec(self) -> None:
        world = with_spec(healthy_world(replication={"mode": "None"}))
        assert found(replace(world, engines={}))[:2] == ("Unknown", "EngineSilent")


class TestStages:
    def test_show_who_keeps_their_blocks_and_how_far_behind(self) -> None:
        world = with_engine(healthy_world(), 0, with_place(HEALTHY, 1, lag_seconds=37.5))
        assert [(each.kept_by, each.lag_seconds) for each in status_of(world).instances[0].stages] == [
            ("1.0", 0),
            ("1.1", 32),
        ]

    def test_show_nothing_where_nobody_keeps_them(self) -> None:
        last = status_of(with_engine(healthy_world(), 0, borrowed(0, 1, donor=1))).instances[0].stages[1]
        assert (last.kept_by, last.lag_seconds) == (None, None)

    def test_of_a_silent_engine_stay_as_they_were_last_known(self) -> None:
        assert [each.kept_by for each in status_of(silent(healthy_world(), 0)).instances[0].stages] == ["1.0", "1.1"]

    @settings(deadline=None)
    @given(st.floats(0, 0.999), st.floats(0, 0.999))
    def test_the_status_is_not_written_for_a_lag_of_less_than_a_second(self, before: float, after: float) -> None:
        world = settled(with_engine(healthy_world(), 0, everywhere(HEALTHY, lag_seconds=before)))
        assert decided(with_engine(world, 0, everywhere(HEALTHY, lag_seconds=after))) == []

    @given(st.floats(0, 1e6))
    def test_a_lag_is_shown_by_at_most_half_too_small(self, lag_seconds: float) -> None:
        shown = lag_to_show(lag_seconds)
        assert shown.bit_count() <= 1
        assert shown <= lag_seconds < max(2 * shown, 1)


@settings(deadline=None)
@given(lags=st.lists(st.floats(0, 100), min_size=4, max_size=4))
def test_it_is_healthy_exactly_as_long_as_no_place_lags(lags: list[float]) -> None:
    world = healthy_world()
    for instance in (0, 1):
        state = engine_state(instance)
        for place in (0, 1):
            state = with_place(state, place, lag_seconds=lags[2 * instance + place])
        world = with_engine(world, instance, state)
    verdict = replication_healthy(world, world.object.status.instances)
    assert verdict.status is (max(lags) <= LAG_LIMIT_SECONDS)


def test_a_third_instance_keeps_the_blocks_of_a_borrowed_place() -> None:
    kept = with_connections(
        with_place(borrowed(0, 1, donor=1), 1, kept_by=StageId(instance=2, stage=1), healthy=True, message=""),
        1,
        donors_connected=2,
    )
    assert found(with_engine(healthy_world(instances=3), 0, kept))[:2] == ("True", "Replicating")
