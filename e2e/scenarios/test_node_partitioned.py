"""A node's network is cut while all on it goes on: it is made up for, and does no harm when it is back."""

from __future__ import annotations

import pytest
from resilientllm_api.engine_state import RecoveryKind

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

DONOR_SECONDS = 30.0
BOUND_SECONDS = 180.0
HEALED_SECONDS = 60.0


def test_a_partitioned_node_is_made_up_for_and_does_no_harm_when_it_is_back(scenario: Scenario) -> None:
    lost = scenario.before.alone[-1]
    scenario.start_load()

    cut = scenario.did(fault.partition_node(scenario.ground, lost))
    scenario.until("donor", lambda look: bool(look.recoveries_since(cut.at)), DONOR_SECONDS)
    scenario.until_whole(BOUND_SECONDS)
    scenario.meet_streams()
    healed = scenario.did(fault.heal_node(scenario.ground, lost))
    after = scenario.until("settled", lambda look: look.settled, HEALED_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    assert lost.uid not in {pod.uid for pod in after.seen.pods}, "who was replaced must not come back"
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [lost.place], "one loss, one new pod"
    assert after.recoveries_since(healed.at) == (), "nothing changes hands because a stage that was replaced is back"


def test_a_short_cut_costs_a_loan_and_no_new_pod(scenario: Scenario) -> None:
    """Shorter than a cluster takes to call a node lost, longer than an engine takes to call a stage silent."""
    lost = scenario.before.alone[0]
    scenario.start_load()

    cut = scenario.did(fault.partition_node(scenario.ground, lost))
    scenario.until("donor", lambda look: bool(look.recoveries_since(cut.at)), DONOR_SECONDS)
    scenario.did(fault.heal_node(scenario.ground, lost))
    after = scenario.until_whole(HEALED_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    assert after.pod(lost.instance, lost.stage).uid == lost.uid
    assert scenario.made_since(scenario.before) == []
    kinds = [each.kind for each in after.recoveries_since(cut.at)]
    assert kinds == [RecoveryKind.BORROW, RecoveryKind.SWAP_BACK]
