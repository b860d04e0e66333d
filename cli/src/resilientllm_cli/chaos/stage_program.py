"""A stage that obeys orders to fail: ``resilientllm-stage`` with one method wrapped. Production code knows of none.

An order is a file, read at SIGUSR1; that it was carried out is another, written at that moment. The worker is imported
by name only when it runs: the command line may not depend on it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

ORDER_FILE = "RESILIENTLLM_CHAOS_ORDER"
DONE_SUFFIX = ".done"
DEVICE_ERROR = "CUDA error: an illegal memory access was encountered"
BALLOON_BYTES = 1 << 30
"""More than any limit that is set; allocated in steps, so that the kernel kills in between."""
BALLOON_STEP_BYTES = 8 << 20


class What(StrEnum):
    HANG = "hang"
    """For ever, inside a step. Other threads go on: heartbeats, connections."""
    RAISE = "raise"
    """What torch raises when the device has failed."""
    BALLOON = "balloon"
    """Take memory until it is killed."""


@dataclass(frozen=True)
class Order:
    what: What
    after_forward: bool = False
    """Of a hang or an error: KV blocks are written then, and hidden states sent. Else neither."""


def write(file: Path, order: Order) -> None:
    file.with_suffix(DONE_SUFFIX).unlink(missing_ok=True)
    file.write_text(json.dumps(asdict(order)))


def carried_out(file: Path) -> float | None:
    """When, in seconds of the monotonic clock, which all processes of a machine share; None if not yet."""
    try:
        return float(json.loads(file.with_suffix(DONE_SUFFIX).read_text())["at"])
    except (FileNotFoundError, ValueError):  # not there, or half written
        return None


def main() -> object:
    file = Path(os.environ[ORDER_FILE])
    pending: list[Order] = []
    model: Any = importlib.import_module("resilientllm_worker.stage.model").Model
    stock = model.run

    def read(number: int, frame: object) -> None:
        order = Order(**json.loads(file.read_text()))
        if order.what == What.BALLOON:
            threading.Thread(target=_swell, args=(file,), daemon=True).start()
        else:
            pending.append(order)

    def run(self: Any, *arguments: Any) -> Any:
        if not pending:
            return stock(self, *arguments)
        order = pending.pop()
        if order.after_forward:
            stock(self, *arguments)
        _tell(file)
        if order.what == What.RAISE:
            raise RuntimeError(DEVICE_ERROR)
        while True:
            time.sleep(3600)

    model.run = run
    signal.signal(signal.SIGUSR1, read)
    return importlib.import_module("resilientllm_worker.stage.main").main()


def _tell(file: Path) -> None:
    file.with_suffix(DONE_SUFFIX).write_text(json.dumps({"at": time.monotonic(), "pid": os.getpid()}))


def _swell(file: Path) -> None:
    _tell(file)
    taken: list[bytes] = []
    while len(taken) * BALLOON_STEP_BYTES < BALLOON_BYTES:
        taken.append(b"\1" * BALLOON_STEP_BYTES)
