"""What a stage keeps for one instance that it serves or may have to serve. Plain state; the server holds the lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import Stamp, Step

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.tenancy.block_map import BlockMap, IdentityMap
    from resilientllm_worker.transport.connection import Connection
    from resilientllm_worker.transport.link import LinkSender

NEVER = Stamp(0, 0)


@dataclass
class Tenant:
    instance: int
    is_home: bool
    stamp: Stamp = NEVER
    """The highest seen. Everything older is void."""
    engine: Connection | None = None
    """Who gave the stamp, and gets the answers."""
    blocks: BlockMap | IdentityMap | None = None
    """None: not stitched in at this stamp."""
    outbound: LinkSender | None = None
    steps: deque[Step] = field(default_factory=deque)
    arrived: dict[tuple[Stamp, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    """Hidden states that wait for their step, by stamp and step. A link may be faster than the engine's command."""
    links: dict[Stamp, Connection] = field(default_factory=dict)
    last_served: int = 0

    @property
    def prefix(self) -> str:
        """Put before request ids in the runner, where all tenants' requests live side by side."""
        return f"{self.instance}/"

    def fence(self, stamp: Stamp, engine: Connection) -> list[Connection | LinkSender]:
        """Void everything older than ``stamp``. Returns the links to close."""
        self.stamp = stamp
        self.engine = engine
        self.blocks = None
        self.steps.clear()
        self.arrived = {key: tensors for key, tensors in self.arrived.items() if key[0] >= stamp}
        closing: list[Connection | LinkSender] = [link for old, link in self.links.items() if old < stamp]
        self.links = {new: link for new, link in self.links.items() if new >= stamp}
        if self.outbound is not None:
            closing.append(self.outbound)
            self.outbound = None
        return closing

    def ready_step(self, is_first_stage: bool) -> Step | None:
        """The step to run next, if all that it needs is here: its command, and the previous stage's hidden states."""
        if self.blocks is None or not self.steps:
            return None
        step = self.steps[0]
        if is_first_stage or (step.stamp, step.step) in self.arrived:
            return step
        return None
