"""A stage that is held up as Python's garbage collector may do it: now and then, all of its threads at once.

For `bench.suspicions`. Every GARBAGE_PERIOD seconds a thread has the collector look at GARBAGE_OBJECTS objects, which
holds the interpreter's lock. They are made after the stage has spared the collector all that it has started with. A
step of a thousand tokens or more takes LONG_STEP_SECONDS besides, as the prefill of a large model does: without taking
CPU.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from typing import Any

from resilientllm_worker.stage import main
from resilientllm_worker.stage.model import Model

OBJECTS = int(os.environ["GARBAGE_OBJECTS"])
PERIOD_SECONDS = float(os.environ["GARBAGE_PERIOD"])
LONG_STEP_SECONDS = float(os.environ["LONG_STEP_SECONDS"])
LONG_STEP_TOKENS = 1000

stock = Model.run


def collect() -> None:
    kept: list[Any] = []
    while not gc.get_freeze_count():
        time.sleep(PERIOD_SECONDS)
    for _ in range(OBJECTS):
        kept.append([kept])
    while True:
        time.sleep(PERIOD_SECONDS)
        started = time.monotonic()
        gc.collect()
        print(f"collected for {time.monotonic() - started:.3f} s", file=sys.stderr, flush=True)


def run(self: Model, step: Any, inbound: Any, send: Any) -> Any:
    if sum(tokens for _, tokens in step.num_scheduled_tokens) >= LONG_STEP_TOKENS:
        time.sleep(LONG_STEP_SECONDS)
    return stock(self, step, inbound, send)


if __name__ == "__main__":
    Model.run = run  # type: ignore[method-assign]
    threading.Thread(target=collect, daemon=True).start()
    main.main()
