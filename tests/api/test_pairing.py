from __future__ import annotations

import pytest
from resilientllm_api.pairing import make_plans
from resilientllm_api.plan import Limits, ReplicationMode, StageId


@pytest.mark.parametrize("mode", ReplicationMode)
def test_every_plan_says_whether_stages_keep_copies(mode: ReplicationMode) -> None:
    addresses = {StageId(instance=i, stage=k): f"10.0.{i}.{k}:7000" for i in range(3) for k in range(2)}
    plans = make_plans("default/tiny", 1, 3, 2, addresses, Limits(), mode)
    assert [plan.replication for plan in plans.values()] == [mode] * 3
