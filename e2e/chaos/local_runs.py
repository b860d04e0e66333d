"""Kinds that need no cluster: `resilientllm chaos`, in namespaces of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ENDS_SECONDS = 30.0


def run(words: Sequence[str]) -> int:
    """Its exit status. Whoever interrupts this interrupts it, once: it has a process group of its own."""
    command = [str(Path(sys.executable).with_name("resilientllm")), "chaos", *words]
    with subprocess.Popen(command, process_group=0) as process:
        try:
            return process.wait()
        except BaseException:
            with suppress(ProcessLookupError):  # it had just ended
                os.killpg(process.pid, signal.SIGTERM)
            _await(process)
            raise


def _await(process: subprocess.Popen[bytes]) -> None:
    """Until it has tidied up; what does not end then is ended, and its namespaces with it."""
    try:
        process.wait(ENDS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
