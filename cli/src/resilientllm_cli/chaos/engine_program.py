"""``resilientllm-engine`` with its EngineCore forked, not spawned, which spares the imports once more.

On a CPU vLLM spawns it, whatever its environment says (vllm/platforms/cpu.py). The worker is imported by name only when
it runs: the command line may not depend on it.
"""

from __future__ import annotations

import importlib
import multiprocessing
from typing import Any


def main() -> object:
    starts: Any = importlib.import_module("vllm.v1.engine.utils")
    starts.get_mp_context = lambda: multiprocessing.get_context("fork")
    return importlib.import_module("resilientllm_worker.engine.main").main()
