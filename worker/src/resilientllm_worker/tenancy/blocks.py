"""What the rest of a stage needs of one tenant's KV blocks: their slots, and which sealed content they hold.

Sealed content is named by its number. That a block is held under a number says that its slot holds that content, all of
it, now; whether the engine still wants it is for the engine to say.

Every method may be called from any thread and is atomic. None waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from resilientllm_worker.protocol.messages import Seal

NULL_BLOCK = 0
"""vLLM's padding, the same for all tenants. It has no content, so it is never sealed."""


class Blocks(Protocol):
    """The blocks of one tenant, by its engine's ids."""

    def __contains__(self, block: int) -> bool:
        """Whether a step may read ``block``."""

    # --- steps -------------------------------------------------------------------------------------------------

    def admit(self, read: Iterable[int], written: Iterable[int]) -> None:
        """Sees that a step reads only blocks that have content, and that there is a slot for each that it writes.

        One step may read what it writes: a request hits the prefix that another one computes in the same batch. So
        all of a step's blocks belong in one call.

        Raises:
            TranslationError: the step cannot run here. Nothing has changed.
        """

    def translate(self, blocks: list[int]) -> list[int]:
        """The slots of ``blocks``, as a new list. Raises `UnmappedBlock`."""

    # --- who is served -----------------------------------------------------------------------------------------

    def serve(self) -> None:
        """From now on steps write these blocks, so replicas of them are refused, and what was reserved is void."""

    def stop_serving(self) -> None:
        """Sealed content stays, the rest is given up. No step of this tenant may be running."""

    def clear(self) -> None:
        """Gives up everything: the engine was replaced by one of a higher term, whose numbers start anew.

        Of a tenant that is served, slots are given to others only by `stop_serving`: a step may be writing them.
        """

    # --- sealed content ----------------------------------------------------------------------------------------

    def seal(self, seals: Sequence[Seal]) -> list[Seal]:
        """Labels blocks that were computed here. Returns the seals that are new, of blocks that are here."""

    def overwrite(self, blocks: Iterable[int]) -> list[int]:
        """A step is about to write ``blocks``: their seals are void. Returns those that had one."""

    def forget(self, blocks: Iterable[int]) -> list[int]:
        """The sealed content of ``blocks`` is of no use. Returns those that had any; others stay as they are."""

    def end(self, owners: Iterable[int]) -> None:
        """These owners have ended; their content is worth less than that of the others."""

    def held(self) -> tuple[bytes, bytes]:
        """Blocks and numbers of all sealed content here, packed as they go over the wire."""

    @property
    def sealed_count(self) -> int:
        """How many blocks have sealed content here."""

    def seals(self) -> list[tuple[Seal, int]]:
        """All sealed content here with its slot, by number, so parents come first."""

    # --- keeping replicas --------------------------------------------------------------------------------------

    def place(self, seals: Sequence[Seal]) -> list[int | None]:
        """Reserves a slot for each replica; None where it is refused.

        A block that has a slot gets it again, and what was in it is void from now on. Each slot must be given to
        `commit` or to `abandon`, also if the reservation became void meanwhile: only then is nobody writing it.
        """

    def commit(self, seals: Sequence[Seal], slots: Sequence[int]) -> None:
        """The content is in the slots that `place` gave for ``seals``. Raises `ValueError` for any other slot."""

    def abandon(self, slots: Sequence[int]) -> None:
        """Nobody will fill these slots that `place` gave. Raises `ValueError` for any other slot."""

    def take_dropped(self) -> list[int]:
        """Numbers given up for want of room since this was last asked, except those that are held again."""

    @property
    def room(self) -> int:
        """Replicas that could be placed now without dropping any."""
