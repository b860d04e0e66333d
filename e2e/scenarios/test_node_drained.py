"""A node is drained under load: its stage moves away while it still works, and nothing is lost or computed again."""

from __future__ import annotations

import pytest
from resilientllm_api.engine_state import RecoveryKind

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 120.0


def test_a_drained_node_costs_no_token_and_none_is_computed_again(scenario: Scenario) -> None:
    lost = scenario.before.alone[0]
    scenario.start_load()

    drained = scenario.did(fault.drain_node(scenario.ground, lost))
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    moves = after.recoveries_since(drained.at)
    assert [each.kind for each in moves] == [RecoveryKind.MOVE, RecoveryKind.SWAP_BACK]
    assert moves[0].requests_affected > 0, "the drain met no running request"
    assert [each.tokens_recomputed for each in moves] == [0, 0]
    assert after.pod(lost.instance, lost.stage).node != lost.node
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [lost.place]
