"""What clients ask during a run, and what they got: the same prompts in every run of a world, so that the undisturbed
tokens are learnt once. A salt keeps runs out of each other's prefix cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from resilientllm_cli.streams import Sampling, Stream, connect, model_name, run_stream

STREAMS = 4
"""To each engine."""
BOUND_SECONDS = 100.0
"""For all streams of a run; longer than a request waits for a donor."""


class Phase(StrEnum):
    PREFILL = "prefill"
    """Long prompts, a step of which holds less than one, and the fault before the first token of the last stream."""
    DECODE = "decode"


TOKENS = {Phase.PREFILL: 48, Phase.DECODE: 192}
PROMPT_TOKENS = {Phase.PREFILL: 1300, Phase.DECODE: 48}


@dataclass(frozen=True)
class Ask:
    """One completion. Every second one is sampled with a seed, the others are greedy."""

    prompt: tuple[int, ...]
    sampling: Sampling


@dataclass
class Sent:
    instance: int
    stream: Stream
    """Its index: that of the ask."""
    sent_seconds: float = 0.0


@dataclass(frozen=True)
class Undisturbed:
    tokens: Mapping[int, Sequence[Sequence[int]]]
    """By instance, of each ask."""
    first_token_seconds: Mapping[int, Sequence[float]]
    """How long each waited for its first token."""


def asks(instance: int, phase: Phase) -> list[Ask]:
    return [
        Ask(
            prompt=tuple(
                (31 * index + 7 * place + 53 * instance) % 200 + 20 for place in range(PROMPT_TOKENS[phase] + 9 * index)
            ),
            sampling=Sampling(TOKENS[phase], 1.0, seed=1000 + index) if index % 2 else Sampling(TOKENS[phase]),
        )
        for index in range(STREAMS)
    ]


@dataclass
class Load:
    """The streams of one run, growing while it goes on."""

    sent: list[Sent] = field(default_factory=list)
    on_token: Callable[[Sent], None] = lambda sent: None

    async def run(self, urls: Mapping[int, str], phase: Phase, salt: str) -> None:
        """Returns when all streams have ended, or are given up."""
        self.sent += [Sent(instance, Stream(index)) for instance in urls for index in range(STREAMS)]
        await asyncio.gather(*(self._to_engine(instance, url, phase, salt) for instance, url in urls.items()))

    async def _to_engine(self, instance: int, url: str, phase: Phase, salt: str) -> None:
        async with connect(url) as client:
            model = await model_name(client)

            async def one(sent: Sent, ask: Ask) -> None:
                sent.sent_seconds = time.monotonic()
                sampling = replace(ask.sampling, salt=salt)

                def told(stream: Stream) -> None:
                    self.on_token(sent)

                try:
                    async with asyncio.timeout(BOUND_SECONDS):
                        await run_stream(client, model, ask.prompt, sampling, sent.stream, told)
                except TimeoutError:
                    sent.stream.error = f"unfinished after {BOUND_SECONDS:g} s"

            mine = [sent for sent in self.sent if sent.instance == instance]
            await asyncio.gather(*(one(sent, ask) for sent, ask in zip(mine, asks(instance, phase), strict=True)))


def undisturbed(urls: Mapping[int, str], phase: Phase) -> Undisturbed:
    """Raises RuntimeError if a stream does not get all its tokens."""
    load = Load()
    asyncio.run(load.run(urls, phase, salt=f"undisturbed {phase}"))
    for sent in load.sent:
        if not sent.stream.complete or len(sent.stream.tokens) != TOKENS[phase]:
            raise RuntimeError(f"expected {TOKENS[phase]} tokens without a fault: {sent.stream.error}")
    of = {instance: [sent for sent in load.sent if sent.instance == instance] for instance in urls}
    return Undisturbed(
        {instance: [sent.stream.tokens for sent in mine] for instance, mine in of.items()},
        {
            instance: [sent.stream.arrivals_seconds[0] - sent.sent_seconds for sent in mine]
            for instance, mine in of.items()
        },
    )
