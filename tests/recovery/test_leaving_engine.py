"""SIGTERM to an engine under load, as an eviction or a roll-out sends it: no stream notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from resilientllm_cli.comparison import Tokens
from resilientllm_cli.local.cluster import LocalCluster, local_cluster
from resilientllm_cli.streams import Stream, connect, model_name

from tests.recovery.load import READY_SECONDS, asks, compared, stream_all, undisturbed

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

STREAMS, TOKENS, BEFORE = 4, 900, 60
END_SECONDS = 60.0
FLAGS = (
    *("--kv-cache-memory-bytes", str(64 * 2**20), "--max-num-batched-tokens", "512", "--max-model-len", "2048"),
    *("--shutdown-timeout", "300"),
)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("leaving")
    with local_cluster(
        tiny_model, instances=1, stages=2, directory=directory, runner="v1", extra_flags=FLAGS
    ) as running:
        running.wait_ready(READY_SECONDS)
        yield running


def test_an_engine_finishes_its_streams_and_takes_no_new_ones(cluster: LocalCluster) -> None:
    wanted = asks(STREAMS, tokens=TOKENS)
    url = cluster.engines[0].url
    expected = undisturbed(url, wanted)
    stages = [cluster.stage(0, stage).pid for stage in range(2)]

    async def refusal(model: str) -> openai.APIStatusError:
        """How the first request ends that is not taken any more; those before it are served."""
        async with connect(url) as client:
            while True:
                try:
                    await client.completions.create(model=model, prompt=[1, 2, 3], max_tokens=1)
                except openai.APIStatusError as error:
                    return error
                await asyncio.sleep(0.2)

    async def run() -> tuple[list[Stream], openai.APIStatusError]:
        reached = asyncio.Event()
        async with connect(url) as client:
            model = await model_name(client)
        streams = asyncio.create_task(
            stream_all(url, wanted, lambda stream: reached.set() if len(stream.tokens) >= BEFORE else None)
        )
        await asyncio.wait_for(reached.wait(), END_SECONDS)
        await asyncio.to_thread(cluster.tell_engine_to_end, 0)
        error = await asyncio.wait_for(refusal(model), END_SECONDS)
        state = await asyncio.to_thread(cluster.engine_state, 0)
        assert state is not None, "the control server answers until the end"
        assert (state.leaving, state.serving) == (True, False)
        assert state.requests_running + state.requests_waiting == STREAMS
        return await streams, error

    streams, error = asyncio.run(run())
    assert compared(expected, streams) == Tokens(delivered=STREAMS * TOKENS)
    assert error.status_code == 503
    assert "Send the request again" in error.message
    deadline = time.monotonic() + END_SECONDS
    while (code := cluster.engine_exit_code(0)) is None:
        assert time.monotonic() < deadline, "expected the engine to end when its streams were done"
        time.sleep(0.1)
    assert code == 0
    assert [cluster.stage(0, stage).pid for stage in range(2)] == stages, "stages outlive their engines"
    cluster.wait_ready(READY_SECONDS)
    assert compared(expected[:1], asyncio.run(stream_all(url, wanted[:1]))) == Tokens(delivered=TOKENS)
