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
    """The user's ``--env`` wins over the runner's choice, that over what is inherited, that over defaults."""
    on_gpu = has_gpu() if gpu is None else gpu
    return {
        **QUIET_ENVIRONMENT,
        **({} if on_gpu else CPU_ENVIRONMENT),
        **inherited,
        **runner_environment(layout.runner, on_gpu),
        **layout.env,
    }


def runner_environment(runner: str, gpu: bool) -> dict[str, str]:
    """V2's kernels are Triton's, which has an interpreter for machines without a GPU."""
    if runner == "v1":
        return {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    return {"VLLM_USE_V2_MODEL_RUNNER": "1", **({} if gpu else {"TRITON_INTERPRET": "1"})}
