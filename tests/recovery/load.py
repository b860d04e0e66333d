"""Clients for the kill tests: what they ask, and what they must get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilientllm_cli.comparison import Tokens, compare, total
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.streams import Sampling, Stream, connect, model_name, run_stream

READY_SECONDS = 420.0
"""For all processes of a cluster to import vLLM, load and attach, on a machine that does other things too."""


@dataclass(frozen=True)
class Ask:
    """One completion. Every second one is sampled with a seed, the others are greedy."""

    prompt: tuple[int, ...]
    sampling: Sampling


def asks(count: int, *, tokens: int, prompt_tokens: int = 50, first: int = 0, shorter: int = 0) -> list[Ask]:
    """``shorter``: each asks for so many tokens less than the one before, so that a batch loses its rows one by one."""
    return [
        Ask(
            prompt=tuple((31 * index + 7 * place) % 200 + 20 for place in range(prompt_tokens + 9 * index)),
            sampling=(
                Sampling(tokens - shorter * turn, 1.0, seed=1000 + index)
                if index % 2
                else Sampling(tokens - shorter * turn)
            ),
        )
        for turn, index in enumerate(range(first, first + count))
    ]


async def stream_all(
    url: str, wanted: Sequence[Ask], on_token: Callable[[Stream], None] = lambda _: None
) -> list[Stream]:
    async with connect(url) as client:
        model = await model_name(client)
        return await asyncio.gather(
            *(
                run_stream(client, model, ask.prompt, ask.sampling, Stream(index), on_token)
                for index, ask in enumerate(wanted)
            )
        )


def undisturbed(url: str, wanted: Sequence[Ask]) -> list[list[int]]:
    """What the same requests give when nothing happens."""
    streams = asyncio.run(stream_all(url, wanted))
    assert not [stream.error for stream in streams if stream.error]
    return [stream.tokens for stream in streams]


def with_kill(
    url: str,
    wanted: Sequence[Ask],
    kill: Callable[[], object],
    *,
    after_tokens: int,
    beside: Sequence[tuple[str, Sequence[Ask]]] = (),
) -> list[list[Stream]]:
    """The streams of ``wanted``, and of those ``beside`` on other engines; ``kill`` runs once in mid-stream.

    ``after_tokens``: when the first stream of ``wanted`` has so many. 0: as soon as all requests are sent, in prefill.
    """

    async def run() -> list[list[Stream]]:
        reached = asyncio.Event()

        def on_token(stream: Stream) -> None:
            if len(stream.tokens) >= after_tokens:
                reached.set()

        others = [asyncio.create_task(stream_all(other, asked)) for other, asked in beside]
        main = asyncio.create_task(stream_all(url, wanted, on_token))
        if after_tokens:
            waiting = asyncio.create_task(reached.wait())
            await asyncio.wait({main, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            assert not main.done(), "the streams were over before the kill"
        else:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(kill)
        return [await main, *[await other for other in others]]

    return asyncio.run(run())


def compared(expected: Sequence[Sequence[int]], streams: Sequence[Stream]) -> Tokens:
    assert not [stream.error for stream in streams if stream.error]
    return total(compare(want, got.tokens) for want, got in zip(expected, streams, strict=True))


def merged_steps(
    cluster: LocalCluster, donor: tuple[int, int], kill: Callable[[], object], *, tokens: int, prompt_tokens: int
) -> int:
    """How many forwards of the donor are for both tenants' streams, which start after ``kill`` and must be right.

    Not more than one prompt may fit into a step. Then each engine comes to have two steps in flight, and these queue up
    at the donor. Otherwise both would have one, and they would pass the donor one behind the other.
    """
    urls = [engine.url for engine in cluster.engines]
    asked = [asks(4, tokens=tokens, prompt_tokens=prompt_tokens, first=first) for first in (2, 6)]

    async def both(urls: Sequence[str]) -> list[list[Stream]]:
        return await asyncio.gather(*(stream_all(url, wanted) for url, wanted in zip(urls, asked, strict=True)))

    def merged() -> int:
        counts = cluster.stage_counts(*donor)
        assert counts is not None, f"stage {donor} does not answer"
        return counts["merged"]

    # Learnt from the other instance each, so that no prompt is in the prefix cache where it is asked.
    expected = asyncio.run(both(urls[::-1]))
    before = merged()
    kill()
    for want, got in zip(expected, asyncio.run(both(urls)), strict=True):
        assert not [stream.error for stream in want if stream.error]
        assert compared([stream.tokens for stream in want], got) == Tokens(delivered=len(want) * tokens)
    return merged() - before
