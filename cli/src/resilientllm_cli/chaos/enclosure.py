"""Namespaces of the harness's own: nothing that it makes is seen outside, and nothing of it stays.

Network: the switch and all cables. Mounts: the small disk, and the names of network namespaces. Processes: when the
first one ends, the kernel ends all others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from resilientllm_cli.errors import UsageError

MARK = "RESILIENTLLM_CHAOS_ENCLOSED"
PROGRAMS = ("unshare", "ip", "nft", "tc", "mount")


def enter(words: Sequence[str]) -> None:
    """Begin this command anew inside; returns if we are there. ``words``: its arguments.

    Raises UsageError where that cannot be.
    """
    if os.environ.get(MARK):
        return
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UsageError(f"chaos needs {', '.join(missing)}: install util-linux, iproute2 and nftables")
    wall = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        wall.append("--map-root-user")
    tried = subprocess.run([*wall, "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise UsageError(f"chaos needs namespaces of its own ({tried.stderr.strip()}): run it as root")
    os.environ[MARK] = "1"
    os.execvp(wall[0], [*wall, sys.executable, "-m", "resilientllm_cli.chaos", *words])
