"""What is found about one condition, before it is dated. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from resilientllm_api.crd import ConditionType
from resilientllm_api.reasons import Reason


@dataclass(frozen=True)
class Verdict:
    type: ConditionType
    status: bool | None
    """None: it cannot be known now."""
    reason: Reason
    message: str
