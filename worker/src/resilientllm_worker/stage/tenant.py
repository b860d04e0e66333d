"""What a stage keeps for one instance that it serves or may have to serve. Plain state; the server holds the lock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from resilientllm_worker.protocol.messages import Stamp, Step
from resilientllm_worker.stage.progress import Counts

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.replication.sender import Replicator
    from resilientllm_worker.tenancy.blocks import Blocks
    from resilientllm_worker.transport.connection import Connection
    from resilientllm_worker.transport.link import LinkSender

NEVER = Stamp(0, 0)


@dataclass
class Tenant:
    instance: int
    is_home: bool
    blocks: Blocks | None = None
    """None until the KV cache is allocated."""
    stamp: Stamp = NEVER
    """The highest seen. Everything older is void."""
    engine: Connection | None = None
    """Who gave the stamp, and gets the answers."""
    stitched: bool = False
    """This stage is in the instance's pipeline of this stamp, so steps run here."""
    needed: bool = False
    """It was stitched since it was last released: the engine may want it again, though it is fenced at the moment."""
    outbound: LinkSender | None = None
    steps: deque[Step] = field(default_factory=deque)
    arrived: dict[tuple[Stamp, int], dict[str, torch.Tensor]] = field(default_factory=dict)
    """Hidden states that wait for their step, by stamp and step. A link may be faster than the engine's command."""
    links: dict[Stamp, Connection] = field(default_factory=dict)
    counts: Counts = field(default_factory=lambda: Counts(NEVER))
    """How far the steps of ``stamp`` have come here."""
    last_served: int = 0
    replicator: Replicator | None = None
    """Sends this instance's sealed blocks to whoever keeps them."""
    inbound_replicas: tuple[Stamp, Connection] | None = None
    """Whoever serves the instance in our place, and has its sealed blocks kept here."""
    receiving: int = 0
    """Replica channels that may be within a write to ``blocks``."""
    numbers_term: int = 0
    """The term of the engine that numbered the seals of ``blocks``; another one counts anew."""

    @property
    def prefix(self) -> str:
        """Put before request ids in the runner, where all tenants' requests live side by side."""
        return f"{self.instance}/"

    def fence(self, stamp: Stamp, engine: Connection) -> list[Connection | LinkSender]:
        """Void everything older than ``stamp``. Returns the connections to close."""
        self.stamp = stamp
        self.engine = engine
        self.stitched = False
        self.steps.clear()
        self.arrived = {key: tensors for key, tensors in self.arrived.items() if key[0] >= stamp}
        self.counts = Counts.after_fence(stamp, self.arrived)
        closing: list[Connection | LinkSender] = [link for old, link in self.links.items() if old < stamp]
        self.links = {new: link for new, link in self.links.items() if new >= stamp}
        if self.outbound is not None:
            closing.append(self.outbound)
            self.outbound = None
        if self.inbound_replicas is not None and self.inbound_replicas[0] < stamp:
            closing.append(self.inbound_replicas[1])
            self.inbound_replicas = None
        self.count_in(stamp.term)
        return closing

    def count_in(self, term: int) -> None:
        """Seals are numbered by the engine of ``term`` from now on; what an earlier one sealed is of no use."""
        if term > self.numbers_term:
            self.numbers_term = term
            if self.blocks is not None:
                self.blocks.clear()

    def ready_step(self, is_first_stage: bool) -> Step | None:
        """The step to run next, if all that it needs is here: its command, and the previous stage's hidden states."""
        if not self.stitched or not self.steps:
            return None
        step = self.steps[0]
        if is_first_stage or (step.stamp, step.step) in self.arrived:
            return step
        return None
