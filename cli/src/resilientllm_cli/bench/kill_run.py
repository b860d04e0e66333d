"""One run under load with one kill in it: what every client saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from resilientllm_cli.comparison import Tokens, compare, stall_seconds, total
from resilientllm_cli.streams import OnToken, Stream


@dataclass(frozen=True)
class KillRun:
    stage: int
    stalls_seconds: tuple[float, ...]
    """Of each stream that the kill met."""
    tokens: Tokens
    """Against the undisturbed run, over all streams."""
    errors: tuple[str, ...]
    phases_ms: dict[str, float]
    """Of the recovery, as the engine reports it; empty where nobody does."""

    @property
    def worst_stall_seconds(self) -> float:
        return max(self.stalls_seconds)

    @property
    def verdict(self) -> str:
        harm = "all tokens as undisturbed" if self.tokens.unharmed else f"{self.tokens}"
        return f"worst stall {self.worst_stall_seconds:.3f} s, {harm}{f', errors {self.errors}' if self.errors else ''}"


StreamAll = Callable[[OnToken], Awaitable[list[Stream]]]
"""Starts all streams at once and returns when all have ended."""


@dataclass(frozen=True)
class Disturbed:
    streams: list[Stream]
    killed_at_seconds: float
    ended_at_seconds: float
    """Both on the clock of the arrivals."""

    @property
    def cut(self) -> bool:
        """Whether a client had to ask again. If not, all was computed when the kill came, and only delivered late."""
        return any(stream.attempts > 1 for stream in self.streams)


async def disturb(stream_all: StreamAll, streams: int, after_tokens: int, kill: Callable[[], object]) -> Disturbed:
    """Kills when every stream has ``after_tokens`` tokens. Raises RuntimeError if they never came so far."""
    progress = dict.fromkeys(range(streams), 0)
    all_decode = asyncio.Event()

    def on_token(stream: Stream) -> None:
        progress[stream.index] = len(stream.tokens)
        if min(progress.values()) >= after_tokens:
            all_decode.set()

    running = asyncio.ensure_future(stream_all(on_token))
    waiting = asyncio.ensure_future(all_decode.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if not all_decode.is_set():
        waiting.cancel()
        errors = {stream.error for stream in await running}
        raise RuntimeError(f"expected {streams} streams of {after_tokens} tokens before the kill, found {errors}")
    killed_at = time.monotonic()
    # In a thread: the streams must go on being read while the kill is made.
    await asyncio.to_thread(kill)
    return Disturbed(await running, killed_at, time.monotonic())


def judge(
    stage: int, disturbed: Disturbed, undisturbed: Sequence[Sequence[int]], phases_ms: dict[str, float]
) -> KillRun:
    return KillRun(
        stage=stage,
        stalls_seconds=tuple(
            _stall_seconds(stream, disturbed) for stream in disturbed.streams if not _was_over(stream, disturbed)
        ),
        tokens=total(
            compare(expected, stream.tokens) for expected, stream in zip(undisturbed, disturbed.streams, strict=True)
        ),
        errors=tuple(stream.error for stream in disturbed.streams if stream.error),
        phases_ms=phases_ms,
    )


def _was_over(stream: Stream, disturbed: Disturbed) -> bool:
    """A stream that had all its tokens before the kill says nothing of it. They are compared all the same."""
    return stream.complete and stream.arrivals_seconds[-1] <= disturbed.killed_at_seconds


def _stall_seconds(stream: Stream, disturbed: Disturbed) -> float:
    """A stream that never came to its end was stalled for at least as long as it was watched."""
    arrivals = stream.arrivals_seconds if stream.complete else [*stream.arrivals_seconds, disturbed.ended_at_seconds]
    return stall_seconds(arrivals, disturbed.killed_at_seconds)
