"""Stitching: all stages of a pipeline are asked at once, and where one cannot, whose fault that is."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resilientllm_api.plan import StageId

from resilientllm_worker.engine.channel import CannotLink, Channel, StageGone
from resilientllm_worker.engine.silence import TICK_SECONDS, Silences
from resilientllm_worker.protocol.blocks import unpack_blocks, unpack_numbers
from resilientllm_worker.protocol.messages import Stamp, Stitch, Stitched

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

STITCH_SECONDS = 3.0
LINK_GRACE_SECONDS = 0.02
"""A dead stage resets its links and its command channel; wait so long for the second before blaming the link."""

Incarnations = tuple[tuple[StageId, str], ...]
"""Stages in pipeline order, and the name of each one's process: another process has lost all KV."""


@dataclass(frozen=True, eq=False)
class Holding:
    """What a stage that came into the pipeline has of this instance's sealed blocks."""

    place: int
    stamp: Stamp
    """Of the stitch that it came in with."""
    blocks: NDArray[np.int32]
    numbers: NDArray[np.int64]
    """Of the seals that their content was stored under."""


@dataclass(frozen=True, eq=False)
class Stitching:
    """A stitch that all stages have done."""

    incarnations: Incarnations
    capacity_blocks: int
    """The smallest number of KV blocks that any of them gives this instance."""
    newcomers: tuple[Holding, ...]


def stitch_all(
    stamp: Stamp, channels: tuple[Channel, ...], before: Incarnations, silence_seconds: float
) -> Stitching | StageId:
    """Stitch ``channels``, in pipeline order. Returns the stage that is to blame if that could not be done.

    ``before``: who was stitched last. Stages that were not among them are asked what they hold, but for the first time.
    ``silence_seconds``: a stage that owes an answer, and says nothing at all for longer, is not waited for.
    """
    futures: dict[StageId, Future[Stitched]] = {}
    incarnations = tuple((channel.id, channel.welcome.boot if channel.welcome else "") for channel in channels)
    fresh = [len(before) > 0 and each not in before for each in incarnations]
    for place, channel in enumerate(channels):
        following = channels[place + 1].ref.address if place + 1 < len(channels) else None
        futures[channel.id] = channel.call(
            lambda call, following=following, new=fresh[place]: Stitch(call, stamp, following, new)  # type: ignore[misc]
        )
    if (silent := _await(futures, channels, silence_seconds)) is not None:
        logger.error("stage %s fell silent within a stitch", silent)
        return silent
    if any(isinstance(_error(future), CannotLink) for future in futures.values()):
        # Of a stage that has just died, its neighbour may know before we do.
        wait(futures.values(), LINK_GRACE_SECONDS)
    errors = {stage: error for stage, future in futures.items() if (error := _error(future)) is not None}
    for stage, error in sorted(errors.items(), key=lambda item: _blame(item[1])):
        logger.error("stitch: %s", error)
        return channels[error.place].id if isinstance(error, CannotLink) else stage
    # Who waits in vain for its successor is not to blame, so look from the end.
    for stage, future in reversed(futures.items()):
        if not future.done():
            logger.error("stage %s did not answer to a stitch in %.0f s", stage, STITCH_SECONDS)
            return stage
    answers = [future.result() for future in futures.values()]
    newcomers = tuple(
        Holding(place, stamp, unpack_blocks(answer.held_blocks), unpack_numbers(answer.held_numbers))
        for place, answer in enumerate(answers)
        if fresh[place]
    )
    return Stitching(incarnations, min(answer.capacity_blocks for answer in answers), newcomers)


def _await(
    futures: Mapping[StageId, Future[Stitched]], channels: tuple[Channel, ...], silence_seconds: float
) -> StageId | None:
    """Wait until all have answered, one cannot, or the time is over. Returns a stage that fell silent meanwhile."""
    silences: Silences[StageId] = Silences(now := time.monotonic())
    end = now + STITCH_SECONDS
    while now < end:
        done, waiting = wait(futures.values(), min(TICK_SECONDS, end - now), return_when=FIRST_EXCEPTION)
        if not waiting or any(future.exception() is not None for future in done):
            return None
        now = time.monotonic()
        owing = {channel.id: channel.heard for channel in channels if not futures[channel.id].done()}
        silences = silences.after(now, owing, TICK_SECONDS)
        for stage, seconds in silences.of.items():
            if seconds > silence_seconds:
                return stage
    return None


def _error(future: Future[Stitched]) -> BaseException | None:
    """Why a call failed; None if it did not, or is not done."""
    return future.exception() if future.done() else None


def _blame(error: BaseException) -> int:
    """Whom to believe first: a stage that has gone is a fact, a link that cannot be made may be its consequence."""
    return 0 if isinstance(error, StageGone) else 2 if isinstance(error, CannotLink) else 1
