"""The custom resource ``ResilientLLM``: what a user asks for (``spec``) and what is true of it (``status``).

The schema in ``crds/`` is generated from these classes (:mod:`resilientllm_api.crd_schema`), docstrings included:
they are what ``kubectl explain`` prints. Rules that a type cannot express are CEL rules beside their class, each
with a message for the person whose object was refused.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from resilientllm_api.durations import DURATION_PATTERN
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_api.immutable import Immutable
from resilientllm_api.plan import ReplicationMode

GROUP = "resilientllm.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "ResilientLLM"
PLURAL = "resilientllms"
SINGULAR = "resilientllm"
SHORT_NAME = "rllm"

HOSTNAME = "kubernetes.io/hostname"
"""The label that has another value on each node."""
NAME_MAX_LENGTH = 40
"""Leaves room for ``-<instance>-s<stage>-<suffix>`` in the 63 characters of a pod's host name."""
MAX_INSTANCES = 16
MAX_STAGES = 64

RETRY_ANNOTATION = f"{GROUP}/retry"
"""A new value makes the operator try again what it had given up, without a change of the spec."""
PAUSED_ANNOTATION = f"{GROUP}/paused"
"""While it is "true" the operator changes nothing that works; what is lost is still replaced."""
NOTHING_OBSERVED = -1
"""``status.observedGeneration`` before the operator has seen the object: no generation, so no tool takes it for one."""

# The operator sets these itself; a second value would make engine and stages disagree about the pipeline.
_OWN_FLAGS = (
    "model|host|port|served-model-name|pipeline-parallel-size|tensor-parallel-size|distributed-executor-backend|"
    "scheduler-cls|instance|stage|listen|health|plan-file|control|token-file|pool-fraction|weights-from|lend-weights|"
    "leave-timeout|shutdown-timeout|api-key|uds|ssl-[a-z-]+"
)
_QUANTITY = (
    r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))"
    r"(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$"
)


def rule(rule: str, message: str, **more: str) -> dict[str, str]:
    """One CEL rule, as ``x-kubernetes-validations`` wants it."""
    return {"rule": rule, "message": message, **more}


def validated(*rules: dict[str, str]) -> dict[str, Any]:
    return {"x-kubernetes-validations": list(rules)}


class CrdModel(Immutable):
    """Unknown fields are ignored, so that an operator reads objects of a newer schema."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


Text = Annotated[str, Field(min_length=1, max_length=1024)]
Name = Annotated[str, Field(min_length=1, max_length=253)]
Duration = Annotated[str, Field(pattern=DURATION_PATTERN, max_length=32)]
Quantity = Annotated[str | int, Field(json_schema_extra={"x-kubernetes-int-or-string": True, "pattern": _QUANTITY})]


class ImagePullPolicy(StrEnum):
    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class PersistentVolumeClaim(CrdModel):
    claim_name: Name
    """A PersistentVolumeClaim in the object's namespace; it is mounted read-only by all pods at once."""


class ModelVolume(CrdModel):
    """Where the model's files come from, when they are not in the image."""

    persistent_volume_claim: PersistentVolumeClaim
    mount_path: Annotated[str, Field(pattern=r"^/[^:]*$", max_length=512)] = "/models"
    """Where the volume appears in the pods."""


class Model(CrdModel):
    """Which model to serve."""

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule(
                "has(self.path) != has(self.name)",
                "set either model.path (a folder in the pod) or model.name (a model of the Hugging Face hub), "
                "and not both",
            )
        )
    )

    path: Annotated[str, Field(pattern=r"^/[^\s]*$", max_length=1024)] | None = None
    """A folder in the pods, for example under model.volume.mountPath. Nothing is downloaded."""
    name: Annotated[str, Field(pattern=r"^[^\s/-][^\s]*$", max_length=256)] | None = None
    """A model of the Hugging Face hub; every stage downloads what it needs."""
    served_name: Annotated[str, Field(pattern=r"^[^\s-][^\s]*$", max_length=256)] | None = None
    """The model's name in the API. Default: the name of the object."""
    volume: ModelVolume | None = None


class ImagePullSecret(CrdModel):
    name: Name
    """A Secret for a registry, in the object's namespace."""


class SecretKey(CrdModel):
    name: Name
    """The Secret, in the object's namespace."""
    key: Name


