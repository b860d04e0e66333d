"""vLLM is imported in fixtures only: it takes ten seconds, and most tests here do without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vllm.config import VllmConfig

FLAGS = {
    "--pipeline-parallel-size": "2",
    "--dtype": "float32",
    "--max-model-len": "256",
    "--block-size": "16",
    "--max-num-seqs": "8",
    "--max-num-batched-tokens": "64",
    "--num-gpu-blocks-override": "48",
}


@pytest.fixture(scope="session")
def vllm_config(tiny_model: Path) -> VllmConfig:
    """The config of a two-stage engine, by the way that the engine's command takes."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        environment.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        from resilientllm_worker.seams.launch import make_config, make_parser, prepare

        args: Any = make_parser("test", "").parse_args(
            [str(tiny_model), *(word for flag in FLAGS.items() for word in flag)]
        )
        prepare(args)
        return make_config(args)
