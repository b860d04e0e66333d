"""A stage's pod is deleted: a new one takes its place, pairing and replication are as before."""

from __future__ import annotations

import pytest
from resilientllm_api.crd import ConditionStatus, ConditionType

from e2e.scenarios import fault
from e2e.scenarios.look import Look
from e2e.scenarios.scenario import TIMEOUT_SECONDS, Scenario

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(TIMEOUT_SECONDS)]

BOUND_SECONDS = 120.0


def test_a_deleted_stage_is_replaced_and_the_replacement_swapped_in(scenario: Scenario) -> None:
    before = scenario.before
    lost = before.alone[0]
    scenario.start_load()

    deleted = scenario.did(fault.delete_pod(scenario.ground, lost))
    after = scenario.until_whole(BOUND_SECONDS)

    verdict = scenario.judge()
    assert verdict.met >= 6 and verdict.unharmed, verdict.problems
    assert after.pod(lost.instance, lost.stage).uid != lost.uid
    assert [pod.place for pod in scenario.made_since(before)] == [lost.place]
    assert after.recoveries_since(deleted.at), "nothing changed hands, although the stage's pod is another"
    degraded = [look.seen.condition(ConditionType.DEGRADED) for look in scenario.looks]
    assert {each.reason for each in degraded if each and each.status is ConditionStatus.TRUE} <= {"StageBorrowed"}
    assert keepers(after) == keepers(before)


def keepers(look: Look) -> dict[str, str | None]:
    """Who keeps the KV blocks of each place."""
    return {
        f"{instance.instance}.{stage.stage}": stage.kept_by
        for instance in look.seen.status.instances
        for stage in instance.stages
    }
