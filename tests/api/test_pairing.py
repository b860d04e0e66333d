"""Who is paired with whom: compared with all pairings that there are, for few instances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilientllm_api.crd import MAX_INSTANCES
from resilientllm_api.pairing import NOWHERE, Donors, Location, donors_of, make_plans
from resilientllm_api.plan import Limits, ReplicationMode, StageId

Pairing = tuple[int, ...]
"""For every instance its stage's pair, at the only place of the pipeline."""


def ids(pairing: Pairing) -> dict[StageId, StageId]:
    return {StageId(instance=i, stage=0): StageId(instance=j, stage=0) for i, j in enumerate(pairing)}


def ranked(at: list[Location], before: Pairing = ()) -> list[list[int]]:
    """The donors of every instance."""
    locations = {StageId(instance=i, stage=0): location for i, location in enumerate(at)}
    donors = donors_of(len(at), 1, locations, ids(before))
    return [[donor.instance for donor in donors[StageId(instance=i, stage=0)]] for i in range(len(at))]


def paired(at: list[Location], before: Pairing = ()) -> Pairing:
    return tuple(donors[0] for donors in ranked(at, before))


def in_zones(zones: str) -> list[Location]:
    """Each on a host of its own; a dot is nowhere."""
    return [NOWHERE if zone == "." else Location(zone, f"host-{i}") for i, zone in enumerate(zones)]


def derangements(n: int) -> list[Pairing]:
    return [p for p in permutations(range(n)) if all(i != j for i, j in enumerate(p))]


def risks(at: list[Location], pairing: Pairing) -> tuple[int, int]:
    """How many pairs are in one failure domain, and how many on one host. All locations are known."""
    return (
        sum(at[i].domain == at[j].domain for i, j in enumerate(pairing)),
        sum(at[i].host == at[j].host for i, j in enumerate(pairing)),
    )


def changes(before: Pairing, after: Pairing) -> int:
    """How many stages of ``after`` have another pair than before, or had none."""
    return sum(i >= len(before) or before[i] != j for i, j in enumerate(after))


def somewhere(zones: str = "abc") -> st.SearchStrategy[Location]:
    """A host belongs to one zone."""
    return st.builds(lambda zone, number: Location(zone, f"{zone}{number}"), st.sampled_from(zones), st.integers(1, 2))


places = st.lists(somewhere(), min_size=2, max_size=6)


@given(places, st.data())
def test_no_pairing_is_better(at: list[Location], data: st.DataObject) -> None:
    everything = derangements(len(at))
    before = data.draw(st.sampled_from([(), *everything]))

    def badness(pairing: Pairing) -> tuple[object, ...]:
        distances = [(j - i - 1) % len(at) for i, j in enumerate(pairing)]
        return (*risks(at, pairing), changes(before, pairing), distances)

    assert paired(at, before) == min(everything, key=badness)


@given(st.lists(st.one_of(somewhere(), st.just(NOWHERE)), min_size=2, max_size=MAX_INSTANCES), st.data())
def test_every_stage_keeps_for_exactly_one_other(at: list[Location], data: st.DataObject) -> None:
    n = len(at)
    whatever = data.draw(st.lists(st.integers(0, n + 2), max_size=n + 2))
    pairing = paired(at, tuple(whatever))
    assert sorted(pairing) == list(range(n))
    assert all(i != j for i, j in enumerate(pairing))


@given(places)
def test_what_is_paired_stays_paired(at: list[Location]) -> None:
    pairing = paired(at)
    assert paired(at, pairing) == pairing


@given(places, st.data())
def test_a_stage_that_has_to_start_again_moves_no_pair(at: list[Location], data: st.DataObject) -> None:
    pairing = paired(at)
    lost = data.draw(st.sets(st.integers(0, len(at) - 1)))
    without = [NOWHERE if i in lost else location for i, location in enumerate(at)]
    assert paired(without, pairing) == pairing


@given(places, somewhere())
def test_one_more_instance_moves_one_pair_where_failure_domains_do_not_ask_for_more(
    at: list[Location], new: Location
) -> None:
    before = paired(at)
    grown = [*at, new]
    after = paired(grown, before)
    inserted = [(*before[:i], len(at), *before[i + 1 :], j) for i, j in enumerate(before)]
    if risks(grown, after) in [risks(grown, each) for each in inserted]:
        assert changes(before, after) == 2, "the new one's own pair, and that of one other"


@pytest.mark.parametrize("instances", range(2, MAX_INSTANCES))
def test_on_hosts_of_their_own_growing_and_shrinking_moves_one_pair(instances: int) -> None:
    def hosts(n: int) -> list[Location]:
        return [Location(f"host-{i}", f"host-{i}") for i in range(n)]

    small = paired(hosts(instances))
    large = paired(hosts(instances + 1), small)
    assert changes(small, large) == 2
    assert changes(large[:instances], paired(hosts(instances), large)) == 1


