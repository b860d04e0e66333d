"""``resilientllm-stage`` with a switch, for tests: after SIGUSR1 its model stays within its next step for ever.

Run by path, as the stages of a cluster (`executables`). The stage itself has nothing of this.
"""

from __future__ import annotations

import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

from resilientllm_cli.local.preflight import executables
from resilientllm_worker.stage import main as stage


def stages_that_can_hang(directory: Path) -> dict[str, str]:
    """The programs of a cluster, whose stages are started through this file."""
    script = directory / "stage"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__)} "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {**executables(), "resilientllm-stage": str(script)}


def main() -> None:
    stuck, never = threading.Event(), threading.Event()
    signal.signal(signal.SIGUSR1, lambda number, frame: stuck.set())
    load = stage._load

    def load_with_switch(*args: Any) -> tuple[Any, ...]:
        model, *rest = load(*args)
        run = model.run

        def run_unless_stuck(*step: Any) -> Any:
            if stuck.is_set():
                print("the model is stuck within a step", file=sys.stderr, flush=True)
                never.wait()
            return run(*step)

        model.run = run_unless_stuck  # type: ignore[assignment,method-assign]
        return (model, *rest)

    stage._load = load_with_switch  # type: ignore[assignment]
    stage.main()


if __name__ == "__main__":
    main()
