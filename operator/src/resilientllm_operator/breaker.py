"""The breaker for correlated faults. Pure.

When several nodes fail at once, it is more likely that something is wrong with what is said of them (a driver that was
rolled out, a monitor, a network that cuts off the control plane) than with each of them. Then the operator stops to do
what could make it worse: it moves and deletes nothing that may still work, until it is quiet or a person has looked.
Engines go on helping themselves, and what is certainly gone is still replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum

from resilientllm_api.crd import RETRY_ANNOTATION, BreakerStatus, FailureStatus, RecoveryMode

from resilientllm_operator.names import Role
from resilientllm_operator.world import World

AT_ONCE = timedelta(minutes=1)
QUIET = timedelta(minutes=5)
MANY_NODES = 3


class Restraint(Enum):
    """Why the operator leaves alone what may still work."""

    OBSERVING = "spec.recovery.mode is Observe"
    PAUSED = "changes are paused by annotation"
    TRIPPED = "the breaker has tripped"


def restraint_of(world: World, breaker: BreakerStatus | None) -> Restraint | None:
    if world.object.spec.recovery.mode is RecoveryMode.OBSERVE:
        return Restraint.OBSERVING
    if world.object.paused:
        return Restraint.PAUSED
    return Restraint.TRIPPED if breaker is not None and breaker.tripped else None


def breaker_of(world: World, failures: Sequence[FailureStatus], now: datetime) -> BreakerStatus | None:
    """The breaker as it is now; None if it neither is tripped nor was reset a moment ago."""
    before, retry = world.object.status.breaker, world.object.retry
    last = max((_utc(each.at) for each in failures), default=datetime.min.replace(tzinfo=UTC))
    if before is not None and before.tripped:
        if before.retry != retry:
            return BreakerStatus(tripped=False, at=now, retry=retry, message="reset by annotation")
        return None if now - max(last, _utc(before.at)) >= QUIET else before
    reset_at = _utc(before.at) if before is not None else datetime.min.replace(tzinfo=UTC)
    recent = [each for each in failures if _utc(each.at) > max(now - AT_ONCE, reset_at)]
    nodes = sorted({each.node for each in recent if each.node})
    if _are_many(world, len(nodes)):
        words = (
            f"{len(nodes)} nodes failed within {AT_ONCE.seconds} seconds: {', '.join(nodes)}. Until it was quiet for "
            f"{QUIET.seconds // 60} minutes, nothing that may still work is moved or deleted. A pod on a node that is "
            f"really gone is replaced when it is deleted, as Kubernetes does after a while. When you have looked, "
            f"kubectl -n {world.object.namespace} annotate --overwrite rllm {world.object.name} "
            f'{RETRY_ANNOTATION}="$(date)" resets it.'
        )
        return BreakerStatus(tripped=True, at=now, retry=retry, message=words)
    return before if before is not None and now - reset_at < AT_ONCE else None


def _are_many(world: World, failed: int) -> bool:
    """Three nodes, or more than half of those that the stages are on, and more than one.

    What never served has nothing to lose, and processes that end while they start are no fault of nodes.
    """
    if not any(instance.first_served_at for instance in world.object.status.instances):
        return False
    used = {pod.node for pod in world.pods if pod.slot.role is Role.STAGE and pod.node}
    return failed >= MANY_NODES or (failed >= 2 and 2 * failed > len(used))


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)
