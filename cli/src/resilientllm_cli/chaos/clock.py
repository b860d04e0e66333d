"""Steps the wall clock of a world's processes, by a shim in front of the C library (``clock_step.c``).

There is no namespace for the wall clock, and the machine's own is everybody's.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

LIBRARY = "LD_PRELOAD"
FILE = "RESILIENTLLM_CHAOS_CLOCK"
SOURCE = Path(__file__).with_name("clock_step.c")
COMPILE_SECONDS = 60.0


def preload(folder: Path) -> dict[str, str]:
    """The environment of a process whose clock can be stepped; empty where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return {}
    library = folder / "clock_step.so"
    words = [compiler, "-shared", "-fPIC", "-O2", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(words, check=True, capture_output=True, timeout=COMPILE_SECONDS)
    return {LIBRARY: str(library)}


def setting(file: Path) -> dict[str, str]:
    """For what the process starts itself."""
    return {FILE: str(file)}


def step(file: Path, seconds: float) -> None:
    """Set the offset of the processes that use ``file``, which exists as soon as one of them runs."""
    with file.open("r+b") as opened:
        opened.write(struct.pack("d", seconds))
