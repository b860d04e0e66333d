"""How a stage that starts gets its weights: from a twin that serves, from files in memory, and from files on disk.

The stage is one more process beside a running instance. It needs no engine: it starts, has its weights, and is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import StageId

from resilientllm_cli.bench import page_cache
from resilientllm_cli.bench.settings import READY_SECONDS, SERVING, WeightsSettings, fresh_prompt
from resilientllm_cli.local import environment, observe, ports, preflight
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.flags import with_defaults
from resilientllm_cli.local.layout import Endpoints, Layout, StageEndpoints, programs, stage_name
from resilientllm_cli.local.observe import StageWeights
from resilientllm_cli.streams import Sampling, Stream, run_streams
from resilientllm_cli.supervise.supervisor import Phase, Program, Status, Supervisor
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

TWIN, WARM, COLD = SOURCES = ("twin", "storage_warm", "storage_cold")
WEIGHTS_FILE = "model.safetensors"
TAKER = "take_weights.py"
PLACE = 0
"""The place of the pipeline whose stage starts, and whose twin serves."""
POLL_SECONDS = 0.02
LONGEST_STREAM_TOKENS = 3500
PROMPT_TOKENS = 64
SALT = 7_000_000
Say = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    source: str
    ready_seconds: float
    """From the process's start to the moment at which it says that it has its weights."""
    load_seconds: float
    """Of reading or receiving them, and no more."""
    nbytes: int
    resident_before: float
    """The fraction of the model's file that was in memory."""


@dataclass(frozen=True)
class Burst:
    """A time in which the twin gave its weights without a pause, on the monotonic clock."""

    began: float
    ended: float
    nbytes: int


@dataclass(frozen=True)
class Giving:
    """Token intervals of streams, in seconds: those within a burst, and those within the pause before it."""

    within: tuple[float, ...]
    before: tuple[float, ...]
    burst_seconds: float
    burst_bytes: int


def measure(settings: WeightsSettings, directory: Path, starts: list[Start], giving: list[Giving], say: Say) -> None:
    if not settings.starts and not settings.bursts:
        return
    model = directory / "weights-model"
    write_tiny_model(model, TinyModel(**settings.model))
    layout = Layout(
        model=model,
        instances=1,
        stages=settings.stages,
        port=0,
        directory=directory / "weights",
        weights=WeightsSource.TWIN,
    )
    with LocalCluster(layout) as cluster:
        cluster.wait_ready(READY_SECONDS)
        for number in range(settings.starts):
            for source in SOURCES:
                starts.append(_start(layout, cluster, source))
                say(
                    f"start {number + 1}/{settings.starts}, weights from {source}: "
                    f"{starts[-1].load_seconds:.2f} s of {starts[-1].ready_seconds:.1f} s"
                )
        if settings.bursts:
            found = _give(layout, cluster, settings)
            giving += found
            say(f"giving: {len(found)} bursts")


def _start(layout: Layout, cluster: LocalCluster, source: str) -> Start:
    file = layout.model / WEIGHTS_FILE
    page_cache.warm(file) if source == WARM else page_cache.forget(file)
    resident = page_cache.resident(file)
    program, at = _another(layout, cluster, WeightsSource.TWIN if source == TWIN else WeightsSource.STORAGE)
    began: list[float] = []

    def note(status: Status) -> None:
        if status.phase is Phase.RUNNING:
            began.append(time.monotonic())

    with Supervisor([program], on_change=note):
        weights = _wait_for(at)
        ready = time.monotonic()
    if (len(began), weights.source.startswith("twin")) != (1, source == TWIN):
        raise RuntimeError(f"expected one start with weights from {source}, found {len(began)}, last from {weights}")
    return Start(source, ready - began[0], weights.seconds, weights.nbytes, resident)


def _another(layout: Layout, cluster: LocalCluster, weights: WeightsSource) -> tuple[Program, StageEndpoints]:
    """The same stage of another instance, which has no engine."""
    address, health = (f"{ports.HOST}:{port}" for port in ports.choose(2, ports.candidates()))
    stage = StageId(instance=layout.instances, stage=PLACE)
    at = StageEndpoints(address, health)
    endpoints = Endpoints({**cluster.endpoints.stages, stage: at}, {})
    found = programs(
        replace(layout, weights=weights),
        endpoints,
        preflight.executables(),
        _flags(layout),
        environment.of_children(os.environ, layout),
    )
    (program,) = (each for each in found if each.name == stage_name(stage))
    return program, at


