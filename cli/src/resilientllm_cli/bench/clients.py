"""The streams of a benchmark: undisturbed ones to compare with, and those of a client that helps itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from resilientllm_cli.streams import (
    OnToken,
    Sampling,
    Stream,
    connect,
    model_name,
    run_stream_with_retries,
    run_streams,
)

RESTART_TIMEOUT_SECONDS = 600.0


def undisturbed(url: str, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
    """Tokens of each stream. Raises RuntimeError if one did not get all of them."""
    streams = asyncio.run(run_streams(url, prompts, sampling))
    for stream in streams:
        if not stream.complete or len(stream.tokens) != sampling.max_tokens:
            raise RuntimeError(
                f"expected {sampling.max_tokens} tokens without a disturbance, found {len(stream.tokens)}: "
                f"{stream.error}"
            )
    return [stream.tokens for stream in streams]


async def stream_with_retries(
    url: str, prompts: Sequence[Sequence[int]], sampling: Sampling, on_token: OnToken
) -> list[Stream]:
    deadline = time.monotonic() + RESTART_TIMEOUT_SECONDS
    async with connect(url) as client:
        model = await model_name(client)
        return await asyncio.gather(
            *(
                run_stream_with_retries(client, model, prompt, sampling, Stream(index), deadline, on_token)
                for index, prompt in enumerate(prompts)
            )
        )
