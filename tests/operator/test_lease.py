"""One replica acts at a time, whatever its clock and the network do; and when all is well again, one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from heapq import heappop, heappush
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_operator.lease import Candidate, Record, Terms

DATE = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
TERMS = Terms()


def record(holder: str = "other", **changes: object) -> Record:
    made = Record(holder, TERMS.duration_seconds, acquired=DATE, renewed=DATE, transitions=3, version="7")
    return replace(made, **changes)  # type: ignore[arg-type]


def holder(at: float = 100.0) -> Candidate:
    return Candidate("me").wrote(record("me"), begun=at)


class TestTaking:
    def test_makes_the_lease_where_there_is_none(self) -> None:
        wanted = Candidate("me").observe(None, 100.0).decide(100.0, DATE)
        assert wanted == Record("me", 15, DATE, DATE, transitions=0, version="")

    def test_takes_at_once_what_was_given_back(self) -> None:
        wanted = Candidate("me").observe(record(""), 100.0).decide(100.0, DATE)
        assert wanted is not None
        assert (wanted.holder, wanted.transitions, wanted.version) == ("me", 4, "7")

    @pytest.mark.parametrize(("waited", "takes"), [(0.0, False), (14.9, False), (15.0, True)])
    def test_waits_for_another_to_renew_for_as_long_as_that_ones_lease_says(self, waited: float, takes: bool) -> None:
        me = Candidate("me").observe(record(), 100.0)
        assert (me.decide(100.0 + waited, DATE) is not None) is takes
        patient = Candidate("me").observe(record(duration_seconds=60), 100.0)
        assert patient.decide(100.0 + waited, DATE) is None

    def test_counts_anew_from_every_renewal_that_it_sees(self) -> None:
        me = Candidate("me").observe(record(), 100.0).observe(record(), 110.0)
        assert me.decide(115.0, DATE) is not None
        me = me.observe(record(version="8"), 114.0)
        assert me.decide(128.9, DATE) is None

    def test_does_not_look_at_the_times_in_it(self) -> None:
        """They are another machine's."""
        old = record(renewed=datetime(2020, 1, 1, tzinfo=UTC))
        assert Candidate("me").observe(old, 100.0).decide(100.0, DATE) is None

    def test_a_lease_that_vanished_counts_until_it_would_have_ended(self) -> None:
        me = Candidate("me").observe(record(), 100.0).observe(None, 101.0)
        assert me.decide(114.9, DATE) is None
        assert me.decide(115.0, DATE) is not None

    def test_an_earlier_life_of_the_same_pod_is_another(self) -> None:
        me = Candidate("pod_2").observe(record("pod_1"), 100.0)
        assert me.decide(101.0, DATE) is None


class TestHolding:
    def test_acts_for_ten_seconds_from_the_beginning_of_the_write(self) -> None:
        me = holder(at=100.0)
        assert me.leads(109.9)
        assert not me.leads(110.0)

    def test_renews_without_a_transition(self) -> None:
        wanted = holder().decide(102.0, DATE)
        assert wanted is not None
        assert (wanted.holder, wanted.transitions, wanted.version) == ("me", 3, "7")

    def test_ends_when_somebody_else_has_it(self) -> None:
        assert not holder().observe(record("other", version="8"), 101.0).leads(101.0)

    def test_ends_when_it_has_vanished(self) -> None:
        assert not holder().observe(None, 101.0).leads(101.0)

    def test_a_write_whose_answer_was_lost_gives_nothing_until_it_is_renewed(self) -> None:
        me = Candidate("me").observe(record("me", version="8"), 100.0)
        assert not me.leads(100.0)
        again = me.decide(100.0, DATE)
        assert again is not None
        assert again.version == "8"

    def test_gives_back_what_it_holds_and_nothing_else(self) -> None:
        given_back = holder().give_back(DATE)
        assert given_back is not None
        assert (given_back.holder, given_back.version) == ("", "7")
        assert Candidate("me").observe(record(), 100.0).give_back(DATE) is None


