"""One of very many clients: it asks and reads as those of ``streams.py`` do, for a tenth of the CPU time. What hundreds
of them cost would otherwise be taken for the server's."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import openai

from resilientllm_cli.streams import Sampling, Stream

DATA = "data: "
DONE = "[DONE]"


async def run_light_stream(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: Sequence[int],
    sampling: Sampling,
    stream: Stream,
) -> None:
    """Appends to ``stream``, without its text. A failure is a result: it is not raised, but written to ``error``."""
    try:
        async with client.completions.with_streaming_response.create(
            model=model, prompt=list(prompt), stream=True, **sampling.request()
        ) as response:
            async for line in response.iter_lines():
                if line.startswith(DATA) and line != DATA + DONE and stream.error is None:
                    _take(json.loads(line.removeprefix(DATA)), stream)
    except (openai.OpenAIError, OSError, EOFError, ValueError) as error:
        cause = f" ({error.__cause__!r})" if error.__cause__ is not None else ""
        stream.error = f"{type(error).__name__}: {error}{cause}"
    else:
        if stream.finish_reason is None and stream.error is None:
            stream.error = "the stream ended without a finish reason"


def _take(chunk: dict[str, object], stream: Stream) -> None:
    if "error" in chunk:
        stream.error = str(chunk["error"])
        return
    now = time.monotonic()
    choices = chunk["choices"]
    assert isinstance(choices, list)
    for choice in choices:
        tokens = choice.get("token_ids") or []
        stream.tokens += tokens
        stream.arrivals_seconds += [now] * len(tokens)
        stream.finish_reason = choice["finish_reason"] or stream.finish_reason
