"""An instance more, and an instance less, while streams go on."""

from __future__ import annotations

import pytest

from e2e.scenarios import fault
from e2e.scenarios.load import LEISURELY_SECONDS
from e2e.scenarios.look import Look
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 180.0


def test_scaling_to_three_instances_and_back_harms_no_stream(scenario: Scenario) -> None:
    before = {pod.uid: pod.restarts for pod in scenario.before.pods}
    scenario.start_load(engines=(), pause_seconds=LEISURELY_SECONDS)

    scenario.did(fault.change_spec(scenario.ground, "3 instances", lambda spec: spec.update(instances=3)))
    # With three instances every stage keeps for exactly one other.
    scenario.until(
        "3 instances", lambda look: look.whole and serving(look) == 3 and len(keepers(look)) == 6, BOUND_SECONDS
    )
    scenario.meet_streams()
    scenario.did(fault.change_spec(scenario.ground, "2 instances", lambda spec: spec.update(instances=2)))
    after = scenario.until_whole(BOUND_SECONDS, moves=False)

    verdict = scenario.judge()
    assert verdict.met >= 2 and verdict.unharmed, verdict.problems
    assert {pod.instance for pod in scenario.made_since(scenario.before)} == {2}
    assert {pod.uid: pod.restarts for pod in after.pods} == before, "the two that stay were left alone"
    assert min(serving(look) for look in scenario.looks) == 2, "never fewer than were asked for"


def serving(look: Look) -> int:
    """Engines that take requests, by the word of the EndpointSlice."""
    return sum(endpoint.ready for endpoint in look.endpoints.values())


def keepers(look: Look) -> set[str | None]:
    """The stages that keep KV blocks for others."""
    return {stage.kept_by for each in look.seen.status.instances for stage in each.stages}
