"""Which part of a file the kernel has in memory, and how to have it forget it."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def warm(file: Path) -> None:
    """Reads all of it."""
    with file.open("rb", buffering=0) as opened:
        buffer = bytearray(16 << 20)
        while opened.readinto(buffer):
            """It is in the cache now."""


def forget(file: Path) -> None:
    """What a process has mapped stays. A disk that caches for itself, or a host of this machine, forgets nothing."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(file: Path) -> float:
    """The fraction of its pages that are in memory. Asking reads none of them."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as mapped:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapped, np.uint8)
        address, status = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(pages.ctypes.data)
        failed = ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), status)
        del view  # a map that is looked into cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
    return float((pages & 1).mean())
