"""What its node, its devices and its own state say of a pod: whether its stage should leave it. Pure.

``Move`` is for what still works: engines go to a donor, and then to a new pod, without losing anything. ``Borrow`` is
for what is lost or not to be trusted. Engines notice a loss by themselves, and long before Kubernetes does; what comes
from here is what they cannot know.

A node that is not Ready is no proof that a stage there is lost: its kubelet may be down, or cut off from the API server
alone. So it is ``Move`` as long as the stage's engine hears from it, and that not at once: when an API server comes
back after a while, Kubernetes takes nodes for lost that are well, and does so again and again for a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from resilientllm_api.crd import NodeAction, NodeConditionRule, StragglerPolicy
from resilientllm_api.engine_state import Slowness

from resilientllm_operator.names import Role
from resilientllm_operator.pods import NODE_LOSS_TOLERATION_SECONDS
from resilientllm_operator.world import Contact, NodeView, PodView, Taint, Toleration, World

NOT_READY_PATIENCE = timedelta(seconds=NODE_LOSS_TOLERATION_SECONDS)
"""So long a stage that is heard stays on a node that is not Ready. Then Kubernetes evicts its pod, too."""

BUILT_IN_CONDITIONS = (
    # NVSentinel sets a condition for a fatal fault only; what is not fatal is an event.
    *(
        NodeConditionRule(type=kind, action=NodeAction.MOVE)
        for kind in (
            *(
                f"Gpu{part}Watch"
                for part in ("Mem", "Thermal", "Pcie", "Power", "Inforom", "Sm", "Nvlink", "Mcu", "Pmu", "Driver")
            ),
            "SysLogsXIDError",
            "SysLogsSXIDError",
            "NVSwitchFatalError",
            "NVSwitchDown",
        )
    ),
    NodeConditionRule(type="SysLogsGPUFallenOff", action=NodeAction.BORROW),
    NodeConditionRule(type="GpuDcgmConnectivityFailure", action=NodeAction.WARN),
    NodeConditionRule(type="GpuCpusetWatch", action=NodeAction.WARN),
)
_MIRRORED = {f"node.kubernetes.io/{taint}" for taint in ("not-ready", "unreachable", "unschedulable")}
"""Taints that say again what the node itself says."""
_GONE = {"node.kubernetes.io/out-of-service", "node.cloudprovider.kubernetes.io/shutdown"}
_PRESSURE = {f"node.kubernetes.io/{kind}" for kind in ("memory-pressure", "disk-pressure", "pid-pressure")}
"""They come and go, and the kubelet itself ends pods if they stay."""
_OF_STRAGGLERS = {StragglerPolicy.REPORT: NodeAction.WARN, StragglerPolicy.MOVE: NodeAction.MOVE}
_MILDEST_FIRST = list(NodeAction)
_MOST_WORDS = 200


@dataclass(frozen=True)
class Signal:
    action: NodeAction
    reason: str
    """For people."""

    @property
    def is_to_go(self) -> bool:
        return self.action in (NodeAction.MOVE, NodeAction.BORROW)


Signals = Mapping[str, Signal]
"""By the uid of the pod; a pod of which nothing is said is not in it."""


def signals_of(world: World, avoided: Mapping[str, str], now: datetime) -> Signals:
    """``avoided``: why a node is avoided, by its name."""
    found = {pod.uid: signal for pod in world.pods if (signal := _strongest(_signals(world, pod, avoided, now)))}
    return found


def is_heard(world: World, pod: PodView) -> bool:
    """Whether the stage's own engine is connected to it. As long as that cannot be known, nothing is lost."""
    if pod.loads or not _is_told_of(world, pod):
        return True
    engine = world.engine_pod(pod.slot.instance)
    view = world.engine(engine)
    if view.state is None:
        # An operator that has only just begun knows no engine, and must not give up on all stages for that. Nor must it
        # take back what the last one knew.
        unknown = view.contact is Contact.UNKNOWN and engine is not None and engine.ip is not None
        return unknown and not _was_left(world, pod)
    return any(each.own_connected for each in view.state.stages if each.stage == pod.slot.stage)


