"""What is measured, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resilientllm_cli.streams import Sampling

PROMPT_TOKENS = 48
BYTES = 256
"""Any token id below is an ordinary one of the tiny model."""


@dataclass(frozen=True)
class Settings:
    model: Path
    output: Path
    directory: Path
    stock_programs: Path
    """The folder of ``stock_serve.py``."""
    kills: int = 21
    restarts: int = 3
    throughput_runs: int = 6
    """Of each side."""
    instances: int = 2
    stages: int = 3
    streams: int = 8
    tokens: int = 300
    """Of each stream."""
    kill_after_tokens: int = 60
    """A kill comes when every stream has so many, so that all are decoding."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.tokens)

    def prompts(self) -> list[list[int]]:
        return [prompt(index) for index in range(self.streams)]


def prompt(index: int) -> list[int]:
    """Different from its first token on, so that no two streams share a block of KV."""
    return [(17 + 53 * index + (11 + 2 * index) * place) % BYTES for place in range(PROMPT_TOKENS)]


def victims(kills: int, stages: int) -> Sequence[int]:
    """Which stage each kill hits: first, middle and last in turn."""
    return [kill % stages for kill in range(kills)]
