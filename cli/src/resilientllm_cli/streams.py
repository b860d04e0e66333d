"""Clients that stream completions with the stock ``openai`` client, and write down when which token came.

Token ids are compared, not text: ``return_token_ids`` has the server send the ids with every chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import openai

Prompt = str | Sequence[int]
"""Text, or token ids."""

ABORTED = "abort"
"""What stock vLLM gives as the reason when it goes down with the stream: no error, and not all of the tokens."""

SEND_AGAIN = "Send the request again"
"""Of the error with which a request ends that nobody can go on with: it says so, and the request may be repeated."""

RETRY_SECONDS = 0.05
"""Between attempts of a client that retries: often enough not to add to what it measures."""


@dataclass
class Stream:
    """What one client got, so far. Times are of ``time.monotonic``."""

    index: int
    tokens: list[int] = field(default_factory=list)
    arrivals_seconds: list[float] = field(default_factory=list)
    """When each token came; those of one chunk came together."""
    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    attempts: int = 1

    @property
    def complete(self) -> bool:
        return self.finish_reason is not None and self.error is None


@dataclass(frozen=True)
class Sampling:
    """The same for all streams of a run. Greedy unless a temperature is given; then the seed makes it repeatable."""

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = None
    salt: str | None = None
    """Nothing of what was computed under another salt is hit in the prefix cache."""

    def request(self) -> dict[str, Any]:
        salted = {} if self.salt is None else {"cache_salt": self.salt}
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "extra_body": {"ignore_eos": True, "return_token_ids": True, **salted},
        }


OnToken = Callable[[Stream], None]
"""Is told after every chunk."""


def _ignore(stream: Stream) -> None:
    """Nobody listens."""


async def model_name(client: openai.AsyncOpenAI) -> str:
    return (await client.models.list()).data[0].id


def connect(url: str, reuse: bool = True) -> openai.AsyncOpenAI:
    """Without the client's own retries: a test must see what the server did.

    ``reuse``: of connections. A server closes one that was idle for a while, perhaps just when a request goes out.
    """
    headers = {} if reuse else {"Connection": "close"}
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600, default_headers=headers)


async def run_stream(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: Prompt,
    sampling: Sampling,
    stream: Stream,
    on_token: OnToken = _ignore,
    pause_seconds: float = 0.0,
) -> Stream:
    """One completion, appended to ``stream``. A failure is a result: it is not raised, but written to ``error``.

    ``pause_seconds``: of a client that reads slowly, after every chunk.
    """
    try:
        await _receive(client, model, prompt, sampling, stream, on_token, pause_seconds)
    except (openai.OpenAIError, OSError, EOFError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    else:
        if stream.finish_reason is None:
            stream.error = "the stream ended without a finish reason"
        elif stream.finish_reason == ABORTED:
            stream.error = "the server ended the stream before its time"
    return stream


async def _receive(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: Prompt,
    sampling: Sampling,
    stream: Stream,
    on_token: OnToken,
    pause_seconds: float,
) -> None:
    chunks: Any = await client.completions.create(
        model=model, prompt=prompt if isinstance(prompt, str) else list(prompt), stream=True, **sampling.request()
    )
    async for chunk in chunks:
        now = time.monotonic()
        for choice in chunk.choices:
            extra = choice.model_extra or {}
            tokens = extra.get("token_ids") or []
            stream.prompt_tokens = stream.prompt_tokens or extra.get("prompt_token_ids") or []
            stream.tokens += tokens
            stream.arrivals_seconds += [now] * len(tokens)
            stream.text += choice.text
            stream.finish_reason = choice.finish_reason or stream.finish_reason
            on_token(stream)
        if pause_seconds:
            await asyncio.sleep(pause_seconds)


async def run_streams(
    url: str, prompts: Sequence[Prompt], sampling: Sampling, on_token: OnToken = _ignore
) -> list[Stream]:
    """All prompts at once, a stream each."""
    async with connect(url) as client:
        model = await model_name(client)
        return await asyncio.gather(
            *(
                run_stream(client, model, prompt, sampling, Stream(index), on_token)
                for index, prompt in enumerate(prompts)
            )
        )


async def run_stream_with_retries(
    client: openai.AsyncOpenAI,
    model: str,
    prompt: Sequence[int],
    sampling: Sampling,
    stream: Stream,
    deadline_seconds: float,
    on_token: OnToken = _ignore,
) -> Stream:
    """A client that helps itself: when its stream fails it asks again, for the tokens that it lacks, until they came.

    The kindest client that a server without recovery can have: it appends what it already has to its prompt, so that
    the first token after the failure is a new one. ``deadline_seconds`` is a time of ``time.monotonic``.
    """
    while True:
        left = replace(sampling, max_tokens=sampling.max_tokens - len(stream.tokens))
        await run_stream(client, model, [*prompt, *stream.tokens], left, stream, on_token)
        if stream.error and len(stream.tokens) == sampling.max_tokens:
            # Only the end of the stream is missing, and no token is left to ask for.
            stream.finish_reason, stream.error = "length", None
        if stream.complete or time.monotonic() > deadline_seconds:
            return stream
        await asyncio.sleep(RETRY_SECONDS)
        stream.finish_reason = stream.error = None
        stream.attempts += 1