class EnvVarSource(CrdModel):
    secret_key_ref: SecretKey


class EnvVar(CrdModel):
    """One environment variable: a value, or a key of a Secret."""

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule("!(has(self.value) && has(self.valueFrom))", "set either value or valueFrom, and not both")
        )
    )

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=253)]
    value: Annotated[str, Field(max_length=4096)] | None = None
    value_from: EnvVarSource | None = None


class Resources(CrdModel):
    """As in a container, for example ``limits: {nvidia.com/gpu: 1}``. Any resource of a node goes: hugepages, too."""

    requests: Annotated[dict[str, Quantity], Field(max_length=16)] | None = None
    limits: Annotated[dict[str, Quantity], Field(max_length=16)] | None = None


class Toleration(CrdModel):
    key: Name | None = None
    operator: Annotated[str, Field(json_schema_extra={"enum": ["Exists", "Equal"]})] | None = None
    value: Annotated[str, Field(max_length=253)] | None = None
    effect: (
        Annotated[str, Field(json_schema_extra={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]})] | None
    ) = None
    toleration_seconds: int | None = None


Env = Annotated[
    tuple[EnvVar, ...],
    Field(max_length=64, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
]


class PodTemplate(CrdModel):
    """What the pods of one kind get beside what the operator gives them."""

    env: Env = ()
    """Added to spec.env."""
    resources: Resources = Resources()
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=16)] | None = None
    """Nodes must carry these labels."""
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16)] = ()
    runtime_class_name: Name | None = None
    """A RuntimeClass of the cluster, for example nvidia where that is not the nodes' default."""
    priority_class_name: Name | None = None
    """A PriorityClass of the cluster."""


class Replication(CrdModel):
    """What stages keep for the instances that they may have to stand in for."""

    mode: ReplicationMode = ReplicationMode.RING
    """Ring: every stage sends its full KV blocks, beside the work, to the same stage of the next instance, which keeps
    them in its pool. When a stage is lost, the donor has them already: only what was not copied yet, and what is not a
    full block, is computed again. It costs the pool's GPU memory, about as many bytes on the network as KV cache is
    made, and a little CPU; a step never waits for it. Needs at least 2 instances. None: no copies; a donor computes the
    KV cache of the requests that it takes over again, from their tokens. A change restarts nothing."""
    pool_percent: Annotated[int, Field(ge=5, le=200)] = 100
    """The pool of a stage: KV blocks beside those for its own instance, in percent of these. The KV memory of the stage
    is divided between both, so with 100 half of it is the pool. It holds the copies, and a guest is served from it, so
    it is needed with mode None too. 100: it can hold all KV blocks of another instance, so a donor serves a guest at
    full capacity. Less: the heads of contexts are kept first, and the engine of a guest limits itself to what the donor
    can hold. Never less than one request of the greatest length needs. A change replaces the pods, one instance at a
    time."""
    topology_key: Annotated[str, Field(min_length=1, max_length=253)] = HOSTNAME
    """The node label that names a failure domain. Two copies of the same stage are never on one node, and as far as
    there are enough domains in different ones. Every stage is paired with a copy of itself in another domain, which
    keeps its KV blocks and stands in for it first; if none is free, the condition ReplicationHealthy says so."""


class WeightsSource(StrEnum):
    """Where a stage that starts gets its weights."""

    TWIN = "Twin"
    """From a living copy of the same stage; from storage if there is none, or it fails."""
    STORAGE = "Storage"
    """From wherever vLLM loads them."""


class RecoveryMode(StrEnum):
    ACT = "Act"
    OBSERVE = "Observe"


class StragglerPolicy(StrEnum):
    """What follows when a stage has become slow, by its own history and beside its twins."""

    REPORT = "Report"
    """Status and event say so."""
    MOVE = "Move"
    """Another pod is made on another node, and engines move to it without losing anything."""


class NodeAction(StrEnum):
    """What follows for a stage from what is said of its node, the mildest first."""

    IGNORE = "Ignore"
    WARN = "Warn"
    """It is told, in status and event."""
    MOVE = "Move"
    """It still works: another pod is made elsewhere, and engines move to it without losing anything."""
    BORROW = "Borrow"
    """It is not to be trusted: donors stand in at once, and another pod is made elsewhere."""


