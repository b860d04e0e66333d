"""Tokens per second of two servers under the same load, in turn, so that a busy machine slows both alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from resilientllm_cli.bench.settings import Settings
from resilientllm_cli.streams import Stream, run_streams


def tokens_per_second(streams: Sequence[Stream]) -> float:
    """All tokens but each stream's first, from the first to the last arrival: decoding, as clients see it."""
    failed = [stream.error for stream in streams if stream.error]
    if failed:
        raise RuntimeError(f"expected complete streams, found {failed[0]}")
    first = min(stream.arrivals_seconds[0] for stream in streams)
    last = max(stream.arrivals_seconds[-1] for stream in streams)
    return sum(len(stream.tokens) - 1 for stream in streams) / (last - first)


def measure(
    urls: Mapping[str, str], settings: Settings, samples: dict[str, list[float]], say: Callable[[str], None]
) -> None:
    """Adds to the samples of each side. One unmeasured run of each comes first."""
    for run in range(settings.throughput_runs + 1):
        for side, url in urls.items():
            found = tokens_per_second(asyncio.run(run_streams(url, settings.prompts(), settings.sampling)))
            if run > 0:
                samples.setdefault(side, []).append(found)
                say(f"throughput {run}/{settings.throughput_runs} {side}: {found:.0f} tokens/s")
