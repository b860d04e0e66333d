"""What merging home's and guest's steps is worth: ``python -m bench.merged_steps -o FILE``

One local cluster, 2 instances of 2 stages, tiny model, 4 greedy streams on each engine. The token interval of both is
measured undisturbed, with one stage lost and a donor that takes turns, and with one that merges, in turn. vLLM puts all
requests that it can into one step, and keeps apart what was apart once: with ``--max-num-batched-tokens 128`` the
prompts do not fit into one step, so each engine has as many steps in flight as it has stages. With ``--device-ms`` a
forward takes so long without taking CPU, as on an accelerator (`device_stage`).

Stages of instance 0 merge, those of instance 1 take turns (the hidden flag ``--take-turns``), so all is measured in the
same processes: a lost stage is one that is stopped (SIGSTOP), which takes no CPU and comes back when it goes on.
Replication is off, and so is the prefix cache: every run computes its prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from resilientllm_api.engine_state import EnginePhase
from resilientllm_api.plan import Limits, ReplicationMode
from resilientllm_cli.bench import machine
from resilientllm_cli.comparison import percentile
from resilientllm_cli.local import preflight
from resilientllm_cli.local.cluster import LocalCluster
from resilientllm_cli.local.layout import Layout
from resilientllm_cli.streams import Sampling, Stream, run_streams
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

STREAMS = 4
PROMPT_TOKENS = 100
READY_SECONDS = 420.0
STEP_ASIDE_SECONDS = 60.0
DEVICE_STAGE = Path(__file__).with_name("device_stage.py")
LIMITS = Limits(heartbeat_timeout_seconds=3.0)
WRAPPER = """#!/bin/sh
case "$*" in
*"--instance 1 "*) exec {stage} "$@" --take-turns ;;
*) exec {stage} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Mode:
    name: str
    donor: int | None
    """The instance whose stage serves both, in place of the other's; None: nothing is lost."""


MODES = (Mode("undisturbed", None), Mode("merged", donor=0), Mode("turns", donor=1))


def cluster_in(folder: Path, runner: str, env: dict[str, str], flags: tuple[str, ...]) -> LocalCluster:
    model = folder / "tiny"
    write_tiny_model(model, TinyModel())
    executables = preflight.executables()
    wrapper = folder / "stage"
    timed = f"{sys.executable} {DEVICE_STAGE}"
    wrapper.write_text(WRAPPER.format(stage=timed if "DEVICE_MS" in env else executables["resilientllm-stage"]))
    wrapper.chmod(0o755)
    layout = Layout(
        model=model,
        port=0,
        directory=folder / "run",
        runner=runner,
        replication=ReplicationMode.NONE,
        extra_flags=("--no-enable-prefix-caching", *flags),
        env=env,
    )
    return LocalCluster(layout, limits=LIMITS, executables={**executables, "resilientllm-stage": str(wrapper)})


@contextmanager
def lost(cluster: LocalCluster, mode: Mode, stage: int) -> Iterator[None]:
    """The other instance than ``mode.donor`` is without its own ``stage``, and served by the donor's."""
    if mode.donor is None:
        yield
        return
    guest = 1 - mode.donor
    pid = cluster.stage(guest, stage).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        cluster.wait_for(
            lambda now: any(each.instance == guest and each.phase == EnginePhase.DEGRADED for each in now.engines),
            STEP_ASIDE_SECONDS,
            f"a donor for stage {guest}.{stage}",
        )
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
        cluster.wait_ready(READY_SECONDS)


def prompts(instance: int) -> list[tuple[int, ...]]:
    return [
        tuple((31 * (10 * instance + index) + 7 * place) % 200 + 20 for place in range(PROMPT_TOKENS))
        for index in range(STREAMS)
    ]


async def both(cluster: LocalCluster, tokens: int) -> list[list[Stream]]:
    return await asyncio.gather(
        *(
            run_streams(engine.url, prompts(instance), Sampling(max_tokens=tokens))
            for instance, engine in enumerate(cluster.engines)
        )
    )


def intervals_ms(streams: list[list[Stream]]) -> list[list[float]]:
    """For each instance: between tokens that came while all streams of both were running."""
    every = [stream.arrivals_seconds for each in streams for stream in each]
    start, end = max(arrivals[0] for arrivals in every), min(arrivals[-1] for arrivals in every)
    return [
        [
            round((later - earlier) * 1e3, 2)
            for stream in each
            for earlier, later in pairwise(stream.arrivals_seconds)
            if start <= earlier and later <= end
        ]
        for each in streams
    ]


def measure(cluster: LocalCluster, rounds: int, tokens: int) -> list[dict[str, Any]]:
    cluster.wait_ready(READY_SECONDS)
    expected = [[stream.tokens for stream in each] for each in asyncio.run(both(cluster, tokens))]
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for mode in MODES[:: 1 if number % 2 else -1]:
            stage = number // 2 % cluster.layout.stages
            with lost(cluster, mode, stage):
                before = cluster.stage_counts(mode.donor or 0, stage) or {}
                streams = asyncio.run(both(cluster, tokens))
                after = cluster.stage_counts(mode.donor or 0, stage) or {}
            found = [[stream.tokens for stream in each] for each in streams]
            own = intervals_ms(streams)
            home = mode.donor or 0
            runs.append(
                {
                    "mode": mode.name,
                    "stage": stage,
                    "forwards_of_the_donor": after["steps"] - before["steps"],
                    "merged_forwards": after["merged"] - before["merged"],
                    "tokens_as_undisturbed": found == expected,
                    "home_ms": own[home],
                    "guest_ms": own[1 - home],
                }
            )
            print(f"{mode.name:12} stage {stage}: {summary(runs[-1:])}", flush=True)
    return runs


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of runs of one mode. Undisturbed, one instance is called home and the other guest."""
    forwards = sum(run["forwards_of_the_donor"] for run in runs)
    found: dict[str, Any] = {
        "runs": len(runs),
        "share_of_merged_forwards": round(sum(run["merged_forwards"] for run in runs) / max(1, forwards), 3),
        "tokens_as_undisturbed": all(run["tokens_as_undisturbed"] for run in runs),
    }
    for role in ("home", "guest"):
        samples = [value for run in runs for value in run[f"{role}_ms"]]
        found[role] = {
            "n": len(samples),
            "median_ms": round(median(samples), 2),
            "mean_ms": round(sum(samples) / len(samples), 2),
            "p99_ms": round(percentile(samples, 99), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="of each mode")
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--runner", choices=("v1", "v2"), default="v1")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for stages and engines")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/merged-steps.json"))
    parser.add_argument("--device-ms", help="time of a forward")
    parser.add_argument("--device-token-ms", default="0", help="time of each token in it")
    arguments, flags = parser.parse_known_args()
    env = dict(each.split("=", 1) for each in arguments.env)
    if arguments.device_ms is not None:
        env |= {"DEVICE_MS": arguments.device_ms, "DEVICE_TOKEN_MS": arguments.device_token_ms}
    where = machine.describe()
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster_in(Path(folder), arguments.runner, env, tuple(flags)) as cluster,
    ):
        runs = measure(cluster, arguments.rounds, arguments.tokens)
    modes = {mode.name: summary([run for run in runs if run["mode"] == mode.name]) for mode in MODES}
    result = {
        "runner": arguments.runner,
        "streams_of_each_engine": STREAMS,
        "flags": flags,
        "device": {name: value for name, value in env.items() if name.startswith("DEVICE")},
        "modes": modes,
        "machine": where,
        "versions": machine.versions(),
        "runs": runs,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    print(json.dumps(modes, indent=2))


if __name__ == "__main__":
    main()
