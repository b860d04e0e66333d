"""A light client gets what the stock one gets, and tells failures as it does."""

from __future__ import annotations

import asyncio
import json

import httpx2 as httpx
import openai
import pytest
from resilientllm_cli.chaos.crowd import run_light_stream
from resilientllm_cli.streams import Sampling, Stream, run_stream

CHUNKS = [
    {"id": "1", "choices": [{"index": 0, "text": "a", "token_ids": [5, 6], "finish_reason": None}]},
    {"id": "1", "choices": [{"index": 0, "text": "b", "token_ids": [7], "finish_reason": "length"}]},
]


def answer(*lines: str) -> httpx.Response:
    body = "".join(f"data: {line}\n\n" for line in lines)
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)


def both(response: httpx.Response) -> tuple[Stream, Stream]:
    """What the light client and the stock one make of it."""

    async def ask() -> tuple[Stream, Stream]:
        def transport() -> httpx.AsyncClient:
            return httpx.AsyncClient(transport=httpx.MockTransport(lambda request: copy(response)))

        light, stock = Stream(0), Stream(0)
        async with openai.AsyncOpenAI(
            base_url="http://engine/v1", api_key="none", max_retries=0, http_client=transport()
        ) as client:
            await run_light_stream(client, "model", [1, 2], Sampling(3), light)
            await run_stream(client, "model", [1, 2], Sampling(3), stock)
        return light, stock

    return asyncio.run(ask())


def copy(response: httpx.Response) -> httpx.Response:
    return httpx.Response(response.status_code, headers=response.headers, content=response.content)


def test_the_tokens_are_the_same() -> None:
    light, stock = both(answer(*map(json.dumps, CHUNKS), "[DONE]"))
    assert light.tokens == stock.tokens == [5, 6, 7]
    assert light.complete and stock.complete
    assert len(light.arrivals_seconds) == 3


@pytest.mark.parametrize(
    "response",
    [
        answer(json.dumps(CHUNKS[0]), json.dumps({"error": {"message": "Send the request again."}})),
        httpx.Response(503, json={"error": {"message": "Send the request again."}}),
    ],
    ids=["within the stream", "instead of it"],
)
def test_an_error_is_told_with_its_words(response: httpx.Response) -> None:
    for stream in both(response):
        assert not stream.complete
        assert stream.error is not None and "Send the request again." in stream.error


def test_a_stream_that_breaks_off_is_not_complete() -> None:
    light, stock = both(answer(json.dumps(CHUNKS[0])))
    assert light.error == stock.error == "the stream ended without a finish reason"