@given(places, st.data())
def test_a_stage_that_comes_back_in_another_zone_moves_as_few_pairs_as_possible(
    at: list[Location], data: st.DataObject
) -> None:
    before = paired(at)
    moved = list(at)
    moved[data.draw(st.integers(0, len(at) - 1))] = data.draw(somewhere())
    after = paired(moved, before)
    as_good = [each for each in derangements(len(at)) if risks(moved, each) == risks(moved, after)]
    assert changes(before, after) == min(changes(before, each) for each in as_good)


@given(st.lists(st.one_of(somewhere(), st.just(NOWHERE)), min_size=2, max_size=8))
def test_names_of_places_mean_nothing(at: list[Location]) -> None:
    def renamed(text: str | None) -> str | None:
        return None if text is None else text[::-1] + "!"

    assert ranked([Location(renamed(each.domain), renamed(each.host)) for each in at]) == ranked(at)


@pytest.mark.parametrize("instances", range(1, MAX_INSTANCES + 1))
def test_where_nothing_is_known_it_is_the_ring(instances: int) -> None:
    ring = [[(i + step) % instances for step in range(1, instances)] for i in range(instances)]
    assert ranked([NOWHERE] * instances) == ring


@pytest.mark.parametrize(
    ("zones", "before", "after"),
    [
        ("ab", (), (1, 0)),
        ("aa", (), (1, 0)),
        ("abab", (), (1, 2, 3, 0)),
        ("aabb", (), (2, 3, 0, 1)),
        ("aab", (), (1, 2, 0)),
        ("aab", (2, 0, 1), (2, 0, 1)),
        ("abb", (1, 0), (1, 2, 0)),
        ("ab.", (1, 0), (1, 2, 0)),
        ("aabc", (1, 2, 3, 0), (3, 2, 1, 0)),
    ],
)
def test_pairs(zones: str, before: Pairing, after: Pairing) -> None:
    assert paired(in_zones(zones), before) == after


@pytest.mark.parametrize(
    ("zones", "donors"),
    [
        ("abab", [1, 3, 2]),
        ("aabb", [2, 3, 1]),
        ("abac", [1, 3, 2]),
        ("aaab", [1, 3, 2]),
        ("aabbcc", [2, 4, 3, 5, 1]),
    ],
)
def test_further_donors_are_elsewhere_first_and_then_along_the_pairs(zones: str, donors: list[int]) -> None:
    assert ranked(in_zones(zones))[0] == donors


def test_in_one_domain_donors_on_other_hosts_come_first() -> None:
    at = [Location("a", "h1"), Location("a", "h2"), Location("a", "h1"), Location("a", "h3")]
    assert ranked(at)[0] == [1, 3, 2]


@given(places, st.data())
def test_after_a_loss_nobody_keeps_for_more_than_two(at: list[Location], data: st.DataObject) -> None:
    """What engines do: each takes the first of its donors that is there."""
    donors = ranked(at)
    lost = data.draw(st.integers(0, len(at) - 1))
    keepers = [next((each for each in row if each != lost), None) for i, row in enumerate(donors) if i != lost]
    assert max(Counter(keepers).values()) <= 2


def test_places_of_the_pipeline_are_paired_apart_from_each_other() -> None:
    zones = {0: "aabb", 1: "abab"}
    locations = {StageId(instance=i, stage=k): location for k in zones for i, location in enumerate(in_zones(zones[k]))}
    donors = donors_of(4, 2, locations)
    assert [pairs_at(donors, k) for k in range(2)] == [[2, 3, 0, 1], [1, 2, 3, 0]]


def pairs_at(donors: Donors, place: int) -> list[int]:
    return [ranks[0].instance for stage, ranks in donors.items() if stage.stage == place]


def addresses(instances: int, stages: int) -> Mapping[StageId, str]:
    return {StageId(instance=i, stage=k): f"10.0.{i}.{k}:7000" for i in range(instances) for k in range(stages)}


@pytest.mark.parametrize("mode", ReplicationMode)
def test_every_plan_says_whether_stages_keep_copies(mode: ReplicationMode) -> None:
    plans = make_plans("default/tiny", 1, 3, 2, addresses(3, 2), Limits(), mode)
    assert [plan.replication for plan in plans.values()] == [mode] * 3


def test_plans_name_donors_in_the_order_given_and_leave_out_those_without_an_address() -> None:
    donors = donors_of(3, 1, dict(zip(ids((0, 1, 2)), in_zones("aab"), strict=True)))
    known = {stage: address for stage, address in addresses(3, 1).items() if stage.instance != 1}
    plans = make_plans("default/tiny", 1, 3, 1, known, Limits(), donors=donors)
    assert {i: [[ref.id.instance for ref in row] for row in plan.donors] for i, plan in plans.items()} == {
        0: [[2]],
        2: [[0]],
    }


def test_stages_are_read_as_they_are_written() -> None:
    assert StageId.parse("1.10") == StageId(instance=1, stage=10)
    with pytest.raises(ValueError, match="invalid literal"):
        StageId.parse("1")