def _is_told_of(world: World, pod: PodView) -> bool:
    """Whether engines know this pod: it fills its slot, and not only waits to do so."""
    return any(stage.pod == pod.name for each in world.object.status.instances for stage in each.stages)


def _was_left(world: World, pod: PodView) -> bool:
    """Whether another stage stood in for it when the status was written."""
    own = pod.slot.stage_id
    recorded = (
        stage for each in world.object.status.instances if each.instance == own.instance for stage in each.stages
    )
    return any(each.pod == pod.name and each.served_by not in (None, str(own)) for each in recorded)


def is_given_up(node: NodeView, heard: bool, now: datetime) -> bool:
    """Whether a node has not been Ready for longer than may be a mistake. ``heard``: what is on it works."""
    said = node.conditions.get("Ready")
    since = said.since if said is not None else None
    return node.ready is not True and (not heard or since is None or now - since >= NOT_READY_PATIENCE)


def condition_rules(world: World) -> Mapping[tuple[str, str], NodeAction]:
    """What a type and a status of a node's condition mean: the built-in list, and what the spec says otherwise."""
    rules = (*BUILT_IN_CONDITIONS, *world.object.spec.recovery.node_conditions)
    return {(rule.type, rule.status): rule.action for rule in rules}


def unfit_nodes(world: World, avoided: Mapping[str, str]) -> frozenset[str]:
    """Nodes that no new stage is placed on, beside those that the scheduler keeps pods off by itself."""
    rules = condition_rules(world)
    faulty = {
        node.name
        for node in world.nodes.values()
        if node.deleting or any(signal.is_to_go for signal in _of_conditions(node, rules))
    }
    sick = {pod.node for pod in world.pods if pod.node is not None and any(each.certain for each in pod.ailments)}
    slow = {pod.node for pod in world.pods if pod.node is not None and _slowness(world, pod) is not None}
    return frozenset(faulty | sick | slow | avoided.keys())


def _strongest(signals: Iterator[Signal]) -> Signal | None:
    """One signal of the strongest action, with all its reasons."""
    found = list(signals)
    if not found:
        return None
    action = max((each.action for each in found), key=_MILDEST_FIRST.index)
    return Signal(action, "; ".join(dict.fromkeys(each.reason for each in found if each.action is action)))


def _signals(world: World, pod: PodView, avoided: Mapping[str, str], now: datetime) -> Iterator[Signal]:
    if pod.slot.role is Role.ENGINE:
        yield from _of_an_engine(world, pod, now)
        return
    if pod.ended:
        yield Signal(NodeAction.BORROW, f"pod {pod.name} has ended")
    elif pod.leaving:
        yield Signal(NodeAction.MOVE, f"pod {pod.name} has been told to end")
    for each in pod.ailments:
        health, words = (
            "unhealthy" if each.certain else "in unknown health",
            f": {each.message}" if each.message else "",
        )
        action = NodeAction.BORROW if each.certain else NodeAction.WARN
        yield Signal(action, _short(f"device {each.device} ({each.resource}) on node {pod.node} is {health}{words}"))
    if pod.node is not None and pod.node in avoided:
        yield Signal(NodeAction.MOVE, f"node {pod.node} is avoided: {avoided[pod.node]}")
    if (slow := _slowness(world, pod)) is not None:
        yield Signal(_OF_STRAGGLERS[world.object.spec.recovery.stragglers], f"pod {pod.name} is slow: {slow}")
    yield from _of_the_node(world, pod, is_heard(world, pod), now)
    if (node := world.nodes.get(pod.node or "")) is not None:
        yield from _of_conditions(node, condition_rules(world))
    if _says_that_it_ends(world, pod) and not pod.leaving:
        yield Signal(NodeAction.WARN, f"pod {pod.name} says that it was told to end")


