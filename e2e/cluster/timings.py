"""How fast the cluster notices a lost node: one set of values, since each bounds the next.

A node renews its lease every quarter of ``node_lease_seconds``; the controller manager calls it
unknown after ``node_grace_seconds`` without one; its pods are evicted ``toleration_seconds`` later.
Lowering one alone makes healthy nodes flap.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    node_status_seconds: int = 1
    node_lease_seconds: int = 4
    node_monitor_seconds: int = 1
    node_grace_seconds: int = 6
    toleration_seconds: int = 3
    max_restart_backoff_seconds: int = 1
    """Upstream's ceiling is five minutes, which would make every second crash of a test slow."""


TUNED = Timings()

PATIENT = Timings(
    node_status_seconds=10,
    node_lease_seconds=40,
    node_monitor_seconds=5,
    node_grace_seconds=50,
    toleration_seconds=300,
)
"""Upstream's own, restarts aside: where no node is meant to fail, a busy machine must not look like a dead one."""

STEADY = Timings(
    node_status_seconds=2,
    node_lease_seconds=6,
    node_monitor_seconds=1,
    node_grace_seconds=10,
    toleration_seconds=3,
)
"""Between the two: nodes do fail, on a machine that is busy with what runs on them."""
