"""A stage whose forward takes as long as on an accelerator: it sleeps first, and takes no CPU meanwhile.

On a machine with few cores all stages share them, and which stage is busy says little. For `bench.merged_steps`.
DEVICE_MS is the time of a forward, DEVICE_TOKEN_MS that of each token in it.
"""

from __future__ import annotations

import os
import time
from typing import Any

from resilientllm_worker.stage import main
from resilientllm_worker.stage.model import Model

FORWARD_SECONDS = float(os.environ["DEVICE_MS"]) / 1e3
TOKEN_SECONDS = float(os.environ["DEVICE_TOKEN_MS"]) / 1e3

stock = Model.run


def run(self: Model, step: Any, inbound: Any, send: Any) -> Any:
    time.sleep(FORWARD_SECONDS + TOKEN_SECONDS * sum(tokens for _, tokens in step.num_scheduled_tokens))
    return stock(self, step, inbound, send)


if __name__ == "__main__":
    Model.run = run  # type: ignore[method-assign]
    main.main()
