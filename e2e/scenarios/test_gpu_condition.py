"""A node says that a GPU is failing, before anything has failed: its stage moves away while it still works."""

from __future__ import annotations

import pytest
from resilientllm_api.engine_state import RecoveryKind

from e2e.scenarios import fault
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 120.0
NVSENTINELS = ("GpuMemWatch", "[DCGM_FR_VOLATILE_DBE_DETECTED] GPU:0 double-bit error - RecommendedAction:RESTART_VM")
"""A condition as NVSentinel writes it."""


def test_a_stage_leaves_a_node_whose_gpu_is_failing_and_nothing_is_computed_again(scenario: Scenario) -> None:
    threatened = scenario.before.alone[0]
    scenario.start_load()

    told = scenario.did(fault.set_node_condition(scenario.ground, threatened, *NVSENTINELS))
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    moves = after.recoveries_since(told.at)
    assert [each.kind for each in moves] == [RecoveryKind.MOVE, RecoveryKind.SWAP_BACK]
    assert [each.tokens_recomputed for each in moves] == [0, 0]
    replacement = after.pod(threatened.instance, threatened.stage)
    assert replacement.node != threatened.node
    assert [pod.place for pod in scenario.made_since(scenario.before)] == [threatened.place]
