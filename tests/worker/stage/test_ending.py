"""How a stage's process ends when something is wrong: at once, with its code, wherever its log goes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SECONDS = 120.0
FULL = Path("/dev/full")
"""Linux has it everywhere, and stages run on nothing else."""

LEFT_UNFLUSHED = """
import sys
from resilientllm_worker.process import end_at_once
sys.stdout.write("a line that is not out yet")
end_at_once(3)
"""

CANNOT_LOAD = """
import errno, sys, threading
from argparse import Namespace
from pathlib import Path
from types import ModuleType

for name in ("vllm", "vllm.utils", "vllm.utils.network_utils"):
    sys.modules[name] = ModuleType(name)
sys.modules["vllm.utils.network_utils"].get_file_store_init_method = lambda: "file:///nowhere"

from resilientllm_worker.stage import main

def load(*_):
    threading.Thread(target=threading.Event().wait, daemon=False).start()  # what it has begun by then
    raise OSError(errno.ENOSPC, "no space left on device")

main._load = load
main._parse = lambda: Namespace(
    follow=None, token_file=Path(sys.argv[1]), health=("127.0.0.1", 0), tensor_parallel_size=1, instance=0, stage=0
)
main.main()
"""


def ends_with(program: str, *arguments: str) -> int:
    with FULL.open("w") as full:
        words = [sys.executable, "-c", program, *arguments]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(words, stdout=full, stderr=full, env=buffered, timeout=SECONDS, check=False)
    return done.returncode


def test_a_full_disk_below_the_log_does_not_keep_a_process_from_ending() -> None:
    assert ends_with(LEFT_UNFLUSHED) == 3


def test_a_stage_that_cannot_load_ends_whatever_it_has_begun(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef")
    assert ends_with(CANNOT_LOAD, str(token)) == 1
