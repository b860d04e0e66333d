"""What failed, when and where: the record that repeat offenders and correlated faults are found in. Pure.

What is done to a node on purpose (a cordon, a taint, a drain) is no failure. Times come from Kubernetes and from
engines where they know them, so that the record is the same whoever looks, and however often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from resilientllm_api.crd import FailureCause, FailureStatus, NodeAction, NodeStatus
from resilientllm_api.durations import parse_seconds
from resilientllm_api.engine_state import LossReason, RecoveryKind

from resilientllm_operator.names import Role
from resilientllm_operator.signals import condition_rules, is_given_up, is_heard
from resilientllm_operator.world import BAD_CONFIGURATION_EXIT_CODE, PodView, World, last_line

KEPT = 32
ONE_INCIDENT = timedelta(seconds=10)
"""What fails on one node within that time failed together, unless it is one process that fails again."""
_NOT_THE_NODES_FAULT = {0, BAD_CONFIGURATION_EXIT_CODE}
_MOST_WORDS = 300
_UNTOLD = {
    LossReason.SILENCE: (FailureCause.SILENT, "its engine did not hear from it any more"),
    LossReason.UNREACHABLE: (FailureCause.SILENT, "it did not hear what its engine told it any more"),
    LossReason.HANG: (FailureCause.HUNG, "it did not come out of a step any more"),
}
"""What the pod itself does not tell: no exit does."""


def window_of(world: World) -> timedelta:
    return timedelta(seconds=parse_seconds(world.object.spec.recovery.repeat_offender.window))


def failure_record(world: World, now: datetime) -> tuple[FailureStatus, ...]:
    """The last failures, oldest first: those of before, and what has failed since."""
    known = list(world.object.status.failures)
    # What was forgotten because there was so much after it must not come back as new.
    oldest = _utc(known[0].at) if len(known) == KEPT else now - window_of(world)
    for failure, is_dated in _seen(world, now):
        # What has no time of its own, and is said again within the window, is the same one that lasts.
        since = None if is_dated else now - window_of(world)
        if _utc(failure.at) >= oldest and not any(_is_same(failure, each, since) for each in known):
            known.append(failure)
    return tuple(sorted(known, key=lambda each: (_utc(each.at), each.node or "", each.stage or "")))[-KEPT:]


def avoided_nodes(world: World, failures: Sequence[FailureStatus], now: datetime) -> tuple[NodeStatus, ...]:
    """The nodes on which stages failed too often in the window."""
    policy, window = world.object.spec.recovery.repeat_offender, window_of(world)
    recent = [each for each in failures if _utc(each.at) > now - window]
    found = []
    for node in sorted({each.node for each in recent if each.node}):
        blamed = [each for each in recent if each.node == node and not _is_the_stages_own(each, recent)]
        incidents = _incidents(blamed)
        if len(incidents) >= policy.failures:
            evidence = "; ".join(map(_evidence, reversed(incidents[-policy.failures :])))
            until = _utc(incidents[-policy.failures].at) + window
            found.append(NodeStatus(name=node, failures=len(incidents), evidence=evidence, until=until))
    return tuple(found)


Seen = tuple[FailureStatus, bool]
"""A failure, and whether its time is known. If not, it has the present one."""


def _seen(world: World, now: datetime) -> Iterator[Seen]:
    stages = [pod for pod in world.pods if pod.slot.role is Role.STAGE]
    for pod in stages:
        yield from _of_a_pod(pod, now)
    for name in sorted({pod.node for pod in stages if pod.node}):
        yield from _of_a_node(world, name, [pod for pod in stages if pod.node == name], now)
    yield from _told_by_engines(world)


def _of_a_pod(pod: PodView, now: datetime) -> Iterator[Seen]:
    def failure(cause: FailureCause, at: datetime | None, message: str, exit_code: int | None = None) -> Seen:
        status = FailureStatus(
            at=at or now,
            cause=cause,
            stage=str(pod.slot.stage_id),
            pod=pod.name,
            node=pod.node,
            exit_code=exit_code,
            message=message[:_MOST_WORDS],
        )
        return status, at is not None

    if pod.ended:
        yield failure(FailureCause.ENDED, None, "the pod has ended")
    elif pod.last_exit is not None and not pod.leaving and pod.last_exit.code not in _NOT_THE_NODES_FAULT:
        yield failure(FailureCause.EXITED, pod.last_exit.at, last_line(pod.last_exit.message), pod.last_exit.code)
    for each in pod.ailments:
        if each.certain:
            yield failure(FailureCause.DEVICE_UNHEALTHY, None, f"{each.resource} {each.device}")


def _of_a_node(world: World, name: str, pods: Sequence[PodView], now: datetime) -> Iterator[Seen]:
    def failure(cause: FailureCause, since: datetime | None, message: str) -> Seen:
        # A stage that was put on a faulty node met the fault only then.
        at = max(since, min(pod.created for pod in pods)) if since is not None else now
        return FailureStatus(at=at, cause=cause, node=name, message=message[:_MOST_WORDS]), since is not None

    if not world.nodes:
        return
    node = world.nodes.get(name)
    if node is None:
        if any(pod.ip is not None for pod in pods):
            yield failure(FailureCause.NODE_LOST, None, "the node does not exist any more")
        return
    heard = all(is_heard(world, pod) for pod in pods)
    if is_given_up(node, heard, now) and (said := node.conditions.get("Ready")) is not None:
        yield failure(FailureCause.NODE_LOST, said.since, f"not Ready: {said.reason}")
    rules = condition_rules(world)
    for kind, condition in sorted(node.conditions.items()):
        if rules.get((kind, condition.status)) in (NodeAction.MOVE, NodeAction.BORROW):
            yield failure(FailureCause.NODE_CONDITION, condition.since, kind)


def _told_by_engines(world: World) -> Iterator[Seen]:
    """Stages that fell silent or do not move: their process hangs, or the network does, and no exit tells of it."""
    for view in world.engines.values():
        for recovery in view.state.recoveries if view.state is not None else ():
            if recovery.kind is not RecoveryKind.BORROW or recovery.reason not in _UNTOLD:
                continue
            assert view.state is not None
            cause, message = _UNTOLD[recovery.reason]
            for place in recovery.stages:
                stage = f"{view.state.instance}.{place}"
                pod, node = _where(world, stage, recovery.detected_at)
                failure = FailureStatus(
                    at=recovery.detected_at, cause=cause, stage=stage, pod=pod, node=node, message=message
                )
                yield failure, True


def _where(world: World, stage: str, at: datetime) -> tuple[str | None, str | None]:
    """The pod of a stage at that time, and its node. Nobody is blamed if that cannot be told any more.

    An engine tells of a loss when it is over, and when it had to wait for a donor another pod is there by then.
    """
    pods = [pod for pod in world.pods if pod.slot.role is Role.STAGE and str(pod.slot.stage_id) == stage]
    there = [pod for pod in pods if pod.created <= _utc(at)]
    if there:
        newest = max(there, key=lambda pod: pod.created)
        return newest.name, newest.node
    for instance in world.object.status.instances:
        for known in instance.stages:
            if f"{instance.instance}.{known.stage}" == stage and known.pod not in {pod.name for pod in pods}:
                return known.pod, known.node
    return None, None


def _is_same(failure: FailureStatus, known: FailureStatus, since: datetime | None) -> bool:
    """Whether a failure is in the record already. ``since``: it has no time of its own, any since then is it."""
    if (failure.cause, failure.stage) != (known.cause, known.stage):
        return False
    if failure.cause in (FailureCause.SILENT, FailureCause.HUNG):
        # The pod that was lost may have been replaced since, and so may what is known of it.
        return _utc(failure.at) == _utc(known.at)
    if (failure.node, failure.pod, failure.message) != (known.node, known.pod, known.message):
        return False
    return _utc(failure.at) == _utc(known.at) or (since is not None and _utc(known.at) >= since)


def _incidents(failures: Iterable[FailureStatus]) -> list[FailureStatus]:
    """One failure for each incident: three stages that a node took with it have not failed three times."""
    found: list[FailureStatus] = []
    together: set[str | None] = set()
    for each in sorted(failures, key=lambda each: _utc(each.at)):
        if not found or each.pod in together or _utc(each.at) - _utc(found[-1].at) > ONE_INCIDENT:
            found.append(each)
            together = set()
        together.add(each.pod)
    return found


def _is_the_stages_own(failure: FailureStatus, recent: Sequence[FailureStatus]) -> bool:
    """Whether a process ended as it also did on another node: no node is to blame for that."""
    return failure.cause is FailureCause.EXITED and any(
        each.cause is FailureCause.EXITED
        and each.stage == failure.stage
        and each.exit_code == failure.exit_code
        and each.node != failure.node
        for each in recent
    )


def _evidence(failure: FailureStatus) -> str:
    what = f"stage {failure.stage}: " if failure.stage else ""
    code = f" with exit code {failure.exit_code}" if failure.exit_code is not None else ""
    return f"{_utc(failure.at):%Y-%m-%d %H:%M:%S} {what}{failure.cause}{code}, {failure.message}"


def by_node(nodes: Iterable[NodeStatus]) -> Mapping[str, str]:
    """In short, why a node is avoided."""
    return {node.name: f"{node.failures} failures of stages there" for node in nodes}


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
