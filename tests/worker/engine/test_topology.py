"""Which stage serves which place: the own one, else the donor at work, else who keeps the copies, else the first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, Plan, ReplicationMode, StageId
from resilientllm_worker.engine.topology import Assignment, Sight, assign, is_complete, is_home, keepers

NOW = 100.0
USABLE = Sight(connected=True, has_kv=True)
GONE = Sight(connected=False, has_kv=False)
LOADING = Sight(connected=True, has_kv=False)
BARRED = Sight(connected=True, has_kv=True, barred_until=NOW + 0.5)
BEHIND = Sight(connected=True, has_kv=True, caught_up=False)
BAR_IS_OVER = Sight(connected=True, has_kv=True, barred_until=NOW)


def stage(name: str) -> StageId:
    instance, _, place = name.partition(".")
    return StageId(instance=int(instance), stage=int(place))


def a_plan(instances: int = 3, stages: int = 2) -> Plan:
    """The plan of instance 0, whose donors are those of instance 1, then of instance 2."""
    addresses = {
        StageId(instance=i, stage=s): f"127.0.0.1:{1000 + 100 * i + s}" for i in range(instances) for s in range(stages)
    }
    return make_plans("test", 1, instances, stages, addresses, Limits())[0]


def who(assignment: Assignment) -> list[str | None]:
    return [None if each is None else str(each) for each in assignment]


def everyone_but(plan: Plan, seen: dict[str, Sight]) -> dict[StageId, Sight]:
    """``seen`` says what differs from "all usable", by names like ``s0_1`` for stage 0.1."""
    everyone = [ref.id for ref in plan.stages] + [ref.id for donors in plan.donors for ref in donors]
    return dict.fromkeys(everyone, USABLE) | {stage(name[1:].replace("_", ".")): sight for name, sight in seen.items()}


def these(names: list[str | None]) -> Assignment:
    return tuple(None if name is None else stage(name) for name in names)


def decide(
    current: list[str | None], instances: int = 3, keeping: list[str | None] | None = None, **seen: Sight
) -> list[str | None]:
    plan = a_plan(instances)
    return who(assign(plan, everyone_but(plan, seen), these(current), NOW, these(keeping or [])))


def kept_by(
    current: list[str | None], instances: int = 3, keeping: list[str | None] | None = None, **seen: Sight
) -> list[str | None]:
    plan = a_plan(instances)
    return who(keepers(plan, everyone_but(plan, seen), these(current), these(keeping or []), NOW))


HOME: list[str | None] = ["0.0", "0.1"]


@pytest.mark.parametrize("unusable", [GONE, LOADING, BARRED], ids=["gone", "loading", "barred"])
def test_the_first_donor_stands_in_for_a_stage_that_cannot_serve(unusable: Sight) -> None:
    assert decide(HOME, s0_1=unusable) == ["0.0", "1.1"]


@pytest.mark.parametrize("unusable", [GONE, LOADING, BARRED], ids=["gone", "loading", "barred"])
def test_the_next_donor_is_taken_when_the_first_cannot_serve(unusable: Sight) -> None:
    assert decide(HOME, s0_0=GONE, s1_0=unusable) == ["2.0", "0.1"]


def test_a_donor_at_work_stays_although_a_better_one_is_usable_again() -> None:
    assert decide(["0.0", "2.1"], s0_1=GONE) == ["0.0", "2.1"]


def test_the_own_stage_takes_its_place_back() -> None:
    assert decide(["0.0", "2.1"]) == HOME


def test_a_bar_ends() -> None:
    assert decide(["1.0", "0.1"], s0_0=BAR_IS_OVER) == HOME


def test_a_place_is_empty_when_nobody_can_serve_it() -> None:
    assert decide(HOME, instances=2, s0_0=GONE, s1_0=LOADING) == [None, "0.1"]


def test_two_lost_stages_are_replaced_at_once() -> None:
    assert decide(HOME, s0_0=GONE, s0_1=GONE) == ["1.0", "1.1"]


def test_a_donor_that_the_plan_does_not_know_any_more_is_not_kept() -> None:
    assert decide(["0.0", "2.1"], instances=2, s0_1=GONE, s2_1=USABLE) == ["0.0", "1.1"]


def test_complete_means_that_no_place_is_empty() -> None:
    assert is_complete((stage("0.0"), stage("1.1")))
    assert not is_complete((stage("0.0"), None))
    assert not is_complete(())


def test_home_means_own_stages_only() -> None:
    assert is_home(a_plan(), (stage("0.0"), stage("0.1")))
    assert not is_home(a_plan(), (stage("0.0"), stage("1.1")))


sights = st.builds(Sight, st.booleans(), st.booleans(), st.sampled_from([0.0, NOW, NOW + 1]))


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Plan, dict[StageId, Sight], Assignment]:
    plan = a_plan(draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    candidates = [
        [own.id, *(donor.id for donor in donors)] for own, donors in zip(plan.stages, plan.donors, strict=True)
    ]
    seen = {name: draw(sights) for place in candidates for name in place if draw(st.booleans())}
    current = tuple(draw(st.sampled_from([None, *place])) for place in candidates)
    return plan, seen, draw(st.sampled_from([current, ()]))


def usable(seen: dict[StageId, Sight], name: StageId) -> bool:
    return name in seen and seen[name].usable(NOW)


@given(worlds())
def test_only_usable_stages_of_the_right_place_serve(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        if chosen is not None:
            assert usable(seen, chosen)
            assert chosen.stage == place
            assert chosen == plan.stages[place].id or chosen.instance != plan.instance


@given(worlds())
def test_a_place_is_empty_only_if_nobody_could_serve_it(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        candidates = [plan.stages[place].id, *(donor.id for donor in plan.donors[place])]
        assert (chosen is None) == (not any(usable(seen, name) for name in candidates))


@given(worlds())
def test_the_own_stage_always_comes_first(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    for own, chosen in zip(plan.stages, assign(plan, seen, current, NOW), strict=True):
        assert (chosen == own.id) == usable(seen, own.id)


@given(worlds())
def test_deciding_again_changes_nothing(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    once = assign(plan, seen, current, NOW)
    assert assign(plan, seen, once, NOW) == once


class TestWithCopies:
    def test_the_stage_that_keeps_them_stands_in(self) -> None:
        assert decide(HOME, keeping=["1.0", "2.1"], s0_1=GONE) == ["0.0", "2.1"]

    def test_but_not_before_a_donor_at_work(self) -> None:
        assert decide(["0.0", "1.1"], keeping=["1.0", "2.1"], s0_1=GONE) == ["0.0", "1.1"]

    def test_an_own_stage_waits_until_it_has_caught_up(self) -> None:
        assert decide(["0.0", "1.1"], s0_1=BEHIND) == ["0.0", "1.1"]
        assert decide(["0.0", "1.1"]) == HOME

    def test_an_own_stage_does_not_wait_when_no_donor_serves(self) -> None:
        assert decide(["0.0", None], s0_1=BEHIND) == HOME
        assert decide(["0.0", "1.1"], s0_1=BEHIND, s1_1=GONE) == HOME


class TestKeepers:
    def test_are_the_first_donors(self) -> None:
        assert kept_by(HOME) == ["1.0", "1.1"]

    def test_stay_although_a_better_one_is_usable_again(self) -> None:
        assert kept_by(HOME, keeping=["1.0", "2.1"]) == ["1.0", "2.1"]

    def test_are_replaced_when_they_are_gone(self) -> None:
        assert kept_by(HOME, keeping=["1.0", "1.1"], s1_1=GONE) == ["1.0", "2.1"]

    def test_of_a_donors_blocks_is_the_next_donor_until_the_own_stage_is_there(self) -> None:
        assert kept_by(["0.0", "1.1"], s0_1=GONE) == ["1.0", "2.1"]
        assert kept_by(["0.0", "1.1"], keeping=["1.0", "2.1"], s0_1=BEHIND) == ["1.0", "0.1"]

    def test_there_is_none_where_nobody_else_lives(self) -> None:
        assert kept_by(["0.0", "1.1"], instances=2, s0_1=GONE) == ["1.0", None]
        assert kept_by(HOME, instances=1) == [None, None]

    def test_there_is_none_for_a_place_that_nobody_serves(self) -> None:
        assert kept_by(["0.0", None], s0_1=GONE) == ["1.0", None]

    def test_there_is_none_if_the_plan_wants_none(self) -> None:
        plan = a_plan().model_copy(update={"replication": ReplicationMode.NONE})
        assert who(keepers(plan, everyone_but(plan, {}), these(HOME), (), NOW)) == [None, None]
