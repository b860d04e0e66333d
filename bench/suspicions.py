"""Whether stages that are slow for honest reasons are taken for lost: ``python -m bench.suspicions -o FILE``

One local cluster, 2 instances of 2 stages, tiny model, with the default limits. For ``--minutes`` all engines are under
full load, with prompts whose step takes 2 s and more, while ``--hogs`` processes take what CPU they get, and every
stage is held up by the garbage collector again and again (`pausing_stage`). Nothing is broken, so each recovery is a
false alarm, and each request that is not answered in full as well.

An observer in a process of its own listens to all stages as one more engine would. How late heartbeats come is its
measurement; ``tests/worker/engine/test_false_alarms.py`` draws from it in simulated time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from resilientllm_api.plan import Limits
from resilientllm_cli.bench import machine
from resilientllm_cli.comparison import percentile
from resilientllm_cli.local import preflight
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.streams import Sampling, run_streams
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

READY_SECONDS = 600.0
PAUSING_STAGE = Path(__file__).with_name("pausing_stage.py")
OBSERVER = 9
"""The instance that it speaks for; there is none of that number."""
LONG_PROMPT_TOKENS, SHORT_PROMPT_TOKENS = 1500, 60
DIAL_SECONDS = 10.0


def observe(addresses: list[str], token: bytes, interval: float, over: Event, results: Any) -> None:
    """Note the times between heartbeats of each stage, in a process of its own. Seconds."""
    from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, EngineHello, Heartbeat, StageWelcome
    from resilientllm_worker.transport.connection import dial
    from resilientllm_worker.transport.errors import ConnectionClosed

    gaps: dict[str, list[float]] = {address: [] for address in addresses}

    def greet(address: str, digest: str) -> tuple[Any, StageWelcome]:
        connection = dial(address, token, DIAL_SECONDS)
        connection.send(EngineHello(PROTOCOL_VERSION, OBSERVER, digest, interval, 2.0))
        welcome = connection.receive()
        assert isinstance(welcome, StageWelcome)
        return connection, welcome

    def listen(address: str) -> None:
        connection, welcome = greet(address, "")
        connection.close()
        connection, _ = greet(address, welcome.config_digest)
        last = time.monotonic()
        try:
            while not over.is_set():
                if isinstance(connection.receive(), Heartbeat):
                    now = time.monotonic()
                    gaps[address].append(round(now - last, 4))
                    last = now
        except ConnectionClosed as error:
            print(f"the observer lost {address}: {error}", file=sys.stderr, flush=True)

    threads = [threading.Thread(target=listen, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    late: list[float] = []
    while not over.is_set():
        before = time.monotonic()
        time.sleep(interval)
        late.append(round(time.monotonic() - before, 4))
    for thread in threads:
        thread.join(DIAL_SECONDS)
    results.put((list(gaps.values()), late))


def hog(over: Event) -> None:
    while not over.is_set():
        sum(range(100_000))


def cluster_in(folder: Path, env: dict[str, str]) -> LocalCluster:
    model = folder / "tiny"
    write_tiny_model(model, TinyModel())
    wrapper = folder / "stage"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {PAUSING_STAGE} "$@"\n')
    wrapper.chmod(0o755)
    flags = ("--max-num-batched-tokens", "2048", "--max-model-len", "2048", "--no-enable-prefix-caching")
    layout = Layout(model=model, port=0, directory=folder / "run", runner="v1", extra_flags=flags, env=env)
    return LocalCluster(layout, executables={**preflight.executables(), "resilientllm-stage": str(wrapper)})


async def load(url: str, streams: int, until: float, seed: int) -> dict[str, int]:
    """Bursts of requests, one after the other; some have a long prompt."""
    chance, count = random.Random(seed), {"requests": 0, "tokens": 0, "failed": 0, "incomplete": 0}
    while time.monotonic() < until:
        lengths = [LONG_PROMPT_TOKENS if chance.random() < 0.15 else SHORT_PROMPT_TOKENS for _ in range(streams)]
        prompts = [tuple(chance.randrange(20, 220) for _ in range(length)) for length in lengths]
        for stream in await run_streams(url, prompts, Sampling(max_tokens=150)):
            count["requests"] += 1
            count["tokens"] += len(stream.tokens)
            count["failed"] += stream.error is not None
            count["incomplete"] += len(stream.tokens) != 150
    return count


async def load_all(cluster: LocalCluster, streams: int, seconds: float) -> list[dict[str, int]]:
    until = time.monotonic() + seconds
    loads = (load(engine.url, streams, until, seed) for seed, engine in enumerate(cluster.engines))
    return await asyncio.gather(*loads)


def watch_pace(cluster: LocalCluster, over: Event, found: dict[str, str]) -> None:
    """Note every stage that is said to be slow."""
    while not over.wait(1.0):
        for instance in range(cluster.layout.instances):
            state = cluster.engine_state(instance)
            for stage in state.stages if state is not None else ():
                if stage.own_slow is not None:
                    found.setdefault(f"{instance}.{stage.stage}", str(stage.own_slow))


def recoveries(cluster: LocalCluster) -> list[list[dict[str, Any]]]:
    states = [cluster.engine_state(instance) for instance in range(cluster.layout.instances)]
    assert all(states)
    return [[json.loads(each.model_dump_json()) for each in state.recoveries] for state in states if state]


def quantiles(samples: list[float]) -> dict[str, float]:
    return {
        "n": len(samples),
        **{f"p{p:g}": round(percentile(samples, p), 4) for p in (50, 90, 99, 99.9)},
        "longest": max(samples),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--hogs", type=int, default=os.cpu_count() or 1, help="processes that take CPU, all the time")
    parser.add_argument("--streams", type=int, default=4, help="of each engine")
    parser.add_argument("--garbage", type=int, default=300_000, help="objects that are collected over")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/suspicions.json"))
    arguments = parser.parse_args()
    env = {"GARBAGE_OBJECTS": str(arguments.garbage), "GARBAGE_PERIOD": "7", "LONG_STEP_SECONDS": "2.0"}
    limits, where = Limits(), machine.describe()
    spawn = multiprocessing.get_context("spawn")
    over, results = spawn.Event(), spawn.Queue()
    with tempfile.TemporaryDirectory() as folder, cluster_in(Path(folder), env) as cluster:
        cluster.wait_ready(READY_SECONDS)
        addresses = [at.address for at in cluster.endpoints.stages.values()]
        # What the start of eight processes did is no matter of this measurement.
        before = [len(each) for each in recoveries(cluster)]
        beside = [
            spawn.Process(
                target=observe,
                args=(addresses, cluster.token.encode(), limits.heartbeat_interval_seconds, over, results),
            ),
            *(spawn.Process(target=hog, args=(over,)) for _ in range(arguments.hogs)),
        ]
        for process in beside:
            process.start()
        slow: dict[str, str] = {}
        watcher = threading.Thread(target=watch_pace, args=(cluster, over, slow))
        watcher.start()
        try:
            loads = asyncio.run(load_all(cluster, arguments.streams, 60.0 * arguments.minutes))
        finally:
            over.set()
        watcher.join()
        gaps, late = results.get(timeout=60)
        for process in beside:
            process.join(60)
        alarms = [each[count:] for each, count in zip(recoveries(cluster), before, strict=True)]
        logs = [cluster.log(f"stage-{stage}") for stage in cluster.endpoints.stages]
    pauses = [float(each) for log in logs for each in re.findall(r"collected for ([0-9.]+) s", log)]
    summary = {
        "false_alarms": sum(map(len, alarms)),
        "stages_said_to_be_slow": slow,
        "minutes": arguments.minutes,
        "stages": len(addresses),
        "loads": loads,
        "heartbeat_gap_seconds": quantiles([gap for each in gaps for gap in each]),
        "observer_tick_seconds": quantiles(late),
        "collection_seconds": quantiles(pauses) if pauses else None,
    }
    result = {
        "summary": summary,
        "limits": limits.model_dump(),
        "hogs": arguments.hogs,
        "streams_of_each_engine": arguments.streams,
        "alarms": alarms,
        "machine": where,
        "versions": machine.versions(),
        "gaps_seconds": gaps,
        "observer_ticks_seconds": late,
        "collections_seconds": pauses,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
