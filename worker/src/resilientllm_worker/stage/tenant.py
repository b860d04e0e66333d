"""What a stage keeps for one instance that it serves or may have to serve. Under the lock of all its tenants."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from resilientllm_worker.protocol.fencing import NEVER, Fencing, Verdict
from resilientllm_worker.protocol.messages import Stamp, Step
from resilientllm_worker.stage.progress import Counts
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.link import LinkSender

if TYPE_CHECKING:
    import torch

    from resilientllm_worker.replication.sender import Replicator
    from resilientllm_worker.tenancy.blocks import Blocks

TenantFencing: TypeAlias = "Fencing[Connection, Step, dict[str, torch.Tensor]]"
Closing: TypeAlias = Connection | LinkSender


@dataclass
class Tenant:
    instance: int
    is_home: bool
    blocks: Blocks | None = None
    """None until the KV cache is allocated."""
    fencing: TenantFencing = field(default_factory=Fencing)
    """What is obeyed, and what waits under it."""
    needed: bool = False
    """It was stitched since it was last released: the engine may want it again, though it is fenced at the moment."""
    outbound: LinkSender | None = None
    counts: Counts = field(default_factory=lambda: Counts(NEVER))
    """How far the steps of ``stamp`` have come here."""
    last_served: int = 0
    replicator: Replicator | None = None
    """Sends this instance's sealed blocks to whoever keeps them."""
    link_received_bytes: int = 0
    """Of hidden states, over all links."""
    link_sent_bytes: int = 0
    """The same; written by the runner alone."""
    receiving: int = 0
    """Replica channels that may be within a write to ``blocks``."""

    @property
    def prefix(self) -> str:
        """Put before request ids in the runner, where all tenants' requests live side by side."""
        return f"{self.instance}/"

    @property
    def stamp(self) -> Stamp:
        return self.fencing.stamp

    @property
    def engine(self) -> Connection | None:
        """Who gave the stamp, and gets the answers."""
        return self.fencing.engine

    @property
    def stitched(self) -> bool:
        return self.fencing.stitched

    @property
    def inbound(self) -> Connection | None:
        """The link from the previous stage, for the stamp in force."""
        return next((link.peer for link in self.fencing.links if link.stamp == self.stamp), None)

    def turn(self, event: tuple[TenantFencing, Verdict[Connection]]) -> tuple[Verdict[Connection], list[Closing]]:
        """Go over to the state after an event of ``fencing``. Also returns what is to be closed, without the lock."""
        self.fencing, verdict = event
        closing: list[Closing] = [*verdict.close]
        if verdict.voids:
            self.counts = Counts.after_fence(self.stamp, ((each.stamp, each.step) for each in self.fencing.landed))
        if verdict.voids and self.outbound is not None:
            closing.append(self.outbound)
            self.outbound = None
        if verdict.recounts and self.blocks is not None:
            self.blocks.clear()
            if self.replicator is not None:  # to its keeper, the channel at hand is still one of the engine before
                self.replicator.redirect(self.stamp, None)
        return verdict, closing

    def unsealed(self, blocks: list[int]) -> None:
        """The sealed content of ``blocks`` is no more, or about to be."""
        if blocks and self.replicator is not None:
            self.replicator.cancel(blocks)

    def redirect(self, address: str | None) -> None:
        """Have sealed blocks sent to the keeper at ``address``; to nobody, if None."""
        if self.replicator is not None and self.blocks is not None:
            self.replicator.redirect(self.stamp, address, self.blocks.seals)
