"""The observed world of one ResilientLLM, as plain data: all that :func:`decide.decide` may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import Any

from resilientllm_api.crd import ResilientLLMSpec, ResilientLLMStatus
from resilientllm_api.engine_state import EngineState

from resilientllm_operator.names import Role, Slot

BAD_CONFIGURATION_EXIT_CODE = 2
"""A worker process ends with it when no restart can help; its last line on stderr says why."""


@dataclass(frozen=True)
class ObjectView:
    """The ResilientLLM itself."""

    name: str
    namespace: str
    uid: str
    generation: int
    spec: ResilientLLMSpec
    status: ResilientLLMStatus = field(default_factory=ResilientLLMStatus)
    retry: str | None = None
    """The value of the retry annotation."""
    paused: bool = False
    """A person wants nothing changed that works."""
    deleting: bool = False
    resource_version: str = ""
    """Of the object as a whole: the status is written only if it is still this one."""

    @cached_property
    def spec_hashes(self) -> dict[Slot, str]:
        """Those that were asked for. They are asked for again and again, and a view never changes."""
        return {}


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended last."""

    code: int
    message: str
    at: datetime | None = None


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why a container does not run, in the kubelet's words."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Ailment:
    """A device of a container that is not known to be well, in the kubelet's words."""

    resource: str
    """Such as ``nvidia.com/gpu``, or ``claim:NAME/REQUEST``."""
    device: str
    certain: bool
    """Whether it is Unhealthy. Otherwise nobody knows: its plugin does not answer."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Toleration:
    """Of a taint, as in a pod's spec. None: whatever it is."""

    key: str | None = None
    value: str | None = None
    effect: str | None = None
    seconds: int | None = None
    """For so long only."""


@dataclass(frozen=True, slots=True)
class PodView:
    name: str
    uid: str
    slot: Slot
    spec_hash: str
    created: datetime
    ip: str | None = None
    node: str | None = None
    leaving: bool = False
    """Terminating, perhaps for ever on a node that is gone; or ended, which a pod that restarts never should."""
    ended: bool = False
    """Failed or Succeeded: evicted, or the node was shut down. The object is still to be deleted."""
    ends_by: datetime | None = None
    """When its time to end in order is over; None if nobody has asked it to end."""
    ready: bool = False
    ready_since: datetime | None = None
    loads: bool = False
    """Its process runs, and has not been ready yet."""
    restarts: int = 0
    unschedulable: str | None = None
    """The scheduler's message."""
    waiting: Waiting | None = None
    last_exit: Exit | None = None
    ailments: tuple[Ailment, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    kept_off: frozenset[str] = frozenset()
    """Nodes that it was made to avoid."""

    @property
    def rejected_configuration(self) -> bool:
        """Whether the process ended itself because no restart can help, and has not recovered since."""
        return not self.ready and self.last_exit is not None and self.last_exit.code == BAD_CONFIGURATION_EXIT_CODE


@dataclass(frozen=True, slots=True)
class Taint:
    key: str
    effect: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.key}{f'={self.value}' if self.value else ''}:{self.effect}"


@dataclass(frozen=True, slots=True)
class NodeCondition:
    status: str
    """True, False or Unknown."""
    reason: str = ""
    message: str = ""
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node, without what its kubelet writes again and again."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    unschedulable: bool = False
    """Cordoned; ``kubectl drain`` begins with that, too."""
    deleting: bool = False
    taints: tuple[Taint, ...] = ()
    conditions: Mapping[str, NodeCondition] = field(default_factory=dict)
    """By type."""

    @property
    def ready(self) -> bool | None:
        """None: the node does not answer, or has never said."""
        status = self.conditions.get("Ready", NodeCondition("Unknown")).status
        return {"True": True, "False": False}.get(status)


class Contact(Enum):
    """Whether an engine answers the operator."""

    UNKNOWN = "unknown"
    """Not asked often enough to know: what was known before still stands."""
    ANSWERS = "answers"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class EngineView:
    """What the operator knows of one engine pod, beyond Kubernetes."""

    contact: Contact = Contact.UNKNOWN
    state: EngineState | None = None
    """The last state told; None while it does not answer."""
    verified: str | None = None
    """The incarnation that served a real token, as far as it has been serving ever since."""
    verify_error: str | None = None
    """Why the last attempt to get a token failed."""


class Owner(Enum):
    """Whose an object with a name that we need is."""

    NOBODY = "nobody"
    """It does not exist."""
    OURS = "ours"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True)
class Refusal:
    """The API server refused to make a pod."""

    message: str
    at: datetime


@dataclass(frozen=True)
class World:
    object: ObjectView
    pods: tuple[PodView, ...] = ()
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    """All nodes, by name. Empty: the operator may not see them, and nothing follows from a missing one."""
    engines: Mapping[str, EngineView] = field(default_factory=dict)
    """By the uid of the engine's pod."""
    token: Owner = Owner.NOBODY
    service_owner: Owner = Owner.NOBODY
    service: Mapping[str, Any] | None = None
    """The part of the Service that we own, in the form of :func:`routing.service_essence`."""
    endpoints_owner: Owner = Owner.NOBODY
    endpoints: Mapping[str, Any] | None = None
    """The same of the EndpointSlice."""
    budgets: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    """The PodDisruptionBudgets of our names, as :func:`budgets.budget_essence` has them; None: somebody else's."""
    refusals: Mapping[str, Refusal] = field(default_factory=dict)
    """By pod name."""
    seats: Mapping[Slot, PodView] = field(default_factory=dict)
    """The pod that fills each slot, as :mod:`succession` has it; not observed, but decided first of all."""

    @property
    def instances(self) -> int:
        """How many there are: those asked for, and beyond them those that still have pods to stay."""
        highest = max((pod.slot.instance for pod in self.pods if not pod.leaving), default=-1)
        return max(self.object.spec.instances, highest + 1)

    def live(self, slot: Slot) -> tuple[PodView, ...]:
        """The pods of a slot that are to stay, the oldest first."""
        mine = [pod for pod in self.pods if pod.slot == slot and not pod.leaving]
        return tuple(sorted(mine, key=lambda pod: (pod.created, pod.name)))

    def leaving(self, slot: Slot) -> tuple[PodView, ...]:
        return tuple(pod for pod in self.pods if pod.slot == slot and pod.leaving)

    def current(self, slot: Slot) -> PodView | None:
        """The pod that fills the slot; that of a stage may be on its way out, as long as engines need it."""
        return self.seats.get(slot) or next(iter(self.live(slot)), None)

    def engine_pod(self, instance: int) -> PodView | None:
        return self.current(Slot(instance, Role.ENGINE))

    def engine(self, pod: PodView | None) -> EngineView:
        return self.engines.get(pod.uid, EngineView()) if pod else EngineView(contact=Contact.SILENT)
