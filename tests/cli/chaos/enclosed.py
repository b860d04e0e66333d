"""Runs a function of a test's module in namespaces of its own, as the harness runs itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from resilientllm_cli.chaos.enclosure import PROGRAMS

WALL = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--map-root-user")
SECONDS = 60.0


def possible() -> bool:
    """Also for root, where it is not: what keeps root from it is a fault of the machine's set-up, and has to show."""
    if os.geteuid() == 0:
        return True
    if any(shutil.which(program) is None for program in PROGRAMS):
        return False
    return subprocess.run([*WALL, "true"], capture_output=True, check=False).returncode == 0


def enclosed(function: Callable[[], None], file: str) -> None:
    """``function`` is one of ``file``'s own, and asserts what it has to say."""
    code = f"import runpy; runpy.run_path({str(Path(file))!r})[{function.__name__!r}]()"
    done = subprocess.run(
        [*WALL, sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
