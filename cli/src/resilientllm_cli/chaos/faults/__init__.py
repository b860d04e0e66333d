"""All kinds of faults of local worlds, by name. Those that need a cluster are in ``e2e/chaos``."""

from __future__ import annotations

from resilientllm_cli.chaos.faults import clients, cuts, frames, kills, machine, orders, pauses
from resilientllm_cli.chaos.scene import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (*kills.KINDS, *pauses.KINDS, *orders.KINDS, *cuts.KINDS, *frames.KINDS, *machine.KINDS, *clients.KINDS)
}
