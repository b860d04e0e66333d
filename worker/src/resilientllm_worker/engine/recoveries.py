"""The record of an instance's re-stitches: what happened, how long each phase took, what it cost.

Until a token comes after it, everything that goes wrong belongs to one recovery.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from resilientllm_api.engine_state import LossReason, Recovery, RecoveryKind, Rung
from resilientllm_api.plan import StageId

KEPT = 10


@dataclass
class _Going:
    record: Recovery
    detected: float
    marked: float
    """When the last phase before the fence was over."""
    stitched: float = 0.0


class Recoveries:
    """Plain bookkeeping; the pipeline calls it under its lock. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._going: _Going | None = None
        self._recent: deque[Recovery] = deque(maxlen=KEPT)
        self.total = 0
        self.tokens_recomputed_total = 0
        self.tokens_kept_total = 0
        self.requests_by_rung: Counter[Rung] = Counter()

    @property
    def going(self) -> bool:
        return self._going is not None

    @property
    def recent(self) -> tuple[Recovery, ...]:
        """The last ten that are over, oldest first."""
        return tuple(self._recent)

    def begin(
        self,
        places: set[int],
        kind: RecoveryKind,
        reason: LossReason | None,
        at: float,
        marks: Sequence[tuple[str, float]] = (),
    ) -> None:
        """The topology is void. Opens a record, or widens the open one, which is a loss if any part of it is.

        ``marks`` are phases that are over, in order, each with its end.
        """
        if self._going is not None:
            record = self._going.record
            update: dict[str, object] = {"stages": tuple(sorted(places | {*record.stages}))}
            if record.reason is None and reason is not None:
                update |= {"kind": kind, "reason": reason}
            self._going.record = record.model_copy(update=update)
            return
        record = Recovery(
            id=uuid.uuid4().hex[:12],
            kind=kind,
            stages=tuple(sorted(places)),
            reason=reason,
            detected_at=datetime.now(UTC) - timedelta(seconds=time.monotonic() - at),
        )
        going = self._going = _Going(record, detected=at, marked=at)
        phases = {}
        for name, end in marks:
            phases[name] = _ms(end - going.marked)
            going.marked = end
        going.record = record.model_copy(update={"phases_ms": phases})

    def stitched(
        self, served_by: tuple[StageId, ...], began: float, fenced: float, stitched: float, waited: bool
    ) -> None:
        """The pipeline is whole again. ``began``: when a stage that could take the place was there."""
        if (going := self._going) is None:
            return
        phases = dict(going.record.phases_ms)
        start = going.marked
        phases.pop("wait", None)  # of an attempt before, which is now part of the time until the fence
        if waited:
            phases["wait"] = _ms(began - start)
            start = began
        phases["fence"] = _ms(fenced - start)
        phases["stitch"] = _ms(stitched - fenced)
        going.record = going.record.model_copy(update={"phases_ms": phases, "served_by": served_by})
        going.stitched = stitched

    def rolled_back(self, requests: int, seconds: float) -> None:
        """The scheduler has stepped back to delivered tokens."""
        if (going := self._going) is None:
            return
        # Twice for one recovery if the engine thread looked while it was going on.
        before = going.record.phases_ms.get("rollBack", 0.0)
        phases = {**going.record.phases_ms, "rollBack": before + _ms(seconds)}
        going.record = going.record.model_copy(
            update={"requests": going.record.requests + requests, "phases_ms": phases}
        )

    def failed(self, requests: int) -> None:
        """So many were told to be sent again, because no stage could stand in."""
        self.requests_by_rung[Rung.FAILED] += requests

    def resumed(self, recomputed: list[int], kept: list[int]) -> None:
        """Requests of the last recovery are scheduled again; some may be so only after its first token.

        For each of them, ``recomputed``: tokens whose KV is computed once more; ``kept``: those whose KV is there.
        """
        self.requests_by_rung.update(Rung.KEPT if each else Rung.RECOMPUTED for each in kept)
        self.tokens_recomputed_total += sum(recomputed)
        self.tokens_kept_total += sum(kept)
        record = self._going.record if self._going is not None else self._recent[-1] if self._recent else None
        if record is None:
            return
        counted = record.model_copy(
            update={
                "tokens_recomputed": record.tokens_recomputed + sum(recomputed),
                "tokens_recomputed_max": max([record.tokens_recomputed_max, *recomputed]),
                "tokens_kept": record.tokens_kept + sum(kept),
            }
        )
        if self._going is not None:
            self._going.record = counted
        else:
            self._recent[-1] = counted

    def finish(self, now: float) -> None:
        """The first token after it, or nobody is there to get one."""
        going, self._going = self._going, None
        if going is None:
            return
        phases = {
            **going.record.phases_ms,
            "resume": _ms(now - going.stitched),
            "total": _ms(now - going.detected),
        }
        self._recent.append(going.record.model_copy(update={"phases_ms": phases, "resumed_at": datetime.now(UTC)}))
        self.total += 1


def _ms(seconds: float) -> float:
    return round(seconds * 1000.0, 3)
