"""Clients that never stop asking, so that whatever is done to the cluster meets streams in the middle.

Each target, an engine or the Service, gets the same prompts round after round. A round opens connections of its own,
as clients that come and go would.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import openai
from resilientllm_cli.streams import Sampling, Stream, connect, run_stream

from e2e.cluster.errors import ClusterError
from e2e.demo.prompts import prompts

TOKENS = 480
"""Of a stream: some seconds, and many blocks of KV cache."""
MIDDLE_TOKENS = 80
"""Some blocks: part of the stream's KV cache has copies, part has none."""
PAUSE_SECONDS = 0.3
"""Between the rounds of a target. It also bounds how often a target that refuses is asked."""
LEISURELY_SECONDS = 3.0
"""The same, where whole instances start beside the streams and would have to wait for cores."""

SAMPLING = Sampling(max_tokens=TOKENS)

_GLANCE_SECONDS = 0.02
_TEXTS = prompts(16)


@dataclass(frozen=True)
class Target:
    name: str
    url: str
    prompts: tuple[int, ...]
    """Numbers of prompts, one stream each."""


@dataclass
class Sent:
    """A stream that was asked for."""

    target: str
    round: int
    asked_seconds: float
    stream: Stream
    """Its index is the number of its prompt."""
    ended_seconds: float | None = None

    @property
    def over(self) -> bool:
        return self.ended_seconds is not None

    @property
    def in_the_middle(self) -> bool:
        return not self.over and MIDDLE_TOKENS <= len(self.stream.tokens) < TOKENS


@dataclass
class _Line:
    """What one target is doing."""

    target: Target
    streaming: bool = False
    round: list[Sent] = field(default_factory=list)


class Load:
    """Runs in a thread of its own; ``sent`` may be read at any time."""

    def __init__(
        self,
        model: str,
        targets: Sequence[Target],
        rounds: int | None = None,
        pause_seconds: float = PAUSE_SECONDS,
    ) -> None:
        """``rounds``: end by itself after so many; default: go on until stopped."""
        self.sent: list[Sent] = []
        self._model = model
        self._rounds = rounds
        self._pause_seconds = pause_seconds
        self._lines = [_Line(target) for target in targets]
        self._held = False
        self._stopped = False
        self._error: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._main, name="load", daemon=True)
        self._thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    def reach_the_middle(self, timeout_seconds: float) -> int:
        """Returns as soon as every stream of every target is in the middle; how many these are.

        Targets are in step for this: each waits at the end of its round until all have ended theirs. They are in step
        anyway in their first round.
        """
        if any(len(sent.stream.tokens) >= MIDDLE_TOKENS or sent.over for sent in self.sent):
            self._begin_together(timeout_seconds)
        self._until(lambda: all(line.round for line in self._lines), "the rounds to begin", timeout_seconds)
        self._until(lambda: all(sent.in_the_middle for sent in self._present), "the middle", timeout_seconds)
        return len(self._present)

    def _begin_together(self, timeout_seconds: float) -> None:
        self._held = True
        self._until(lambda: not any(line.streaming for line in self._lines), "the rounds to end", timeout_seconds)
        for line in self._lines:
            line.round = []
        self._held = False

    @property
    def _present(self) -> list[Sent]:
        """Those of the round that each target is in."""
        return [sent for line in self._lines for sent in line.round]

    def finish(self, timeout_seconds: float) -> None:
        """Let the streams that run, or the rounds that were ordered, come to their end, and ask for no more.

        Raises ClusterError if a stream does not end.
        """
        self._stopped = self._rounds is None
        self._thread.join(timeout_seconds)
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            left = [f"{sent.target}: {len(sent.stream.tokens)} tokens" for sent in self.sent if not sent.over]
            raise ClusterError(
                expected=f"all streams to end within {timeout_seconds:g} s",
                found="; ".join(left) or "a client that does not end",
                remedy="see the logs of the engines",
            )

    def cut(self) -> None:
        """End at once. Nothing is left running, whatever happened."""
        self._stopped = True
        if self._thread.is_alive() and self._loop is not None and self._task is not None:
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)

    def _until(self, holds: Callable[[], bool], what: str, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not holds():
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                tokens = {line.target.name: [len(sent.stream.tokens) for sent in line.round] for line in self._lines}
                errors = {sent.stream.error for sent in self.sent if sent.stream.error}
                raise ClusterError(
                    expected=f"{what} of the streams within {timeout_seconds:g} s",
                    found=f"tokens of each: {tokens}; errors: {', '.join(sorted(errors)) or 'none'}",
                    remedy="see the logs of the engines",
                )
            time.sleep(_GLANCE_SECONDS)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
            self._error = error

    async def _run(self) -> None:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        await asyncio.gather(*(self._ask(line) for line in self._lines))

    async def _ask(self, line: _Line) -> None:
        number = 0
        while not self._stopped and (self._rounds is None or number < self._rounds):
            if self._held:
                await asyncio.sleep(_GLANCE_SECONDS)
                continue
            line.streaming = True
            line.round = [
                Sent(line.target.name, number, time.monotonic(), Stream(prompt)) for prompt in line.target.prompts
            ]
            self.sent += line.round
            async with connect(line.target.url) as client:
                await asyncio.gather(*(self._stream(client, sent) for sent in line.round))
            line.streaming = False
            number += 1
            await self._pause(line)

    async def _pause(self, line: _Line) -> None:
        """Until somebody waits for the next round, or for the last one, at most."""
        end = time.monotonic() + self._pause_seconds
        while line.round and not self._stopped and time.monotonic() < end:
            await asyncio.sleep(_GLANCE_SECONDS)

    async def _stream(self, client: openai.AsyncOpenAI, sent: Sent) -> None:
        try:
            await run_stream(client, self._model, _TEXTS[sent.stream.index], SAMPLING, sent.stream)
        except asyncio.CancelledError:
            sent.stream.error = "nobody waited for its end"
            raise
        finally:
            sent.ended_seconds = time.monotonic()
