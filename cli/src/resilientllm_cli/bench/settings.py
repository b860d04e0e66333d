"""What is measured, as plain data."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resilientllm_cli.streams import Sampling

PROMPT_TOKENS = 48
BYTES = 256
"""Any token id below is an ordinary one of the tiny model."""
SERVING, SPARE = 0, 1
"""The instance that serves the streams and loses stages, and the one whose stages stand in."""
READY_SECONDS = 600.0
"""Only a bound: eight processes that import vLLM on few cores take minutes."""
KILL_SPREAD = 32
"""Tokens of a block in local mode."""
KILL_STRIDE = 13
"""Shares no factor with it, so that all places have their turn."""


@dataclass(frozen=True)
class ReplicationSettings:
    contexts: tuple[int, ...] = (128, 512, 1024, 2048, 3936)
    """Tokens of a prompt; the longest leaves room for the output in the 4096 of the tiny model."""
    kills: int = 2
    """At each context, with copies and without."""
    restarts: int = 1
    """Of stock vLLM, at the shortest and at the longest context."""
    streams: int = 4
    tokens: int = 160
    kill_after_tokens: int = 48
    """At least; see `kill_after`."""
    pairs: int = 20
    """Of runs with copies and without, nothing being killed."""
    lag_runs: int = 6
    steady_streams: int = 8
    steady_tokens: int = 300
    """Of runs that nothing is killed in. Each seals some eighty blocks on every stage."""
    steady_prompt_tokens: int = 48
    lag_prompt_tokens: int = 512

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.tokens)

    def kill_after(self, kill: int) -> int:
        """Elsewhere in a block at every kill: how much of the last one is lost depends on that."""
        return self.kill_after_tokens + KILL_STRIDE * kill % KILL_SPREAD

    @property
    def steady_sampling(self) -> Sampling:
        return Sampling(max_tokens=self.steady_tokens)

    @property
    def needs_cluster(self) -> bool:
        return bool((self.kills and self.contexts) or self.pairs or self.lag_runs)


NO_REPLICATION = ReplicationSettings(contexts=(), kills=0, restarts=0, pairs=0, lag_runs=0)


@dataclass(frozen=True)
class WeightsSettings:
    starts: int = 10
    """Of a stage, from each source."""
    bursts: int = 10
    """In which the twin gives its weights without a pause, while it serves."""
    burst_seconds: float = 5.0
    programs: Path = Path("bench")
    """The folder of ``take_weights.py``."""
    stages: int = 2
    streams: int = 4
    model: Mapping[str, int] = field(
        default_factory=lambda: {"layers": 4, "hidden": 2048, "heads": 16, "kv_heads": 4, "intermediate": 5504}
    )
    """Fields of a `TinyModel`: 700 MB, half of which a stage has."""


NO_WEIGHTS = WeightsSettings(starts=0, bursts=0)


@dataclass(frozen=True)
class MoveSettings:
    moves: int = 12
    """There and back, under load."""
    sigterms: int = 6
    streams: int = 8
    tokens: int = 700
    """Of each stream: it must outlast both moves."""
    prompt_tokens: int = 512
    after_tokens: int = 60
    """A move comes when every stream has so many, so that all are decoding."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.tokens)


NO_MOVES = MoveSettings(moves=0, sigterms=0)


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
    replication: ReplicationSettings = field(default_factory=ReplicationSettings)
    weights: WeightsSettings = field(default_factory=WeightsSettings)
    moves: MoveSettings = field(default_factory=MoveSettings)

    @property
    def sampling(self) -> Sampling:
        return Sampling(max_tokens=self.tokens)

    def prompts(self) -> list[list[int]]:
        return [prompt(index) for index in range(self.streams)]


def prompt(index: int) -> list[int]:
    """Different from its first token on, so that no two streams share a block of KV."""
    return [(17 + 53 * index + (11 + 2 * index) * place) % BYTES for place in range(PROMPT_TOKENS)]


def fresh_prompt(tokens: int, salt: int) -> list[int]:
    """The same for the same salt; no two salts share a block of KV."""
    source = random.Random(salt)
    return [source.randrange(BYTES) for _ in range(tokens)]


def victims(kills: int, stages: int) -> Sequence[int]:
    """Which stage each kill hits: first, middle and last in turn."""
    return [kill % stages for kill in range(kills)]
