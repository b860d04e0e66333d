"""Gives engines of a running cluster newer plans; turns replication on and off by one.

Both modes are then measured on the same processes, in turn, with seconds between them: what else the machine does hits
both alike.
"""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import Any

from resilientllm_api.engine_state import EngineState
from resilientllm_api.plan import Plan, ReplicationMode
from resilientllm_api.ports import PLAN_PATH

from resilientllm_cli.local.cluster import LocalCluster

HTTP_SECONDS = 10.0
SETTLE_SECONDS = 120.0
"""Only a bound, for all copies of a full cache."""
REPORT_SECONDS = 0.5
"""Stages report four times a second, engines tell it ten times a second: what is said after this is of now."""
POLL_SECONDS = 0.05


def switch(cluster: LocalCluster, instance: int, mode: ReplicationMode) -> None:
    """Returns when the engine of ``instance`` has taken the mode up, and all that is sealed is kept if it is Ring."""
    plan = plan_of(cluster, instance)
    if plan.replication is not mode:
        plan = publish(cluster, instance, replication=mode)
    time.sleep(REPORT_SECONDS)
    settle(cluster, instance, lambda state: state.plan_version >= plan.version and settled(state, mode))


def publish(cluster: LocalCluster, instance: int, **changes: Any) -> Plan:
    """Gives the engine of ``instance`` its plan with ``changes``, as a newer one."""
    plan = plan_of(cluster, instance)
    plan = plan.model_copy(update={**changes, "version": plan.version + 1})
    request = urllib.request.Request(
        f"{cluster.engines[instance].control_url}{PLAN_PATH}",
        data=plan.model_dump_json(by_alias=True).encode(),
        headers={"Authorization": f"Bearer {cluster.token}", "Content-Type": "application/json"},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=HTTP_SECONDS):
        pass
    return plan


def plan_of(cluster: LocalCluster, instance: int) -> Plan:
    """An engine writes every plan that it is given to its file."""
    return Plan.model_validate_json(cluster.files.plan(instance).read_text())


def settle(cluster: LocalCluster, instance: int, holds: Callable[[EngineState], bool]) -> EngineState:
    """Raises TimeoutError with what was found."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        state = cluster.engine_state(instance)
        if state is not None and holds(state):
            return state
        if time.monotonic() > deadline:
            found = state.replication if state is not None else None
            raise TimeoutError(f"expected the copies of instance {instance} to be complete, found {found}")
        time.sleep(POLL_SECONDS)


def settled(state: EngineState, mode: ReplicationMode) -> bool:
    if mode is ReplicationMode.NONE:
        return not state.replication
    return bool(state.replication) and all(place.healthy and not place.lag_tokens for place in state.replication)
