"""The surroundings of stages and engines: environment variables and flags that depend on the machine and the runner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from resilientllm_cli.local.flags import CPU_DEFAULTS, CPU_ENVIRONMENT, QUIET_ENVIRONMENT
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.local.preflight import ModelShape

GPU_DEVICE = Path("/dev/nvidiactl")
MAX_MODEL_LEN = 4096


def has_gpu() -> bool:
    return GPU_DEVICE.exists()


def default_flags(shape: ModelShape, gpu: bool | None = None) -> dict[str, str | None]:
    """vLLM's own defaults suit a GPU. ``gpu`` None: look."""
    if has_gpu() if gpu is None else gpu:
        return {}
    return {**CPU_DEFAULTS, "--max-model-len": str(min(shape.max_model_len or MAX_MODEL_LEN, MAX_MODEL_LEN))}


def of_children(inherited: Mapping[str, str], layout: Layout, gpu: bool | None = None) -> dict[str, str]:
    """The user's ``--env`` wins over the runner's choice, that over what is inherited, that over defaults.

    TMPDIR alone is not inherited: the supervisor gives each program one of its own there (``supervise/scratch.py``).
    torch would keep there what it compiled, and stages compile a little even when asked not to: without that, each one
    that restarts would do so anew.
    """
    on_gpu = has_gpu() if gpu is None else gpu
    caches = Path(inherited.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "resilientllm" / "inductor"),
        **QUIET_ENVIRONMENT,
        **({} if on_gpu else CPU_ENVIRONMENT),
        **{name: value for name, value in inherited.items() if name != "TMPDIR"},
        **runner_environment(layout.runner, on_gpu),
        **layout.env,
    }


def runner_environment(runner: str, gpu: bool) -> dict[str, str]:
    """V2's kernels are Triton's, which has an interpreter for machines without a GPU."""
    if runner == "v1":
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", **({} if gpu else {"TRITON_INTERPRET": "1"})}
