"""What clients ask during a run, and what they got: the same prompts in every run of a world, so that the undisturbed
tokens are learnt once. A salt keeps runs out of each other's prefix cache."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from resilientllm_cli.chaos.crowd import run_light_stream
from resilientllm_cli.streams import Sampling, Stream, connect, model_name, run_stream

STREAMS = 4
"""To each engine."""
BOUND_SECONDS = 60.0
"""For all streams of a run; longer than a request waits for a donor."""
CROWD_TOKENS = 24
"""That each of a crowd asks for."""
AT_ONCE, BETWEEN_SECONDS = 4, 0.01
"""A crowd comes in groups, so that to send its requests does not keep this thread from reading."""
SLOW_SECONDS = 0.05
"""Between two chunks that a slow reader takes; a step takes a tenth of it."""


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
    left: bool = False
    """Its client has gone."""
    asked: int | None = None
    """It wants no more than so many of the tokens; None: all."""


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


class Load:
    """The streams of one run, growing while it goes on. `more` and `leave` may be called by any thread."""

    def __init__(self, on_token: Callable[[Sent], None] = lambda sent: None, reads_slowly: bool = False) -> None:
        self.sent: list[Sent] = []
        self.begun = asyncio.Event()
        """The first streams of all engines are sent."""
        self._on_token = on_token
        self._pause_seconds = SLOW_SECONDS if reads_slowly else 0.0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        """By the place of a stream in ``sent``."""
        self._coming: set[asyncio.Task[None]] = set()
        """Crowds, of which not all have come."""

    async def run(self, urls: Mapping[int, str], phase: Phase, salt: str) -> None:
        """Returns when all streams have ended, or are given up."""
        self._loop = asyncio.get_running_loop()
        self._phase, self._salt = phase, salt
        async with contextlib.AsyncExitStack() as stack:
            self._clients = {
                instance: await stack.enter_async_context(connect(url, reuse=False)) for instance, url in urls.items()
            }
            self._model = await model_name(next(iter(self._clients.values())))
            for instance in urls:
                self._begin(instance, STREAMS)
            self.begun.set()
            while running := [task for task in (*self._coming, *self._tasks.values()) if not task.done()]:
                await asyncio.wait(running)

    def more(self, instance: int, count: int) -> None:
        """As many more streams to an engine, of the same prompts again and again."""
        self._loop.call_soon_threadsafe(self._begin, instance, count)

    def crowd(self, instance: int, count: int) -> None:
        """The same of very many, of which each asks for a few tokens; they come within about a second."""
        self._loop.call_soon_threadsafe(lambda: self._coming.add(self._loop.create_task(self._come(instance, count))))

    def leave(self, instance: int) -> int:
        """Every second client of an engine disconnects; how many these are."""
        chosen = [place for place, sent in enumerate(self.sent) if sent.instance == instance and not sent.left][::2]
        for place in chosen:
            self.sent[place].left = True
            self._loop.call_soon_threadsafe(self._tasks[place].cancel)
        return len(chosen)

    async def _come(self, instance: int, count: int) -> None:
        for begun in range(0, count, AT_ONCE):
            self._begin(instance, min(AT_ONCE, count - begun), CROWD_TOKENS)
            await asyncio.sleep(BETWEEN_SECONDS)

    def _begin(self, instance: int, count: int, asked: int | None = None) -> None:
        wanted = asks(instance, self._phase)
        for number in range(count):
            sent = Sent(instance, Stream(number % STREAMS), time.monotonic(), asked=asked)
            self._tasks[len(self.sent)] = self._loop.create_task(self._one(sent, wanted[sent.stream.index]))
            self.sent.append(sent)

    async def _one(self, sent: Sent, ask: Ask) -> None:
        sampling = replace(ask.sampling, salt=self._salt)
        client = self._clients[sent.instance]
        try:
            async with asyncio.timeout(BOUND_SECONDS):
                if sent.asked is not None:
                    few = replace(sampling, max_tokens=sent.asked)
                    await run_light_stream(client, self._model, ask.prompt, few, sent.stream)
                    return
                await run_stream(
                    client,
                    self._model,
                    ask.prompt,
                    sampling,
                    sent.stream,
                    lambda stream: self._on_token(sent),
                    self._pause_seconds,
                )
        except TimeoutError:
            sent.stream.error = f"unfinished after {BOUND_SECONDS:g} s"
        except asyncio.CancelledError:
            if not sent.left:
                raise


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
