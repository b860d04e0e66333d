"""What the operator can do to the world. Data only: :mod:`dispatch` does it, in the order of the list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resilientllm_api.crd import ResilientLLMStatus
from resilientllm_api.plan import Plan

Manifest = dict[str, Any]


@dataclass(frozen=True)
class CreateToken:
    """Make the Secret that engines, stages and the operator know each other by."""

    manifest: Manifest
    """Without the token: a decision holds no secrets."""


@dataclass(frozen=True)
class CreatePod:
    manifest: Manifest
    why: str = ""
    """For one that is to take the place of another that still is there."""

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])


@dataclass(frozen=True)
class DeletePod:
    name: str
    uid: str
    """A precondition: never the next pod of the same name."""
    why: str
    grace_seconds: int | None = None
    """None: the pod's own."""


@dataclass(frozen=True)
class ApplyService:
    manifest: Manifest


@dataclass(frozen=True)
class ApplyEndpoints:
    manifest: Manifest


@dataclass(frozen=True)
class ApplyBudget:
    manifest: Manifest


@dataclass(frozen=True)
class WriteStatus:
    status: ResilientLLMStatus
    resource_version: str = ""
    """A precondition: the object from which the status was made. A replica that has lost the lease without knowing it
    cannot name plans any more, as every plan is named in a status before it is published."""


@dataclass(frozen=True)
class Announce:
    """An event about the object, for people."""

    reason: str
    note: str
    warning: bool = False
    about: str = ""
    """Names the transition, or the status before it: what is decided again, after a crash, is not told twice."""


@dataclass(frozen=True)
class PublishPlan:
    pod_uid: str
    ip: str
    plan: Plan


@dataclass(frozen=True)
class VerifyEngine:
    """Ask an engine for one real token."""

    pod_uid: str
    ip: str
    incarnation: str
    served_name: str


Action = (
    CreateToken
    | CreatePod
    | DeletePod
    | ApplyService
    | ApplyEndpoints
    | ApplyBudget
    | WriteStatus
    | Announce
    | PublishPlan
    | VerifyEngine
)


def in_words(change: CreateToken | CreatePod | DeletePod) -> str:
    """What would be done, where nothing may be."""
    match change:
        case CreateToken(manifest):
            return f"make Secret {manifest['metadata']['name']}"
        case CreatePod():
            return f"make pod {change.name}{f': {change.why}' if change.why else ''}"
        case DeletePod(name, _, why):
            return f"delete pod {name}: {why}"
