"""With which priority a stage loads."""

from __future__ import annotations

import subprocess
import sys

LOWEST = 19
PROGRAM = f"""
import os
from resilientllm_worker.stage.background import run_nicely

os.nice({LOWEST})
print(run_nicely(lambda: os.getpriority(os.PRIO_PROCESS, 0)))
"""


def test_a_process_that_has_less_priority_than_loading_keeps_it() -> None:
    """More would need a privilege that a pod does not have."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)

    assert done.stdout.split() == [str(LOWEST)]
