"""What is the matter, in order of what a person should look at first. Pure.

A trouble is something that waiting may not mend. Each has a message that names the object and the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from resilientllm_api.crd import RETRY_ANNOTATION, HoldStatus, InstancePhase, InstanceStatus
from resilientllm_api.reasons import Reason

from resilientllm_operator.assessment import Assessment
from resilientllm_operator.breaker import Restraint
from resilientllm_operator.names import slice_name, token_secret_name
from resilientllm_operator.world import Owner, PodView, World, last_line

_IMAGE = {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
_CANNOT_START = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_CRASHING_RESTARTS = 3
"""One or two restarts are how a killed process comes back."""


@dataclass(frozen=True)
class Trouble:
    reason: Reason
    message: str


def troubles_of(
    world: World,
    hold: HoldStatus | None,
    instances: Sequence[InstanceStatus],
    assessment: Assessment,
    now: datetime,
) -> list[Trouble]:
    return [
        *_held(world, hold),
        *_names_taken(world),
        *_refused(world),
        *_pods(world, instances, now),
        *_engines(world, instances),
        *_held_back(instances, assessment),
    ]


def pod_trouble(pod: PodView, namespace: str) -> Trouble | None:
    """What keeps one pod from running."""
    logs = f"kubectl -n {namespace} logs {pod.name} --previous"
    if pod.unschedulable is not None:
        return Trouble(
            Reason.UNSCHEDULABLE,
            f"no node can take pod {pod.name} ({pod.slot}): {pod.unschedulable} {_placement_advice(pod)}",
        )
    if pod.waiting is not None and pod.waiting.reason in _IMAGE:
        where = f" on node {pod.node}" if pod.node else ""
        return Trouble(
            Reason.IMAGE_PULL_FAILED,
            f"pod {pod.name} ({pod.slot}) cannot get its image{where}: {pod.waiting.message or pod.waiting.reason}. "
            "Correct spec.image, or make the image available to the nodes.",
        )
    if pod.waiting is not None and pod.waiting.reason in _CANNOT_START:
        return Trouble(
            Reason.CONTAINER_CANNOT_START,
            f"the container of pod {pod.name} ({pod.slot}) cannot be made: "
            f"{pod.waiting.message or pod.waiting.reason}. See kubectl -n {namespace} describe pod {pod.name}.",
        )
    if not pod.ready and pod.last_exit is not None and pod.restarts >= _CRASHING_RESTARTS:
        return Trouble(
            Reason.CONTAINER_CRASHING,
            f"pod {pod.name} ({pod.slot}) has ended {pod.restarts} times, last with exit code {pod.last_exit.code}: "
            f"{last_line(pod.last_exit.message)}. See {logs}.",
        )
    return None


def takes_over_soon(world: World, pod: PodView, now: datetime) -> bool:
    """Whether a pod that finds no node waits for nothing but the end of the one whose place it takes."""
    before = (each for each in world.leaving(pod.slot) if not _on_a_lost_node(world, each))
    return pod.unschedulable is not None and any(each.ends_by is not None and now < each.ends_by for each in before)


def _on_a_lost_node(world: World, pod: PodView) -> bool:
    """Whether nobody is there to end it. Where nodes may not be seen, it is not known to be."""
    if not world.nodes or pod.node is None:
        return False
    node = world.nodes.get(pod.node)
    return node is None or node.ready is not True


def _placement_advice(pod: PodView) -> str:
    """The next step, by the words that the scheduler uses."""
    said = (pod.unschedulable or "").lower()
    if "persistentvolumeclaim" in said:
        return "Make the claim that spec.model.volume names, or correct the name."
    if "anti-affinity" in said:
        return "The copies of a stage never share a node: add nodes, or ask for fewer instances."
    return f"Add nodes or free their resources, or ask for less in spec.{pod.slot.role}.resources."


def _held(world: World, hold: HoldStatus | None) -> Iterator[Trouble]:
    if hold is not None:
        name, namespace = world.object.name, world.object.namespace
        yield Trouble(
            Reason.CONFIGURATION_REJECTED,
            f"pod {hold.pod} ({hold.role}) cannot work as configured: {hold.message}. Correct the spec (kubectl -n "
            f"{namespace} edit rllm {name}; spec.model and spec.stages cannot change, so for them delete it and apply "
            f"a corrected one), or what it refers to. To try again without a change: kubectl -n {namespace} annotate "
            f'--overwrite rllm {name} {RETRY_ANNOTATION}="$(date)".',
        )


def _names_taken(world: World) -> Iterator[Trouble]:
    name = world.object.name
    for owner, what in (
        (world.token, f"Secret {token_secret_name(name)}"),
        (world.service_owner, f"Service {name}"),
        (world.endpoints_owner, f"EndpointSlice {slice_name(name)}"),
        *((Owner.FOREIGN, f"PodDisruptionBudget {each}") for each, ours in world.budgets.items() if ours is None),
    ):
        if owner is Owner.FOREIGN:
            yield Trouble(
                Reason.NAME_TAKEN,
                f"{what} exists and does not belong to this object: delete or rename it, or give this ResilientLLM "
                "another name.",
            )


def _refused(world: World) -> Iterator[Trouble]:
    for pod, refusal in sorted(world.refusals.items()):
        yield Trouble(Reason.POD_REFUSED, f"the API server refuses pod {pod}: {refusal.message}")


def _held_back(instances: Sequence[InstanceStatus], assessment: Assessment) -> Iterator[Trouble]:
    """What the breaker keeps from being done; while it keeps nothing, it is no trouble."""
    held = [f"{each.instance}.{stage.stage}" for each in instances for stage in each.stages if stage.leaving]
    if held and assessment.breaker is not None and assessment.restraint is Restraint.TRIPPED:
        words = f"Stage {', '.join(held)} should move, and is left where it is: {assessment.breaker.message}"
        yield Trouble(Reason.BREAKER_TRIPPED, words)


def _pods(world: World, instances: Sequence[InstanceStatus], now: datetime) -> Iterator[Trouble]:
    stays = {
        stage.successor: f" Meanwhile it stays where it is, on node {stage.node}, although {stage.leaving}."
        for each in instances
        for stage in each.stages
        if stage.successor is not None and stage.leaving is not None and stage.ready
    }
    found = [
        (replace(trouble, message=trouble.message + stays.get(pod.name, "")), pod.name in stays)
        for pod in world.pods
        if not pod.leaving and not takes_over_soon(world, pod, now)
        if (trouble := pod_trouble(pod, world.object.namespace))
    ]
    order = [
        Reason.UNSCHEDULABLE,
        Reason.IMAGE_PULL_FAILED,
        Reason.CONTAINER_CANNOT_START,
        Reason.CONTAINER_CRASHING,
    ]
    # First what is missing: where the older pod stays, nobody waits for the next one.
    found.sort(key=lambda each: (each[1], order.index(each[0].reason), each[0].message))
    yield from (trouble for trouble, _ in found)


def _engines(world: World, instances: Sequence[InstanceStatus]) -> Iterator[Trouble]:
    for instance in instances:
        error = world.engine(world.engine_pod(instance.instance)).verify_error
        if instance.phase is InstancePhase.FAILED:
            yield Trouble(
                Reason.ENGINE_FAILED,
                f"instance {instance.instance} cannot serve: {instance.message or 'its engine does not say why'}. "
                f"See kubectl -n {world.object.namespace} logs {instance.engine}.",
            )
        elif instance.phase is InstancePhase.VERIFYING and error is not None:
            yield Trouble(
                Reason.VERIFICATION_FAILED,
                f"the engine of instance {instance.instance} says that it serves, but gave no token: {error}. "
                f"It is asked again. See kubectl -n {world.object.namespace} logs {instance.engine}.",
            )