@pytest.mark.parametrize("terms", [(15, 15.0, 2.0), (15, 10.0, 5.0), (10, 10.0, 2.0)])
def test_terms_leave_time_for_requests_on_their_way(terms: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Terms(*terms)


class Fate(Enum):
    """What becomes of one look at the lease, and of the write that follows from it."""

    ANSWERED = "answered"
    LOST = "lost"
    """The request does not arrive."""
    UNANSWERED = "unanswered"
    """It arrives, and the answer does not."""
    LATE = "late"
    """It arrives after LATE_SECONDS, and is answered."""


LATE_SECONDS = 4.0


@dataclass
class Replica:
    """A candidate on a machine whose clock has its own zero and its own speed."""

    me: Candidate
    offset: float
    speed: float
    plan: list[tuple[Fate, float]]
    """What happens to its next looks, and for how long it stands still after each; then all is well."""

    def clock(self, time: float) -> float:
        return self.offset + self.speed * time


class Simulation:
    """Replicas and an API server; looks, arrivals and answers happen in the order of their times."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self.time = 0.0
        self._lease: Record | None = None
        self._version = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        for replica in replicas:
            self._at(0.0, lambda replica=replica: self._look(replica))  # type: ignore[misc]

    def acting(self) -> list[str]:
        return [each.me.name for each in self.replicas if each.me.leads(each.clock(self.time))]

    def calm(self) -> bool:
        return not any(replica.plan for replica in self.replicas)

    def step(self) -> None:
        self.time, _, event = heappop(self._events)
        event()

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heappush(self._events, (time, next(self._number), event))

    def _look(self, replica: Replica) -> None:
        fate, pause = replica.plan.pop(0) if replica.plan else (Fate.ANSWERED, 0.0)
        begun, asked_at = replica.clock(self.time), self.time
        arrives = asked_at + (LATE_SECONDS if fate is Fate.LATE else 0.0)
        if fate is not Fate.LOST:
            if not replica.me.leads(begun):
                replica.me = replica.me.observe(self._lease, begun)
            wanted = replica.me.decide(begun, DATE)
            if wanted is not None:
                self._at(arrives, lambda: self._write(replica, wanted, begun, answered=fate is not Fate.UNANSWERED))
        self._at(arrives + TERMS.retry_seconds + pause, lambda: self._look(replica))

    def _write(self, replica: Replica, wanted: Record, begun: float, *, answered: bool) -> None:
        fits = wanted.version == (self._lease.version if self._lease else "")
        if fits:
            self._version += 1
            self._lease = replace(wanted, version=str(self._version))
        if answered:
            written = self._lease if fits else None
            me, now = replica.me, replica.clock(self.time)
            replica.me = me.wrote(written, begun) if written else me.observe(self._lease, now)


machines = st.tuples(
    st.floats(-1e6, 1e6),
    st.sampled_from([0.85, 1.0, 1.15]) | st.floats(0.85, 1.15),
    st.lists(st.tuples(st.sampled_from(Fate), st.sampled_from([0.0, 3.0, 8.0, 25.0]) | st.floats(0, 25)), max_size=12),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(machines, min_size=2, max_size=3))
def test_never_two_and_always_one_again(found: list[tuple[float, float, list[tuple[Fate, float]]]]) -> None:
    simulation = Simulation(
        [
            Replica(Candidate(f"replica-{number}"), offset, speed, plan)
            for number, (offset, speed, plan) in enumerate(found)
        ]
    )
    while not simulation.calm():
        simulation.step()
        assert len(simulation.acting()) <= 1
    # The last pause, then the longest that a lease can still count, then a look.
    end = simulation.time + 25 + (TERMS.duration_seconds + 2 * TERMS.retry_seconds) / 0.85 + LATE_SECONDS
    while simulation.time < end:
        simulation.step()
        assert len(simulation.acting()) <= 1
    assert len(simulation.acting()) == 1
