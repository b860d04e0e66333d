"""Everything that can be known to be wrong before a process is started. Each finding is one line and a UsageError."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilientllm_cli.errors import UsageError
from resilientllm_cli.local.layout import Layout

RUNNERS = ("v1", "v2")


@dataclass(frozen=True)
class ModelShape:
    """What of a model limits a layout. None: its config does not say."""

    layers: int | None
    heads: int | None
    max_model_len: int | None


def read_shape(model: Path) -> ModelShape:
    config_file = model / "config.json"
    if not model.is_dir():
        raise UsageError(
            f"--model must be a model directory, found none at {model}: "
            f"`resilientllm make-tiny-model {model}` makes a tiny one"
        )
    if not config_file.is_file():
        raise UsageError(f"--model must be a directory with a config.json, found none in {model}")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise UsageError(f"{config_file} must be JSON: {error}") from error
    return shape_of(config)


def shape_of(config: dict[str, Any]) -> ModelShape:
    text = config.get("text_config", config)
    return ModelShape(
        text.get("num_hidden_layers"), text.get("num_attention_heads"), text.get("max_position_embeddings")
    )


def check_layout(layout: Layout, shape: ModelShape) -> None:
    numbers = {
        "--instances": layout.instances,
        "--stages": layout.stages,
        "--tensor-parallel-size": layout.tensor_parallel_size,
    }
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} must be at least 1, found {number}")
    if layout.runner not in RUNNERS:
        raise UsageError(f"--runner must be one of {', '.join(RUNNERS)}, found {layout.runner}")
    if shape.layers is not None and layout.stages > shape.layers:
        raise UsageError(f"--stages must not exceed the model's {shape.layers} layers, found {layout.stages}")
    if shape.heads is not None and shape.heads % layout.tensor_parallel_size:
        raise UsageError(
            f"--tensor-parallel-size must divide the model's {shape.heads} attention heads, "
            f"found {layout.tensor_parallel_size}"
        )


def check_ports(layout: Layout, free: Callable[[int], bool]) -> None:
    if layout.port == 0:
        return
    last = layout.port + layout.instances - 1
    if layout.port < 1 or last > 65_535:
        raise UsageError(f"--port must leave room for {layout.instances} ports up to 65535, found {layout.port}")
    for port in range(layout.port, last + 1):
        if not free(port):
            raise UsageError(
                f"port {port} is taken: stop what listens there, or choose another --port "
                f"({layout.instances} in a row are needed)"
            )


def executables() -> dict[str, str]:
    """Paths of the worker's programs: of the same environment as this one, else of PATH."""
    found: dict[str, str] = {}
    for name in ("resilientllm-stage", "resilientllm-engine"):
        beside = Path(sys.executable).parent / name
        path = str(beside) if beside.is_file() else shutil.which(name)
        if path is None:
            raise UsageError(f"{name} is not installed: install resilientllm-worker[cpu] or resilientllm-worker[gpu]")
        found[name] = path
    return found
