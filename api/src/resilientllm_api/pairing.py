"""Who stands in for whom, and the plans that say so. Pure functions, used by the operator and by local mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resilientllm_api.crd import HOSTNAME
from resilientllm_api.plan import Limits, Plan, ReplicationMode, StageId, StageRef

Donors = Mapping[StageId, tuple[StageId, ...]]
"""For every stage those that may stand in for it, in order of preference. The first is its pair."""


@dataclass(frozen=True)
class Location:
    """Where a stage is. None: not known, or nowhere yet."""

    domain: str | None = None
    """The failure domain: what is in the same one may be lost at once."""
    host: str | None = None

    @classmethod
    def on_node(cls, name: str, labels: Mapping[str, str] | None, topology_key: str) -> Location:
        """``labels``: None if the node cannot be seen; then no domain but its name is known.

        A node without the label is a domain of its own: nothing is known to be lost together with it.
        """
        if topology_key == HOSTNAME:
            return cls(domain=name, host=name)
        return cls(domain=labels.get(topology_key, name) if labels is not None else None, host=name)


NOWHERE = Location()


def donors_of(
    instances: int,
    stages: int,
    locations: Mapping[StageId, Location] | None = None,
    before: Mapping[StageId, StageId] | None = None,
) -> Donors:
    """Pairs every stage with the same stage of another instance, and ranks the rest behind it.

    Every stage is the pair of exactly one other, so that all keep as much. Of the pairings for which that is so, the
    best one has the fewest pairs within a failure domain; then the fewest on one host; then the fewest that differ from
    ``before``; then the nearest partners in the ring of instances, lower instances first. Where nothing is known, that
    is the ring. A stage that is nowhere keeps its pairs: that it has to start again is no reason to send everybody's
    copies elsewhere.
    """
    locations, before = locations or {}, before or {}
    donors: dict[StageId, tuple[StageId, ...]] = {}
    for place in range(stages):
        column = [StageId(instance=instance, stage=place) for instance in range(instances)]
        at = [locations.get(stage, NOWHERE) for stage in column]
        index = {stage: instance for instance, stage in enumerate(column)}
        pairs = _pairs(at, [index.get(before[stage]) if stage in before else None for stage in column])
        donors |= {stage: tuple(column[each] for each in _ranked(i, pairs, at)) for i, stage in enumerate(column)}
    return donors


def _pairs(at: Sequence[Location], before: Sequence[int | None]) -> list[int]:
    """Whom each of n instances is paired with, at one place of the pipeline."""
    n = len(at)

    def cost(one: int, other: int) -> int:
        """One number, to be compared digit by digit. So are sums: over n pairs none of them reaches the base, n + 1."""
        moved = other != before[one]
        domain = _is_risk(at[one].domain, at[other].domain, moved)
        host = _is_risk(at[one].host, at[other].host, moved)
        # A digit for each instance, so that no two pairings cost the same.
        ring = [(other - one - 1) % n if instance == one else 0 for instance in range(n)]
        value = 0
        for digit in (one == other, domain, host, moved, *ring):
            value = value * (n + 1) + digit
        return value

    return _cheapest([[cost(one, other) for other in range(n)] for one in range(n)])


def _is_risk(one: str | None, other: str | None, moved: bool) -> bool:
    """Nobody gets a new pair for the hope that a stage which is nowhere will be elsewhere."""
    return moved if one is None or other is None else one == other


def _cheapest(cost: Sequence[Sequence[int]]) -> list[int]:
    """The permutation p whose sum of ``cost[i][p[i]]`` is least; O(n⁴), for n of at most 16.

    Gives a column to one row after the other, each time along the cheapest chain of rows that make room: the assignment
    problem, solved by shortest augmenting paths.
    """
    owner: dict[int, int] = {}
    for row in range(len(cost)):
        # The least cost of giving this row a column, if in the end one more column is taken: the one in question.
        least = list(cost[row])
        before: dict[int, int] = {}
        improved = True
        while improved:
            improved = False
            for column, other in owner.items():
                for target, price in enumerate(cost[other]):
                    if (total := least[column] - cost[other][column] + price) < least[target]:
                        least[target], before[target], improved = total, column, True
        column = min((each for each in range(len(cost)) if each not in owner), key=least.__getitem__)
        while column in before:
            owner[column] = owner[before[column]]
            column = before[column]
        owner[column] = row
    columns = {row: column for column, row in owner.items()}
    return [columns[row] for row in range(len(cost))]


def _ranked(instance: int, pairs: Sequence[int], at: Sequence[Location]) -> list[int]:
    """All other instances: the pair; then those in other failure domains; then those on other hosts.

    Among equals along the pairs: when a pair is lost, its own pair has room for another's copies, because it keeps
    the lost one's no longer.
    """
    order: list[int] = []
    following = pairs[instance]
    while following != instance:
        order.append(following)
        following = pairs[following]
    order += [(instance + step) % len(pairs) for step in range(1, len(pairs))]
    here = at[instance]

    def rank(other: int) -> tuple[bool, bool, bool]:
        there = at[other]
        return other != pairs[instance], _same(here.domain, there.domain), _same(here.host, there.host)

    return sorted(dict.fromkeys(order), key=rank)


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and one == other


def make_plans(
    name: str,
    version: int,
    instances: int,
    stages: int,
    addresses: Mapping[StageId, str],
    limits: Limits,
    replication: ReplicationMode = ReplicationMode.RING,
    donors: Donors | None = None,
) -> dict[int, Plan]:
    """One plan for every instance all of whose own stages have an address; donors without one are left out.

    ``donors``: those of every stage, by :func:`donors_of`; by default the ring's.
    """
    ranked = donors_of(instances, stages) if donors is None else donors
    plans: dict[int, Plan] = {}
    for instance in range(instances):
        own = [StageId(instance=instance, stage=stage) for stage in range(stages)]
        if any(stage not in addresses for stage in own):
            continue
        plans[instance] = Plan(
            version=version,
            name=name,
            instance=instance,
            stages=tuple(StageRef(id=stage, address=addresses[stage]) for stage in own),
            donors=tuple(
                tuple(StageRef(id=donor, address=addresses[donor]) for donor in ranked[stage] if donor in addresses)
                for stage in own
            ),
            limits=limits,
            replication=replication,
        )
    return plans
