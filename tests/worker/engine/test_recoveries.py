"""The record of re-stitches: phases follow each other without a gap, and add up."""

import pytest
from resilientllm_api.engine_state import LossReason, RecoveryKind, Rung
from resilientllm_api.plan import StageId
from resilientllm_worker.engine.recoveries import Recoveries

SERVED_BY = (StageId(instance=1, stage=0), StageId(instance=0, stage=1))


def test_the_phases_add_up_also_if_a_second_loss_comes_before_the_first_token() -> None:
    recoveries = Recoveries()
    recoveries.begin({0}, RecoveryKind.BORROW, LossReason.RESET, at=10.0)
    recoveries.stitched(SERVED_BY, began=12.0, fenced=12.1, stitched=12.2, waited=True)
    recoveries.begin({1}, RecoveryKind.BORROW, LossReason.RESET, at=13.0)
    recoveries.stitched(SERVED_BY, began=13.0, fenced=13.1, stitched=13.2, waited=False)
    recoveries.finish(13.5)
    (record,) = recoveries.recent
    assert record.stages == (0, 1)
    total = record.phases_ms.pop("total")
    assert total == pytest.approx(3500)
    assert sum(record.phases_ms.values()) == pytest.approx(total)


def test_each_request_has_a_rung_whenever_it_is_scheduled_again() -> None:
    recoveries = Recoveries()
    recoveries.begin({0}, RecoveryKind.BORROW, LossReason.RESET, at=10.0)
    recoveries.resumed([16, 40], [48, 0])
    recoveries.finish(10.5)
    recoveries.resumed([8], [32])
    recoveries.failed(3)
    assert recoveries.requests_by_rung == {Rung.KEPT: 2, Rung.RECOMPUTED: 1, Rung.FAILED: 3}
    (record,) = recoveries.recent
    assert (record.tokens_recomputed, record.tokens_kept) == (64, 80)