def _of_an_engine(world: World, pod: PodView, now: datetime) -> Iterator[Signal]:
    """An engine has no device, and cannot move live: its streams would break off. It ends when its pod is told to."""
    heard = world.engine(pod).contact is not Contact.SILENT
    for signal in _of_the_node(world, pod, heard, now):
        yield Signal(NodeAction.WARN, signal.reason) if heard or signal.action is NodeAction.MOVE else signal


def _of_the_node(world: World, pod: PodView, heard: bool, now: datetime) -> Iterator[Signal]:
    if pod.node is None or not world.nodes:
        return
    node = world.nodes.get(pod.node)
    if node is None:
        # A pod that has an address has been running there, so the node was known once.
        if pod.ip is not None:
            yield Signal(NodeAction.BORROW, f"node {pod.node} does not exist any more")
        return
    if node.deleting:
        yield Signal(NodeAction.MOVE, f"node {node.name} is being deleted")
    if node.ready is not True:
        said = node.conditions.get("Ready")
        words = f" ({said.reason})" if said and said.reason else ""
        given_up = NodeAction.MOVE if heard else NodeAction.BORROW
        action = given_up if is_given_up(node, heard, now) else NodeAction.WARN
        yield Signal(action, f"node {node.name} is not Ready{words}")
    if node.unschedulable:
        yield Signal(NodeAction.MOVE, f"node {node.name} is cordoned")
    for taint in node.taints:
        yield from _of_a_taint(node, taint, pod)


def _of_a_taint(node: NodeView, taint: Taint, pod: PodView) -> Iterator[Signal]:
    reason = f"node {node.name} has the taint {taint}"
    if taint.effect not in ("NoSchedule", "NoExecute") or taint.key in _MIRRORED:
        return
    if taint.key in _GONE:
        yield Signal(NodeAction.BORROW, reason)
    elif not any(_tolerates(each, taint) for each in pod.tolerations):
        yield Signal(NodeAction.WARN if taint.key in _PRESSURE else NodeAction.MOVE, reason)


def _of_conditions(node: NodeView, rules: Mapping[tuple[str, str], NodeAction]) -> Iterator[Signal]:
    for kind, condition in sorted(node.conditions.items()):
        action = rules.get((kind, condition.status), NodeAction.IGNORE)
        if action is not NodeAction.IGNORE:
            words = condition.message or condition.reason
            said = f"node {node.name} has {kind}={condition.status}{f': {words}' if words else ''}"
            yield Signal(action, _short(said))


def _tolerates(toleration: Toleration, taint: Taint) -> bool:
    """As the scheduler has it; but what is tolerated for a while only is a reason to go."""
    return (
        toleration.key in (None, taint.key)
        and toleration.value in (None, taint.value)
        and toleration.effect in (None, taint.effect)
        and toleration.seconds is None
    )


def _says_that_it_ends(world: World, pod: PodView) -> bool:
    state = world.engine(world.engine_pod(pod.slot.instance)).state
    return state is not None and any(each.own_leaving for each in state.stages if each.stage == pod.slot.stage)


def _slowness(world: World, pod: PodView) -> Slowness | None:
    """What the stage's own engine says of it, if it speaks of this very pod: another one may have taken the place."""
    state, status = world.engine(world.engine_pod(pod.slot.instance)).state, world.object.status
    if pod.slot.role is Role.ENGINE or state is None:
        return None
    if status.plan is None or state.plan_version != status.plan.version:
        return None
    place = pod.slot.stage_id
    seated = next((each.stages for each in status.instances if each.instance == place.instance), ())
    if not any(each.stage == place.stage and each.pod == pod.name for each in seated):
        return None
    return next((each.own_slow for each in state.stages if each.stage == place.stage), None)


def _short(words: str) -> str:
    line = " ".join(words.split())
    return line if len(line) <= _MOST_WORDS else f"{line[: _MOST_WORDS - 1]}…"
