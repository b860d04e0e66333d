"""Work that must not slow down the stages that serve beside it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

NICENESS = 15


def run_nicely(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread of low priority and return what it returns, or raise what it raises.

    A stage that starts imports for seconds, often because it has just died beside others that took over its work. On
    Linux a priority belongs to a thread, so the thread that runs steps later keeps the normal one; a process that
    lowered its own could not raise it again without privileges.
    """
    outcome: list[Any] = []

    def run() -> None:
        # Who was started with less priority than that may not have more.
        niceness = max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0))
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
        try:
            outcome.append((True, work()))
        except BaseException as error:  # noqa: BLE001 - raised again below, in the thread that asked
            outcome.append((False, error))

    thread = threading.Thread(target=run, name="background", daemon=True)
    thread.start()
    thread.join()
    done, value = outcome[0]
    if not done:
        raise value
    result: T = value
    return result
