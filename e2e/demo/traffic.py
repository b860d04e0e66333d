"""Clients at work in a thread of their own, so that a demo can watch them and do harm meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import openai
from resilientllm_cli.streams import Prompt, Sampling, Stream, run_streams

from e2e.cluster.errors import ClusterError


class Traffic:
    """One stream for each prompt, all at once. ``streams`` fill while it runs; they may be read at any time."""

    def __init__(self, url: str, prompts: Sequence[Prompt], sampling: Sampling) -> None:
        self.sampling = sampling
        self.streams: list[Stream] = [Stream(index) for index in range(len(prompts))]
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(url, prompts), name="traffic", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def least_tokens(self) -> int:
        """Of the slowest stream."""
        return min(len(stream.tokens) for stream in self.streams)

    @property
    def tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.streams)

    def wait(self, timeout_seconds: float) -> bool:
        """Whether all streams ended in time. Raises ClusterError if the Service answers nothing at all."""
        self._thread.join(timeout_seconds)
        if isinstance(self._error, openai.OpenAIError | OSError):
            raise ClusterError(
                expected="an answer of the Service",
                found=f"{type(self._error).__name__}: {self._error}",
                remedy="see its EndpointSlice and the logs of the engines",
            ) from self._error
        if self._error is not None:
            raise self._error
        return not self.running

    def _run(self, url: str, prompts: Sequence[Prompt]) -> None:
        def keep(stream: Stream) -> None:
            self.streams[stream.index] = stream

        try:
            ended = asyncio.run(run_streams(url, prompts, self.sampling, keep))
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits
            self._error = error
        else:
            self.streams = ended
