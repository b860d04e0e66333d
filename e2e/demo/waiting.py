"""Waiting for an object in the cluster, with words about what it waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from e2e.cluster.errors import ClusterError
from e2e.cluster.provider import Cluster

from .observation import Observation, observe, waits_for

POLL_SECONDS = 1.0

OnLook = Callable[[Observation], None]
"""Is told what was seen, at every look."""


def _ignore(seen: Observation) -> None:
    """Nobody watches."""


def wait_for(
    cluster: Cluster,
    namespace: str,
    name: str,
    what: str,
    reached: Callable[[Observation], bool],
    *,
    timeout_seconds: float,
    on_look: OnLook = _ignore,
) -> Observation:
    """The first observation that has ``reached`` it. Raises ClusterError when time is up or waiting is useless."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        seen = observe(cluster, namespace, name)
        on_look(seen)
        if reached(seen):
            return seen
        if seen.status.hold is not None:
            raise ClusterError(
                expected=what,
                found=f"the operator gave up: {seen.status.hold.message}",
                remedy=f"kubectl -n {namespace} describe rllm {name} says what to correct",
            )
        if time.monotonic() > deadline:
            raise ClusterError(
                expected=f"{what} within {timeout_seconds:g} s",
                found=waits_for(seen),
                remedy=f"see kubectl -n {namespace} describe rllm {name}, and the logs of its pods",
            )
        time.sleep(POLL_SECONDS)
