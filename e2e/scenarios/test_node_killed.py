"""A node loses its power: a donor stands in at once, and a new stage takes the lost one's place on another node."""

from __future__ import annotations

import pytest
from resilientllm_api.engine_state import RecoveryKind

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

DONOR_SECONDS = 30.0
BOUND_SECONDS = 180.0


def test_a_killed_node_costs_no_token_and_its_stage_comes_back_elsewhere(scenario: Scenario) -> None:
    lost = scenario.before.alone[0]
    scenario.start_load()

    killed = scenario.did(fault.kill_node(scenario.ground, lost))
    scenario.until("donor", lambda look: bool(look.recoveries_since(killed.at)), DONOR_SECONDS)
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    first, *_ = after.recoveries_since(killed.at)
    assert (first.kind, first.instance, first.stages) == (RecoveryKind.BORROW, lost.instance, (lost.stage,))
    assert first.requests_affected > 0 and first.restored_at is not None
    replacement = after.pod(lost.instance, lost.stage)
    assert replacement.uid != lost.uid and replacement.node != lost.node
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [lost.place], "one loss, one new pod"
    copies = [pod.node for pod in after.stages if pod.stage == lost.stage]
    assert len(copies) == len(set(copies)), "a stage and its copy share a node"
