"""Seam: where vLLM looks at the class of a model, to learn what it can do.

Stock vLLM does that in a process of its own, which imports torch and all of vLLM once more, lest the import initialise
CUDA in this one (vllm/model_executor/models/registry.py, ``_run_in_subprocess``). The answer is kept in a folder that a
new pod does not have, so the start of every stage and engine would take nearly twice as long. A stage imports the class
anyway, a moment later, and forks nothing; where CUDA is initialised, vLLM spawns an engine's children in place of
forking them (vllm/utils/system_utils.py, ``_maybe_force_spawn``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def look_at_models_here() -> None:
    """Let this process look at the classes of models itself."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = _run_here


def _run_here(look: Callable[[], T]) -> T:
    return look()
