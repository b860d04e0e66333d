"""Which stage serves which place: the own one, else the donor at work, else who keeps the copies, else the first."""

from collections.abc import Sequence

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
LEAVING = Sight(connected=True, has_kv=True, leaving=True)
LEAVING_BEHIND = Sight(connected=True, has_kv=True, caught_up=False, leaving=True)
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


def with_words(plan: Plan, leaving: Sequence[str], lost: Sequence[str]) -> Plan:
    return plan.model_copy(update={"leaving": tuple(map(stage, leaving)), "lost": tuple(map(stage, lost))})


def decide(
    current: list[str | None],
    instances: int = 3,
    keeping: list[str | None] | None = None,
    leaving: Sequence[str] = (),
    lost: Sequence[str] = (),
    **seen: Sight,
) -> list[str | None]:
    plan = with_words(a_plan(instances), leaving, lost)
    return who(assign(plan, everyone_but(plan, seen), these(current), NOW, these(keeping or [])))


def kept_by(
    current: list[str | None],
    instances: int = 3,
    keeping: list[str | None] | None = None,
    leaving: Sequence[str] = (),
    lost: Sequence[str] = (),
    **seen: Sight,
) -> list[str | None]:
    plan = with_words(a_plan(instances), leaving, lost)
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


sights = st.builds(
    Sight, st.booleans(), st.booleans(), st.sampled_from([0.0, NOW, NOW + 1]), st.booleans(), st.booleans()
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Plan, dict[StageId, Sight], Assignment]:
    plan = a_plan(draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    candidates = [
        [own.id, *(donor.id for donor in donors)] for own, donors in zip(plan.stages, plan.donors, strict=True)
    ]
    seen = {name: draw(sights) for place in candidates for name in place if draw(st.booleans())}
    current = tuple(draw(st.sampled_from([None, *place])) for place in candidates)
    everyone = [name for place in candidates for name in place]
    words = {word: tuple(name for name in everyone if draw(st.integers(0, 3)) == 0) for word in ("leaving", "lost")}
    return plan.model_copy(update=words), seen, draw(st.sampled_from([current, ()]))


def usable(plan: Plan, seen: dict[StageId, Sight], name: StageId | None) -> bool:
    return name is not None and name not in plan.lost and name in seen and seen[name].usable(NOW)


def leaves(plan: Plan, seen: dict[StageId, Sight], name: StageId) -> bool:
    return name in plan.leaving or seen[name].leaving


def candidates_of(plan: Plan, place: int) -> list[StageId]:
    return [plan.stages[place].id, *(donor.id for donor in plan.donors[place])]


@given(worlds())
def test_only_usable_stages_of_the_right_place_serve(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        if chosen is not None:
            assert usable(plan, seen, chosen)
            assert chosen.stage == place
            assert chosen == plan.stages[place].id or chosen.instance != plan.instance


@given(worlds())
def test_a_place_is_empty_only_if_nobody_could_serve_it(world: tuple[Plan, dict[StageId, Sight], Assignment]) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        assert (chosen is None) == (not any(usable(plan, seen, name) for name in candidates_of(plan, place)))


@given(worlds())
def test_one_that_leaves_serves_only_where_nobody_else_could_take_its_place(
    world: tuple[Plan, dict[StageId, Sight], Assignment],
) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        if chosen is None or not leaves(plan, seen, chosen):
            continue
        server = current[place] if current else None
        for name in candidates_of(plan, place):
            if usable(plan, seen, name) and not leaves(plan, seen, name):
                assert chosen == server and not seen[name].caught_up


@given(worlds())
def test_the_own_stage_comes_first_unless_it_leaves_or_is_behind_one_at_work(
    world: tuple[Plan, dict[StageId, Sight], Assignment],
) -> None:
    plan, seen, current = world
    for place, chosen in enumerate(assign(plan, seen, current, NOW)):
        own, server = plan.stages[place].id, current[place] if current else None
        if usable(plan, seen, own) and not leaves(plan, seen, own):
            behind = server != own and usable(plan, seen, server) and not seen[own].caught_up
            assert chosen == own or behind


@given(worlds())
def test_a_stage_at_work_is_left_only_for_one_that_has_caught_up(
    world: tuple[Plan, dict[StageId, Sight], Assignment],
) -> None:
    plan, seen, current = world
    for server, chosen in zip(current, assign(plan, seen, current, NOW), strict=False):
        if usable(plan, seen, server) and server in candidates_of(plan, server.stage if server else 0):
            assert chosen is not None
            assert chosen == server or seen[chosen].caught_up


@given(worlds())
def test_copies_are_kept_by_one_that_leaves_only_where_nobody_else_could(
    world: tuple[Plan, dict[StageId, Sight], Assignment],
) -> None:
    plan, seen, current = world
    assignment = assign(plan, seen, current, NOW)
    for place, keeper in enumerate(keepers(plan, seen, assignment, current, NOW)):
        others = [n for n in candidates_of(plan, place) if usable(plan, seen, n) and n != assignment[place]]
        assert keeper in (others if others and assignment[place] is not None else [None])
        if keeper is not None and leaves(plan, seen, keeper):
            assert all(leaves(plan, seen, name) for name in others)


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


class TestLeaving:
    """Stages that the plan names, or that say so themselves."""

    def test_a_donor_takes_the_place_of_an_own_stage_that_is_to_go(self) -> None:
        assert decide(HOME, leaving=["0.1"]) == ["0.0", "1.1"]
        assert decide(HOME, s0_1=LEAVING) == ["0.0", "1.1"]

    def test_the_own_stage_is_not_taken_back_while_it_leaves(self) -> None:
        assert decide(["0.0", "1.1"], s0_1=LEAVING) == ["0.0", "1.1"]

    def test_a_donor_that_leaves_as_well_is_passed_over(self) -> None:
        assert decide(HOME, leaving=["0.1", "1.1"]) == ["0.0", "2.1"]

    def test_a_donor_at_work_that_is_to_go_is_replaced_by_the_next(self) -> None:
        assert decide(["0.0", "1.1"], leaving=["1.1"], s0_1=GONE) == ["0.0", "2.1"]

    def test_who_keeps_the_copies_is_preferred(self) -> None:
        assert decide(HOME, keeping=["1.0", "2.1"], leaving=["0.1"]) == ["0.0", "2.1"]

    def test_a_donor_waits_until_it_has_caught_up(self) -> None:
        assert decide(HOME, leaving=["0.1"], s1_1=BEHIND, s2_1=BEHIND) == HOME
        assert decide(HOME, leaving=["0.1"], s1_1=BEHIND) == ["0.0", "2.1"]

    def test_but_not_once_the_stage_is_gone(self) -> None:
        assert decide(HOME, leaving=["0.1"], s0_1=GONE, s1_1=BEHIND, s2_1=BEHIND) == ["0.0", "1.1"]

    def test_where_nobody_else_can_serve_it_stays(self) -> None:
        assert decide(HOME, leaving=["0.1"], s1_1=GONE, s2_1=LOADING) == HOME

    def test_where_all_leave_nobody_moves(self) -> None:
        assert decide(HOME, leaving=["0.1", "1.1", "2.1"]) == HOME
        assert decide(["0.0", "1.1"], leaving=["0.1", "1.1", "2.1"]) == ["0.0", "1.1"]
        assert decide(["0.0", "1.1"], leaving=["0.1", "1.1", "2.1"], s1_1=GONE) == HOME

    def test_it_stands_in_where_it_is_the_only_one(self) -> None:
        assert decide(HOME, instances=2, s0_1=GONE, s1_1=LEAVING) == ["0.0", "1.1"]

    def test_copies_are_kept_by_somebody_else(self) -> None:
        assert kept_by(HOME, leaving=["1.1"]) == ["1.0", "2.1"]
        assert kept_by(HOME, keeping=["1.0", "1.1"], s1_1=LEAVING) == ["1.0", "2.1"]
        assert kept_by(["0.0", "1.1"], s0_1=LEAVING_BEHIND) == ["1.0", "2.1"]

    def test_but_by_it_where_there_is_nobody_else(self) -> None:
        assert kept_by(HOME, instances=2, leaving=["1.1"]) == ["1.0", "1.1"]


class TestLost:
    """Stages that the plan forbids, although they answer."""

    def test_a_donor_takes_their_place_whether_or_not_it_has_caught_up(self) -> None:
        assert decide(HOME, lost=["0.1"], s1_1=BEHIND) == ["0.0", "1.1"]

    def test_they_serve_nowhere_not_even_where_nobody_else_can(self) -> None:
        assert decide(HOME, instances=1, lost=["0.1"]) == ["0.0", None]
        assert decide(HOME, lost=["0.1", "1.1"], s2_1=LEAVING) == ["0.0", "2.1"]

    def test_they_keep_nothing(self) -> None:
        assert kept_by(HOME, lost=["1.1"]) == ["1.0", "2.1"]
        assert kept_by(HOME, instances=2, keeping=["1.0", "1.1"], lost=["1.1"]) == ["1.0", None]


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
