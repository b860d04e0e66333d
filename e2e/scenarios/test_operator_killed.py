"""The operator is killed in mid-recovery: the next one finishes the job, once."""

from __future__ import annotations

import pytest

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

REPLACEMENT_SECONDS = 90.0
BOUND_SECONDS = 180.0


def test_an_operator_killed_in_mid_recovery_finishes_it_once(scenario: Scenario) -> None:
    lost = scenario.before.alone[0]
    scenario.start_load()

    killed = scenario.did(fault.kill_node(scenario.ground, lost))
    scenario.until("replacement made", lambda look: bool(scenario.made_since(scenario.before)), REPLACEMENT_SECONDS)
    scenario.did(fault.kill_operators(scenario.ground))
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    (made,) = scenario.made_since(scenario.before)
    assert (made.instance, made.stage) == (lost.instance, lost.stage)
    assert after.pod(lost.instance, lost.stage).uid == made.uid, "what the first operator began, the second used"
    borrowed, *_ = after.recoveries_since(killed.at)
    assert borrowed.restored_at is not None
    told = [event.reason for event in after.seen.events if event.uid not in known_events(scenario)]
    assert told.count("Borrowed") == 1 and told.count("SwappedBack") == 1, "each transition is told once"


def known_events(scenario: Scenario) -> set[str]:
    return {event.uid for event in scenario.before.seen.events}
