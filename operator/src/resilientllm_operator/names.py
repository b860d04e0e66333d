"""Names and labels of everything that the operator makes. Pure, so that a retry makes the same name again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from resilientllm_api.crd import GROUP
from resilientllm_api.plan import StageId

MANAGER = "resilientllm-operator"
"""Field manager of server-side apply, and the value of ``app.kubernetes.io/managed-by``."""
SLICE_MANAGER = GROUP
"""Who manages the EndpointSlices. Not ``endpointslice-controller``, which would take them for its own."""

MANAGED_BY = "app.kubernetes.io/managed-by"
NAME_LABEL = f"{GROUP}/name"
ROLE_LABEL = f"{GROUP}/role"
INSTANCE_LABEL = f"{GROUP}/instance"
STAGE_LABEL = f"{GROUP}/stage"
SPEC_HASH_ANNOTATION = f"{GROUP}/spec-hash"
"""What the pod was made from; another hash means that the spec has changed since."""

SELECTOR = f"{MANAGED_BY}={MANAGER}"
"""Selects all objects of the operator, on the server's side."""


class Role(StrEnum):
    ENGINE = "engine"
    STAGE = "stage"


@dataclass(frozen=True, order=True, slots=True)
class Slot:
    """A place for one pod: the engine of an instance, or one of its stages."""

    instance: int
    role: Role
    stage: int | None = None

    @property
    def stage_id(self) -> StageId:
        assert self.stage is not None, "an engine is not a stage"
        return StageId(instance=self.instance, stage=self.stage)

    def __str__(self) -> str:
        return f"engine {self.instance}" if self.stage is None else f"stage {self.instance}.{self.stage}"


def slots(instances: int, stages: int) -> tuple[Slot, ...]:
    """Every pod that should be. Stages first: they have weights to load."""
    return tuple(Slot(i, Role.STAGE, k) for i in range(instances) for k in range(stages)) + tuple(
        Slot(i, Role.ENGINE) for i in range(instances)
    )


def pod_name(name: str, object_uid: str, slot: Slot, predecessors: Iterable[str]) -> str:
    """The name of the next pod of a slot, given the uids of the pods there that are on their way out.

    A replacement may have to exist while the lost pod still hangs in Terminating on a dead node, so it needs a
    name of its own. It is computed, not drawn: an operator that does not know yet that it has made the pod (a
    stale view, a crash) asks for the same name again and is told AlreadyExists, instead of making a second pod.
    """
    place = "engine" if slot.stage is None else f"s{slot.stage}"
    seed = "/".join([object_uid, *sorted(predecessors)])
    return f"{name}-{slot.instance}-{place}-{hashlib.sha256(seed.encode()).hexdigest()[:6]}"


def token_secret_name(name: str) -> str:
    return f"{name}-token"


def slice_name(name: str) -> str:
    return f"{name}-engines"


def budget_name(name: str, stage: int | None) -> str:
    """Of the budget of a stage's copies; None: of the engines."""
    return slice_name(name) if stage is None else f"{name}-s{stage}"


def common_labels(name: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "resilientllm",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/part-of": "resilientllm",
        MANAGED_BY: MANAGER,
        NAME_LABEL: name,
    }


def slot_labels(name: str, slot: Slot) -> dict[str, str]:
    labels = common_labels(name) | {
        "app.kubernetes.io/component": str(slot.role),
        ROLE_LABEL: str(slot.role),
        INSTANCE_LABEL: str(slot.instance),
    }
    return labels if slot.stage is None else labels | {STAGE_LABEL: str(slot.stage)}


def slot_of(labels: dict[str, str]) -> Slot | None:
    """The slot that a pod's labels name; None for labels that we did not write."""
    try:
        role = Role(labels[ROLE_LABEL])
        stage = int(labels[STAGE_LABEL]) if role is Role.STAGE else None
        return Slot(int(labels[INSTANCE_LABEL]), role, stage)
    except (KeyError, ValueError):
        return None
