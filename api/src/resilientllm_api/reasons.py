"""Reasons of conditions and events. They are API: programs match on them, so they are never renamed.

Each says, in its docstring, what is the matter; the condition's message names the object and what to do.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Reasons of conditions."""

    # All is well.
    ALL_INSTANCES_SERVING = "AllInstancesServing"
    """Every instance serves, and a real token of each was seen."""
    SOME_INSTANCES_SERVING = "SomeInstancesServing"
    """At least one instance serves, but not all."""
    AS_SPECIFIED = "AsSpecified"
    """Nothing is left to do: all pods run as the spec says."""

    # Time will mend it.
    PODS_STARTING = "PodsStarting"
    """Pods are being made, or their containers do not run yet."""
    STAGES_LOADING = "StagesLoading"
    """Stages load their weights, or engines attach to them."""
    VERIFYING = "Verifying"
    """An engine says that it serves; a real token is awaited."""
    ROLLING_OUT = "RollingOut"
    """Pods are being replaced because the spec changed."""
    SCALING_DOWN = "ScalingDown"
    """An instance that the spec does not ask for any more finishes its requests, or waits for its turn."""
    RESTORING_CAPACITY = "RestoringCapacity"
    """A lost stage or engine is being brought back."""
    NO_INSTANCE_SERVING = "NoInstanceServing"
    """No instance can take a request."""

    # Served, and then something was lost.
    STAGE_BORROWED = "StageBorrowed"
    """A donor stands in for a lost stage: requests are served, with less capacity."""
    STAGE_LOST = "StageLost"
    """A stage is lost and no donor can stand in: its instance does not serve."""
    ENGINE_LOST = "EngineLost"
    """The engine of an instance does not answer."""

    # Of ReplicationHealthy.
    REPLICATING = "Replicating"
    """KV blocks of every place are kept by a second stage, and the copies keep up."""
    SHARED_FAILURE_DOMAIN = "SharedFailureDomain"
    """Copies are kept and keep up, but a stage and its pair are in one failure domain, because no other was free."""
    NO_KEEPER = "NoKeeper"
    """Fewer than two stages with the same weights live, so nobody can keep copies of their KV blocks."""
    NOT_REPLICATING = "NotReplicating"
    """A second stage lives, but does not get the copies: it has no KV cache yet, or is not reached."""
    LAGGING = "Lagging"
    """Copies are made, but more slowly than KV blocks."""
    NOT_SUPPORTED = "NotSupported"
    """These stages or this model cannot replicate: several ranks in a stage, or several KV cache groups."""
    ENGINE_SILENT = "EngineSilent"
    """An engine does not answer or has not attached, so it is not known whether copies are kept."""
    DISABLED = "Disabled"
    """Replication is switched off in the spec."""

    # A person must help.
    PAUSED = "Paused"
    """A person has paused changes by annotation."""
    ROLL_OUT_STOPPED = "RollOutStopped"
    """Pods made from the new spec do not work, so no further instance is changed."""
    CONFIGURATION_REJECTED = "ConfigurationRejected"
    """A process found that it cannot work as configured. No such pod is made until the spec changes."""
    IMAGE_PULL_FAILED = "ImagePullFailed"
    """A node cannot get the image."""
    UNSCHEDULABLE = "Unschedulable"
    """No node can take a pod."""
    CONTAINER_CANNOT_START = "ContainerCannotStart"
    """The kubelet cannot make a container: a volume, a Secret or a security rule is in the way."""
    CONTAINER_CRASHING = "ContainerCrashing"
    """A process ends again and again."""
    ENGINE_FAILED = "EngineFailed"
    """An engine cannot attach to its stages, for a reason that waiting does not mend."""
    VERIFICATION_FAILED = "VerificationFailed"
    """An engine says that it serves, but answered no completion."""
    POD_REFUSED = "PodRefused"
    """The API server refuses a pod: a quota, a policy, or bad resources."""
    NAME_TAKEN = "NameTaken"
    """An object that belongs to somebody else has the name that is needed."""
    SPEC_UNREADABLE = "SpecUnreadable"
    """The spec passed the schema of the cluster, but this operator cannot read it."""


class EventReason(StrEnum):
    """Reasons of events; one event a transition. What a person must mend has the condition's reason."""

    INSTANCE_READY = "InstanceReady"
    """An instance serves on its own stages, and a real token was seen."""
    INSTANCE_DRAINING = "InstanceDraining"
    """An instance gives way: it gets no new requests and finishes those that it has."""
    INSTANCE_LOST = "InstanceLost"
    """An instance that served does not serve any more."""
    STAGE_LOST = "StageLost"
    """A stage is lost and no donor can stand in."""
    BORROWED = "Borrowed"
    """A donor stands in for a lost stage."""
    STAGE_RETURNED = "StageReturned"
    """A lost stage came back, and nobody else had stood in."""
    SWAPPED_BACK = "SwappedBack"
    """The instance's own stage is back in its place."""
    REPLICATION_HEALTHY = "ReplicationHealthy"
    """KV blocks of every place are kept by a second stage now."""
    REPLICATION_UNHEALTHY = "ReplicationUnhealthy"
    """KV blocks of a place are not kept by a second stage any more, or their copies lag."""
