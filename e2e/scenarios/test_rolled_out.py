"""A change of the spec is rolled out: one instance at a time, drained first, and no stream of the Service notices."""

from __future__ import annotations

from typing import Any

import pytest

from e2e.scenarios import fault
from e2e.scenarios.load import LEISURELY_SECONDS
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 240.0


def test_a_roll_out_replaces_every_pod_and_harms_no_stream(scenario: Scenario) -> None:
    before = {pod.uid for pod in scenario.before.pods}
    # Clients of the Service, which follows the engines. Whoever holds on to an engine's own address cannot follow.
    scenario.start_load(engines=(), pause_seconds=LEISURELY_SECONDS)

    scenario.did(fault.change_spec(scenario.ground, "other arguments, environment and resources", change))
    after = scenario.until_whole(BOUND_SECONDS, moves=False)

    verdict = scenario.judge()
    assert verdict.met >= 2 and verdict.unharmed, verdict.problems
    assert not before & {pod.uid for pod in after.pods}
    assert len(scenario.made_since(scenario.before)) == len(before), "each was replaced once"
    known = {event.uid for event in scenario.before.seen.events}
    told = [event.reason for event in after.seen.events if event.uid not in known]
    assert told.count("InstanceDraining") == 2, "each instance was drained, and once"
    fewest = min(sum(endpoint.ready for endpoint in look.endpoints.values()) for look in scenario.looks)
    assert fewest == 1, "one instance at a time: never below capacity less one, and no new one beside the old"


def change(spec: dict[str, Any]) -> None:
    """Instances of before and after cannot stand in for each other."""
    spec["args"] = ["--max-num-seqs=8" if each.startswith("--max-num-seqs") else each for each in spec["args"]]
    spec["env"].append({"name": "ROLLED_OUT", "value": "1"})
    spec["stage"]["resources"]["requests"]["cpu"] = "60m"
