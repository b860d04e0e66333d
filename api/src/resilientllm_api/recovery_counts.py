"""How recoveries are counted: alike in engines and in the operator, so that what both say can be compared."""

from resilientllm_api.engine_state import LossReason, RecoveryKind

RECOVERY_LABELS = (
    *((RecoveryKind.BORROW.value, reason) for reason in (*(each.value for each in LossReason), "")),
    (RecoveryKind.SWAP_BACK.value, ""),
    (RecoveryKind.MOVE.value, ""),
)
"""Kinds and reasons that there can be. Counters are there with 0 before the first recovery, because an increase from
nothing to 1 is none to Prometheus."""

_OF_EVERY_KIND = ("wait", "fence", "stitch", "rollBack", "resume")
RECOVERY_PHASES = (
    *((kind.value, phase) for kind in RecoveryKind for phase in _OF_EVERY_KIND),
    *((kind.value, phase) for kind in (RecoveryKind.SWAP_BACK, RecoveryKind.MOVE) for phase in ("hold", "flush")),
)
"""Kinds and phases that there can be, for the same reason."""

RECOVERY_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""From a re-stitch between two steps to a stage that loads its weights from storage."""