class NodeConditionRule(CrdModel):
    """What a condition of a node means for the stages there."""

    type: Annotated[str, Field(min_length=1, max_length=316)]
    """Of the node's condition, such as GpuMemWatch."""
    status: Annotated[str, Field(json_schema_extra={"enum": ["True", "False", "Unknown"]})] = "True"
    action: NodeAction
    """Ignore: nothing. Warn: status and event say so. Move: the stage still works, so engines move to a donor and then
    to a new pod elsewhere, without losing anything. Borrow: the stage is not to be trusted, so donors stand in at
    once."""


class RepeatOffender(CrdModel):
    """When a node is avoided: no stage is placed there any more, and those that are there move away."""

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule(
                "duration(self.window) >= duration('1m') && duration(self.window) <= duration('168h')",
                "recovery.repeatOffender.window must be from 1m to 168h",
            )
        )
    )

    failures: Annotated[int, Field(ge=2, le=10)] = 3
    """So many failures of stages on one node, in the window."""
    window: Duration = "1h"


class RecoveryPolicy(CrdModel):
    """Times after which an engine acts on its own, and what the operator makes of trouble."""

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule(
                "duration(self.heartbeatTimeout) > duration(self.heartbeatInterval)",
                "recovery.heartbeatTimeout must be longer than recovery.heartbeatInterval: "
                "a stage that misses no heartbeat would count as lost",
            ),
            rule(
                "duration(self.heartbeatInterval) >= duration('10ms') && duration(self.waitForDonor) >= duration('0s')"
                " && duration(self.waitForDonor) <= duration('24h') && duration(self.heartbeatTimeout) <= "
                "duration('24h')",
                "recovery.heartbeatInterval must be at least 10ms, and no time longer than 24h",
            ),
            rule(
                "duration(self.stepTimeout) >= duration('100ms') && duration(self.stepTimeout) <= duration('24h')",
                "recovery.stepTimeout must be from 100ms to 24h",
            ),
            rule(
                "duration(self.sickAfter) >= duration('1s') && duration(self.sickAfter) <= duration('24h')",
                "recovery.sickAfter must be from 1s to 24h",
            ),
            rule(
                "duration(self.drainTimeout) >= duration('1s') && duration(self.drainTimeout) <= duration('1h')",
                "recovery.drainTimeout must be from 1s to 1h: a node that is drained waits for it",
            ),
        )
    )

    wait_for_donor: Duration = "30s"
    """How long a request waits while no stage can stand in for a lost one; then it fails, and may be sent again."""
    heartbeat_interval: Duration = "100ms"
    """How often a stage says that it is alive and how far its work has come."""
    heartbeat_timeout: Duration = "800ms"
    """A stage that was silent for so long is lost, and so is one that holds up its pipeline for so long."""
    step_timeout: Duration = "2s"
    """No step of a stage counts as stuck before. Each stage learns from its own steps how long one may take: this, or
    eight times what such steps took, whichever is longer."""
    sick_after: Duration = "30s"
    """An engine that has requests and has not done a step for so long, or could not have taken any, is not healthy: it
    says so on ``/health`` and gets no requests."""
    stragglers: StragglerPolicy = StragglerPolicy.REPORT
    """What follows when a stage has become slow: its steps take half as long again as they used to, and as those of its
    copies. Report: status and event say so. Move: its pod is replaced on another node, without losing anything."""
    drain_timeout: Duration = "5m"
    """How long at most requests may run on in an instance that gives way (a roll-out, fewer instances) or an engine pod
    that is told to end (an eviction), which get no new ones. What still runs then is cut off. It is the pods' grace
    period, too: a change restarts nothing, and holds for evictions of the pods that are made from then on."""
    mode: RecoveryMode = RecoveryMode.ACT
    """Observe: the operator decides and reports, in status.wouldDo and events, and touches no pod; endpoints and status
    stay true, and engines go on helping themselves."""
    node_conditions: Annotated[
        tuple[NodeConditionRule, ...],
        Field(
            max_length=64,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type", "status"]},
        ),
    ] = ()
    """What conditions of nodes mean for the stages there. Added to the built-in list, which has the conditions that
    NVSentinel sets: Borrow for SysLogsGPUFallenOff; Warn for GpuDcgmConnectivityFailure and GpuCpusetWatch; Move for
    GpuMemWatch, GpuThermalWatch, GpuPcieWatch, GpuPowerWatch, GpuInforomWatch, GpuSmWatch, GpuNvlinkWatch, GpuMcuWatch,
    GpuPmuWatch, GpuDriverWatch, SysLogsXIDError, SysLogsSXIDError, NVSwitchFatalError and NVSwitchDown. An entry for
    one of these says otherwise; Ignore switches it off."""
    repeat_offender: RepeatOffender = RepeatOffender()
    weights: WeightsSource = WeightsSource.TWIN
    """Where a stage gets its weights if its pod is made while another copy of it is ready. Twin: from that pod, over
    the network and verified; from storage if that fails. Storage: as if there were no other. A change restarts nothing:
    it holds for the pods that are made from then on."""


