"""The record of re-stitches: what the engines tell, joined with what was recorded before. Pure.

Engines remember their last ten, and forget them when they restart; the status remembers across that.
"""

from __future__ import annotations

from datetime import UTC, datetime

from resilientllm_api.crd import RecoveryStatus
from resilientllm_api.durations import format_ms
from resilientllm_api.engine_state import Recovery, RecoveryKind

from resilientllm_operator.world import World

KEPT = 10


def recovery_record(world: World) -> tuple[RecoveryStatus, ...]:
    """The last ten re-stitches of all instances, oldest first."""
    known = {(each.instance, each.id): each for each in world.object.status.recoveries}
    for view in world.engines.values():
        if view.state is not None:
            instance = view.state.instance
            known |= {(instance, each.id): _record(instance, each) for each in view.state.recoveries}
    records = sorted(known.values(), key=lambda each: (_utc(each.detected_at), each.instance, each.id))
    return tuple(_restored(each, records) for each in records)[-KEPT:]


def last_loss(records: tuple[RecoveryStatus, ...]) -> RecoveryStatus | None:
    """The last re-stitch around a loss; a stage that comes home is the end of one, not another."""
    losses = [each for each in records if each.kind is RecoveryKind.BORROW or each.reason is not None]
    return losses[-1] if losses else None


def _record(instance: int, recovery: Recovery) -> RecoveryStatus:
    total = recovery.phases_ms.get("total")
    return RecoveryStatus(
        id=recovery.id,
        instance=instance,
        kind=recovery.kind,
        stages=recovery.stages,
        reason=recovery.reason,
        donor=_donors(instance, recovery),
        detected_at=recovery.detected_at,
        resumed_at=recovery.resumed_at,
        phases={phase: round(ms, 3) for phase, ms in recovery.phases_ms.items()},
        took=format_ms(total) if total is not None and recovery.resumed_at else None,
        requests_affected=recovery.requests,
        tokens_recomputed=recovery.tokens_recomputed,
        tokens_kept=recovery.tokens_kept,
    )


def _donors(instance: int, recovery: Recovery) -> str | None:
    """Who stood in, if it was somebody else: a lost stage may also come back before a donor is needed."""
    donors = [each for each in recovery.served_by if each.stage in recovery.stages and each.instance != instance]
    return ", ".join(map(str, donors)) or None


def _restored(record: RecoveryStatus, records: list[RecoveryStatus]) -> RecoveryStatus:
    """Adds when the own stages came back, from the first later swap that covers the same places."""
    if record.kind is RecoveryKind.SWAP_BACK or record.restored_at is not None:
        return record
    swaps = (
        each.resumed_at
        for each in records
        if each.kind is RecoveryKind.SWAP_BACK
        and each.instance == record.instance
        and set(record.stages) <= set(each.stages)
        and _utc(each.detected_at) > _utc(record.detected_at)
    )
    return record.model_copy(update={"restored_at": next((swap for swap in swaps if swap), None)})


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
