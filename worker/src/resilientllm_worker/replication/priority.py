"""Serving always wins over replicating."""

from __future__ import annotations

import os
import threading

NICENESS = 10


def yield_to_serving() -> None:
    """Lowers the priority of the calling thread for good, so call it in one that does nothing but replicate.

    On Linux a priority belongs to a thread, which may always lower its own and never raise it again. Where the CPUs
    are busy with steps, copying and checksums then take what these leave over.
    """
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))
