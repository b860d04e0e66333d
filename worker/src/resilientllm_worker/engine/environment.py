"""What the EngineCore process inherits: vLLM makes that process, so settings reach it through its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from resilientllm_worker.process import read_token

INSTANCE = "RESILIENTLLM_INSTANCE"
TOKEN_FILE = "RESILIENTLLM_TOKEN_FILE"
CONTROL_SOCKET = "RESILIENTLLM_CONTROL_SOCKET"


@dataclass(frozen=True)
class Settings:
    instance: int
    token: bytes
    control_socket: Path


def publish(instance: int, token_file: Path, control_socket: Path) -> None:
    os.environ.update(
        {INSTANCE: str(instance), TOKEN_FILE: str(token_file.absolute()), CONTROL_SOCKET: str(control_socket)}
    )


def read() -> Settings:
    try:
        return Settings(
            instance=int(os.environ[INSTANCE]),
            token=read_token(Path(os.environ[TOKEN_FILE])),
            control_socket=Path(os.environ[CONTROL_SOCKET]),
        )
    except KeyError as error:
        raise RuntimeError(f"{error.args[0]} is not set: this executor runs only under resilientllm-engine") from error
