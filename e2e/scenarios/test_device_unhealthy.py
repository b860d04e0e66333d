"""A stage's device is called unhealthy by its kubelet: the stage is not trusted any more, and replaced."""

from __future__ import annotations

import pytest

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 120.0


def test_a_stage_on_an_unhealthy_device_is_replaced(scenario: Scenario) -> None:
    lost = scenario.before.alone[0]
    scenario.start_load()

    broken = scenario.did(fault.break_device(scenario.ground, lost))
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    first, *_ = after.recoveries_since(broken.at)
    assert (first.instance, first.stages) == (lost.instance, (lost.stage,))
    replacement = after.pod(lost.instance, lost.stage)
    assert replacement.uid != lost.uid
    assert [health for _, health in fault.devices_of(scenario.ground, replacement)] == ["Healthy"]
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [lost.place]
