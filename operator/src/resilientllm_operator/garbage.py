"""Python's garbage collection, without stopping everything for as long as it takes to look at all there is.

A full collection goes through every object of the process: with a thousand ResilientLLMs most of a second in which no
round runs and no engine is heard. Nearly all that survives one lives as long as its ResilientLLM, is in no cycle, and
is freed by its reference count. So what has survived is set aside, and later collections look at what is new. Once in
a while one looks at everything again, for cycles that were set aside while they were in use.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

EVERYTHING_SECONDS = 3600.0
_FULL = 2


def set_aside_what_survives(clock: Callable[[], float] = time.monotonic) -> Callable[[], None]:
    """From now on, in this process; begins with what is there. Returns what takes it back."""
    looked_at_everything = clock()

    def collecting(phase: str, info: dict[str, int]) -> None:
        nonlocal looked_at_everything
        if info["generation"] != _FULL:
            return
        if phase == "stop":
            gc.freeze()
        elif clock() - looked_at_everything >= EVERYTHING_SECONDS:
            looked_at_everything = clock()
            gc.unfreeze()

    def take_back() -> None:
        gc.callbacks.remove(collecting)
        gc.unfreeze()

    gc.callbacks.append(collecting)
    gc.collect()
    return take_back