class ServicePolicy(CrdModel):
    """The Service in front of all instances. It has the name of the object."""

    port: Annotated[int, Field(ge=1, le=65535)] = 80


class ResilientLLMSpec(CrdModel):
    """What should be."""

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule(
                "self.model == oldSelf.model",
                "spec.model cannot change: make another ResilientLLM, and delete this one when the other is Ready",
            ),
            rule(
                "self.stages == oldSelf.stages",
                "spec.stages cannot change, because it decides which weights every stage holds: "
                "make another ResilientLLM, and delete this one when the other is Ready",
            ),
            rule(
                "self.tensorParallelSize == oldSelf.tensorParallelSize",
                "spec.tensorParallelSize cannot change, because it decides which weights every rank holds: "
                "make another ResilientLLM, and delete this one when the other is Ready",
            ),
            rule(
                f"!has(self.args) || !self.args.exists(a, a.replace('_', '-').matches('^(--({_OWN_FLAGS})([=].*)?"
                "|-[pt]p([=0-9].*)?)$'))",
                "spec.args must not set what the operator sets itself: use spec.model, spec.stages, "
                "spec.tensorParallelSize, spec.replication.poolPercent, spec.recovery.drainTimeout and spec.service "
                "instead; TLS and API keys belong in a gateway in front of the Service",
            ),
        )
    )

    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\s]+$")]
    """The worker image, for engines and stages."""
    image_pull_policy: ImagePullPolicy = ImagePullPolicy.IF_NOT_PRESENT
    image_pull_secrets: Annotated[
        tuple[ImagePullSecret, ...],
        Field(
            max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = ()
    """For the registry of the image. Without any, those of the namespace's default ServiceAccount are used."""
    model: Model
    instances: Annotated[int, Field(ge=1, le=MAX_INSTANCES)] = 2
    """Complete copies of the model that serve requests. With one, no other can stand in for a lost stage."""
    stages: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    """Pipeline-parallel slices of an instance; each is a pod of its own."""
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks in a stage. On GPUs every rank needs one: ask for as many in spec.stage.resources."""
    args: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    """Flags of ``vllm serve``; engines and stages get the same."""
    env: Env = ()
    """Environment of engines and stages."""
    engine: PodTemplate = PodTemplate()
    """Pods of engines: the scheduler and the API of an instance. They hold no weights."""
    stage: PodTemplate = PodTemplate()
    """Pods of stages."""
    replication: Replication = Replication()
    recovery: RecoveryPolicy = RecoveryPolicy()
    service: ServicePolicy = ServicePolicy()


class ConditionType(StrEnum):
    READY = "Ready"
    """Every instance serves, and a real token of each was seen."""
    AVAILABLE = "Available"
    """At least one instance serves: requests to the endpoint are answered."""
    DEGRADED = "Degraded"
    """Something that served is lost: a donor stands in, or an instance is down."""
    PROGRESSING = "Progressing"
    """The operator works on it, or waits for the cluster. False: done, or it waits for a person."""
    REPLICATION_HEALTHY = "ReplicationHealthy"
    """Every place's KV blocks are kept by a second stage. Says what a loss would cost; Ready does not depend on it."""
    RECOVERING = "Recovering"
    """A re-stitch, a move, or the replacement of a stage is under way."""
    RECONCILING = "Reconciling"
    """What runs is not yet what the spec asks for, and waiting helps, or the pause holds it up."""
    STALLED = "Stalled"
    """Waiting does not help: a person must do something. The reason says what kind of matter it is."""


class ConditionStatus(StrEnum):
    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


class Condition(CrdModel):
    type: Annotated[str, Field(max_length=316)]
    status: ConditionStatus
    observed_generation: int
    """The generation of the spec that this condition speaks of."""
    last_transition_time: datetime
    """When the status changed last."""
    reason: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$", max_length=128)]
    """One of the documented constants; for programs."""
    message: Annotated[str, Field(max_length=32768)]
    """For people: what is the matter with which object, and what to do."""


class ExitStatus(CrdModel):
    """How a container ended last."""

    code: int
    message: str = ""
    """Its last lines."""
    at: datetime | None = None


class StageStatus(CrdModel):
    stage: int
    pod: str | None = None
    """The pod of the instance's own stage."""
    node: str | None = None
    ready: bool = False
    """The pod has loaded its weights."""
    pair: Annotated[str, Field(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}$")] | None = None
    """The stage that is to keep copies of its KV blocks, and to stand in for it first, as instance.stage: in another
    failure domain, if one is free. Remembered here, so that pairs change only for a reason."""
    served_by: str | None = None
    """The stage that does the work now, as instance.stage: the own one, or a donor."""
    kept_by: str | None = None
    """The stage that keeps copies of the KV blocks that are made there, as instance.stage; absent if nobody does."""
    lag_seconds: int | None = None
    """How long the oldest full KV block has been waiting to be copied, rounded down to 0 or a power of two."""
    leaving: str | None = None
    """Why the stage should not stay where it is; absent if nothing speaks against it."""
    warning: str | None = None
    """What is said of its pod or node, and has no consequence."""
    successor: str | None = None
    """The pod that is to take the place of this one."""
    restarts: int = 0
    """Of the container, in this pod."""
    last_exit: ExitStatus | None = None


class InstancePhase(StrEnum):
    PENDING = "Pending"
    """Its engine does not answer yet."""
    STARTING = "Starting"
    """The engine waits for its stages."""
    VERIFYING = "Verifying"
    """The engine says that it serves; a real token is awaited."""
    SERVING = "Serving"
    """Serves on its own stages."""
    DEGRADED = "Degraded"
    """Serves, with a donor in place of at least one own stage."""
    RECOVERING = "Recovering"
    """Re-stitches at this moment."""
    WAITING = "Waiting"
    """A stage is lost and nobody can stand in."""
    FAILED = "Failed"
    """Cannot serve until a person helps."""
    DRAINING = "Draining"
    """It could serve, but gives way: it gets no new requests and finishes those that it has."""
    UNREACHABLE = "Unreachable"
    """It has served, and its engine does not answer any more."""


class InstanceStatus(CrdModel):
    instance: int
    phase: InstancePhase
    message: str | None = None
    engine: str | None = None
    """The engine's pod."""
    node: str | None = None
    """The node of the engine's pod."""
    serving: bool = False
    """Requests are sent to it."""
    term: int | None = None
    epoch: int | None = None
    plan_version: int | None = None
    verified: str | None = None
    """The incarnation of the engine that has served a real token."""
    first_served_at: datetime | None = None
    stages: Annotated[
        tuple[StageStatus, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["stage"]}),
    ] = ()


class RecoveryStatus(CrdModel):
    """One re-stitch, as the engine measured it."""

    id: str
    instance: int
    kind: RecoveryKind
    stages: tuple[int, ...]
    """The places of the pipeline that changed hands."""
    reason: str | None = None
    """How the loss was noticed."""
    donor: str | None = None
    """Who stood in, as instance.stage."""
    detected_at: datetime
    resumed_at: datetime | None = None
    """First token after it."""
    restored_at: datetime | None = None
    """When the instance's own stages were back in their places."""
    phases: dict[str, float] = Field(default={})
    """Milliseconds of each phase. ``total`` is wait, fence, stitch and resume; rollBack lies within resume."""
    took: str | None = None
    """The total, for people."""
    requests_affected: int = 0
    tokens_recomputed: int = 0
    """Tokens of these requests whose KV cache had to be computed again."""
    tokens_kept: int = 0
    """Tokens of these requests whose KV cache was there: with the survivors, and as copies with the donor."""


class FailureCause(StrEnum):
    EXITED = "Exited"
    """The process ended."""
    ENDED = "Ended"
    """The pod ended: it was evicted, or the node was shut down."""
    SILENT = "Silent"
    """The process was not heard any more, or did not hear what it was told, and did not end."""
    HUNG = "Hung"
    """The process was in one step for longer than any honest one takes."""
    DEVICE_UNHEALTHY = "DeviceUnhealthy"
    """The kubelet says that a device of the pod is not well."""
    NODE_LOST = "NodeLost"
    """The node is not Ready, or does not exist any more."""
    NODE_CONDITION = "NodeCondition"
    """A condition of the node says that stages should not be there."""


class FailureStatus(CrdModel):
    """One failure of a stage, or of the node that it was on."""

    at: datetime
    cause: FailureCause
    stage: str | None = None
    """As instance.stage; absent if it is a matter of the node."""
    pod: str | None = None
    node: str | None = None
    exit_code: int | None = None
    message: str = ""
    """The last line of the process, or what was said of the device or node."""


class NodeStatus(CrdModel):
    """A node that is avoided."""

    name: str
    failures: int
    """In the window."""
    evidence: str
    """The failures, newest first."""
    until: datetime
    """When the oldest of those that count leaves the window."""


class BreakerStatus(CrdModel):
    """The breaker for correlated faults. While it is tripped, nothing that may still work is moved or deleted."""

    tripped: bool
    at: datetime
    """When it tripped, or was reset."""
    message: str = ""
    retry: str | None = None
    """The value of the retry annotation at that time; another value resets the breaker."""


class PlanStatus(CrdModel):
    """Which plan was published. Written before the plan is sent, so that a version never names two plans."""

    version: int
    hash: str


class DrainReason(StrEnum):
    ROLL_OUT = "RollOut"
    """Its pods were made from an older spec."""
    SCALE_DOWN = "ScaleDown"
    """The spec asks for fewer instances."""


class DrainStatus(CrdModel):
    """The instance that gives way; there is one at a time. Called off when the others cannot do without it."""

    instance: int
    reason: DrainReason
    since: datetime
    deleted_at: datetime | None = None
    """When its pods were told to go: from then on there is no way back."""


class HoldStatus(CrdModel):
    """Evidence of a pod that cannot work as configured. The operator makes no such pod until the spec changes."""

    generation: int
    """The generation of the spec that it was made from."""
    retry: str | None = None
    """The value of the retry annotation at that time."""
    pod: str
    role: str
    message: str
    """The last words of the process."""
    at: datetime


class ResilientLLMStatus(CrdModel):
    """What is."""

    observed_generation: int | None = None
    """Of the spec that the rest was made from; -1 until the operator has seen the object."""
    conditions: Annotated[
        tuple[Condition, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = ()
    ready: str | None = None
    """Instances that serve, of those asked for: 2/2."""
    endpoint: str | None = None
    """Base URL for OpenAI clients, inside the cluster."""
    instances: Annotated[
        tuple[InstanceStatus, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["instance"]}),
    ] = ()
    last_recovery: RecoveryStatus | None = None
    """The last loss of a stage."""
    recoveries: Annotated[
        tuple[RecoveryStatus, ...], Field(max_length=10, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """The last ten re-stitches, oldest first."""
    plan: PlanStatus | None = None
    hold: HoldStatus | None = None
    drain: DrainStatus | None = None
    failures: Annotated[
        tuple[FailureStatus, ...], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = ()
    """The last failures of stages and their nodes, oldest first."""
    nodes: Annotated[
        tuple[NodeStatus, ...],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}),
    ] = ()
    """Nodes that are avoided because stages failed there again and again."""
    breaker: BreakerStatus | None = None
    would_do: Annotated[tuple[str, ...], Field(json_schema_extra={"x-kubernetes-list-type": "atomic"})] = ()
    """What would be done, if spec.recovery.mode were Act."""


class ResilientLLM(CrdModel):
    """Keeps one model served by several instances, whose stages stand in for each other.

    ``metadata`` is left as the API server gave it; the schema of it is the API server's own.
    """

    model_config = ConfigDict(
        json_schema_extra=validated(
            rule(
                f"self.metadata.name.size() <= {NAME_MAX_LENGTH} && "
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                f"the name must have at most {NAME_MAX_LENGTH} characters, begin with a letter and consist of a-z, "
                "0-9 and '-', because pods and the Service are named after it",
            )
        )
    )

    metadata: dict[str, Any]
    spec: ResilientLLMSpec
    status: ResilientLLMStatus | None = None