def _flags(layout: Layout) -> list[str]:
    return with_defaults(layout.extra_flags, environment.default_flags(preflight.read_shape(layout.model)))


def _wait_for(at: StageEndpoints) -> StageWeights:
    deadline = time.monotonic() + READY_SECONDS
    while (weights := observe.stage_weights(at.health)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected a stage at {at.health} within {READY_SECONDS:g} s")
        time.sleep(POLL_SECONDS)
    return weights


# --- what giving costs ----------------------------------------------------------------------------------------


def _give(layout: Layout, cluster: LocalCluster, settings: WeightsSettings) -> list[Giving]:
    with _taker(layout, cluster, settings) as taker:
        orders, answers = taker.stdin, taker.stdout
        assert orders is not None and answers is not None
        if (said := answers.readline().strip()) != "ready":
            found = repr(said) if said else "its end"
            raise RuntimeError(f"expected {TAKER} to be ready, found {found}: see {cluster.files.log('taker')}")
        bursts: list[Burst] = []

        def listen() -> None:
            orders.write("go\n")
            orders.flush()
            for line in answers:
                burst = json.loads(line)
                bursts.append(Burst(burst["began"], burst["ended"], burst["bytes"]))

        streams = asyncio.run(_stream_during(listen, cluster.engines[SERVING].url, settings))
        if taker.wait() != 0 or len(bursts) != settings.bursts:
            raise RuntimeError(f"expected {settings.bursts} bursts, found {len(bursts)}, exit {taker.returncode}")
    return split(streams, bursts, settings.burst_seconds)


@contextlib.contextmanager
def _taker(layout: Layout, cluster: LocalCluster, settings: WeightsSettings) -> Iterator[subprocess.Popen[str]]:
    address = cluster.endpoints.stages[StageId(instance=SERVING, stage=PLACE)].address
    own = [
        *("--address", address, "--token-file", str(cluster.files.token), "--stage", str(PLACE)),
        *("--bursts", str(settings.bursts), "--seconds", str(settings.burst_seconds)),
    ]
    flags = [str(layout.model), "--pipeline-parallel-size", str(layout.stages), *_flags(layout)]
    log = cluster.files.log("taker")
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, str(settings.programs / TAKER), *own, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment.of_children(os.environ, layout),
        ) as taker,
    ):
        try:
            yield taker
        finally:
            taker.kill()


async def _stream_during(work: Callable[[], None], url: str, settings: WeightsSettings) -> list[Stream]:
    """Streams that go on while ``work`` runs; those that end begin anew."""
    streams: list[Stream] = []
    done = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            done.set()

    thread = threading.Thread(target=run, name="taker")
    sampling = Sampling(max_tokens=LONGEST_STREAM_TOKENS)
    prompts = [fresh_prompt(PROMPT_TOKENS, SALT + index) for index in range(settings.streams)]

    def note(stream: Stream) -> None:
        if not any(each is stream for each in streams):
            streams.append(stream)
        if len(streams) == settings.streams and not thread.is_alive() and not done.is_set():
            thread.start()

    serving = asyncio.create_task(run_streams(url, prompts, sampling, note))
    await asyncio.to_thread(_wait_until, lambda: done.is_set() or serving.done())
    if serving.done():
        raise RuntimeError("the streams were over before the twin had given its weights often enough")
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    thread.join()
    return streams


def _wait_until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(POLL_SECONDS)


def split(streams: Sequence[Stream], bursts: Sequence[Burst], pause_seconds: float) -> list[Giving]:
    """For each burst the token intervals that lie within it, and those within the pause before it."""

    def within(began: float, ended: float) -> tuple[float, ...]:
        return tuple(
            later - earlier
            for stream in streams
            for earlier, later in pairwise(stream.arrivals_seconds)
            if began <= earlier and later <= ended and later > earlier
        )

    return [
        Giving(
            within=within(burst.began, burst.ended),
            before=within(burst.began - pause_seconds, burst.began),
            burst_seconds=burst.ended - burst.began,
            burst_bytes=burst.nbytes,
        )
        for burst in bursts
    ]
