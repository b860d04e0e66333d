"""How soon to look at an object again although nothing tells that anything of it has changed. Pure.

Changes of the cluster and of engines are told. What is left is time: patience that ends, a refusal that is tried again.
"""

from __future__ import annotations

from resilientllm_api.crd import ConditionStatus, ConditionType, ResilientLLMStatus

SOON_SECONDS = 0.5
UNSETTLED_SECONDS = 2.0
SETTLED_SECONDS = 30.0

_SETTLED = {
    ConditionType.READY: ConditionStatus.TRUE,
    ConditionType.DEGRADED: ConditionStatus.FALSE,
    ConditionType.PROGRESSING: ConditionStatus.FALSE,
}


def pause_seconds(quiet_rounds: int, settled: bool) -> float:
    """``quiet_rounds``: how many in a row, up to now, found nothing to do."""
    return min(SOON_SECONDS * (1 << min(quiet_rounds, 10)), SETTLED_SECONDS if settled else UNSETTLED_SECONDS)


def spread(seconds: float, chance: float) -> float:
    """Between half of it and all of it. ``chance``: from 0 to 1, anew for each pause.

    A thousand objects that became ready together would else be looked at together for ever, and who has news would have
    to wait for all of them.
    """
    return seconds * (1 + chance) / 2


def is_settled(status: ResilientLLMStatus, generation: int) -> bool:
    """Whether all is as the spec wants it, as far as is known."""
    found = {each.type: each.status for each in status.conditions if each.observed_generation == generation}
    return all(found.get(kind) is wanted for kind, wanted in _SETTLED.items())
