"""A view that nobody vouches for is not acted upon."""

from __future__ import annotations

import pytest
from resilientllm_operator.freshness import DUE_SECONDS, MAX_AGE_SECONDS, START_SECONDS, Freshness


@pytest.fixture
def freshness() -> Freshness:
    """Both kinds were listed at 100."""
    made = Freshness(("Pod", "Node"))
    for kind in ("Pod", "Node"):
        made.listed(kind, begun=100.0)
    return made


def test_nothing_is_decided_before_all_kinds_were_listed() -> None:
    made = Freshness(("Pod", "Node"))
    made.listed("Pod", begun=100.0)
    assert "Node objects are not listed anew yet" in str(made.stale(100.0))


def test_a_first_list_waits_for_the_first_watch_but_not_for_ever() -> None:
    made = Freshness(("Pod", "Node"))
    assert made.due(100.0) == ()
    made.lost("the watch of Pod objects begins", 101.0, "Pod")
    assert made.due(101.0) == ("Pod",)
    assert made.due(100.0 + START_SECONDS) == ("Pod", "Node")


def test_an_event_before_the_first_list_vouches_for_nothing() -> None:
    made = Freshness(("Pod",))
    made.heard("Pod", 100.0)
    assert made.stale(100.0) is not None


def test_events_and_reopened_watches_keep_it_fresh(freshness: Freshness) -> None:
    for now in range(100, 1000, 20):
        freshness.heard("Pod", float(now))
        freshness.heard("Node", float(now))
    assert freshness.stale(1000.0) is None
    assert freshness.due(1000.0) == ()


def test_a_watch_that_is_silent_makes_its_kind_due_and_then_stale(freshness: Freshness) -> None:
    freshness.heard("Node", 100.0 + MAX_AGE_SECONDS)
    assert freshness.due(100.0 + DUE_SECONDS) == ()
    assert freshness.due(101.0 + DUE_SECONDS) == ("Pod",)
    assert freshness.stale(99.0 + MAX_AGE_SECONDS) is None
    assert (
        freshness.stale(101.0 + MAX_AGE_SECONDS) == f"Pod objects were last confirmed {MAX_AGE_SECONDS + 1:.0f} s ago"
    )
    freshness.listed("Pod", begun=101.0 + MAX_AGE_SECONDS)
    assert freshness.stale(101.0 + MAX_AGE_SECONDS) is None


def test_after_a_loss_only_lists_that_were_begun_later_count(freshness: Freshness) -> None:
    freshness.lost("the API server does not answer", 110.0)
    freshness.heard("Pod", 111.0)
    freshness.heard("Node", 111.0)
    freshness.listed("Pod", begun=109.0)
    freshness.listed("Node", begun=111.0)
    assert freshness.stale(112.0) == "the API server does not answer; Pod objects are not listed anew yet"
    freshness.listed("Pod", begun=112.0)
    assert freshness.stale(112.0) is None


def test_a_kind_can_be_lost_alone(freshness: Freshness) -> None:
    freshness.lost("the watch of Pod objects begins", 110.0, "Pod")
    assert freshness.due(110.0) == ("Pod",)


def test_a_kind_that_may_not_be_seen_is_not_waited_for(freshness: Freshness) -> None:
    freshness.lost("gone", 110.0, "Node")
    freshness.forget("Node")
    assert freshness.stale(110.0) is None
    freshness.lost("gone", 110.0)
    freshness.listed("Pod", begun=110.0)
    assert freshness.stale(110.0) is None
