"""What a take-over costs the engine when its KV cache is large: ``python -m bench.takeover_at_scale -o FILE``

vLLM's own scheduler with ours on top, 50,000 blocks that all have content, 256 running requests; no model, no stages.
A stage is lost, another stands in that has some of the blocks, and the scheduler goes from there to its next step.

Before every take-over the cache is set back to the same state: all blocks hashed and sealed, all requests decoding.
Python's garbage collector is left as it is, except that what the scheduler is made of is frozen, as by vLLM's engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from resilientllm_cli.bench import machine
from resilientllm_cli.comparison import percentile
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model
from resilientllm_worker.engine.pipeline import Boundary
from resilientllm_worker.engine.stitching import Holding
from resilientllm_worker.protocol.messages import Stamp

from tests.worker.engine.scheduling import Rig

BLOCKS = 50_000
REQUESTS = 256
BLOCK_TOKENS = 32
PROMPT_TOKENS = 700
OTHERS_TOKENS = 30_000
"""Of the prompts of requests that have ended, whose blocks fill the cache."""
TOKEN = 7


@dataclass(frozen=True)
class Case:
    name: str
    confirmed: int
    """Blocks that the stage that stands in has. Those of running requests come first."""
    capacity: int
    """Blocks that it has room for."""


CASES = (
    Case("all of 50,000 confirmed, room for all", BLOCKS - 1, BLOCKS - 1),
    Case("12,500 confirmed, a pool of a quarter", BLOCKS // 4, BLOCKS // 4),
    Case("none confirmed, a pool of a quarter", 0, BLOCKS // 4),
)


class PaperRunner:
    """Answers every step at once, with the same token, and keeps nothing."""

    def __init__(self, rig: Rig) -> None:
        self._requests = rig.scheduler.requests
        self.ids: set[int] = set()

    def run(self, output: Any) -> dict[str, list[int]]:
        starts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return {
            name: [TOKEN] if starts[name] + count >= self._requests[name].num_tokens else []
            for name, count in output.num_scheduled_tokens.items()
        }

    def lose_everything(self) -> None:
        pass


class Stopwatch:
    """Milliseconds spent in functions that were wrapped, since the last `reset`."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def reset(self) -> None:
        self.spent = {}

    def add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + 1000 * seconds

    def wrap(self, owner: object, method: str, name: str) -> None:
        stock: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.during(name):
                return stock(*arguments, **options)

        setattr(owner, method, timed)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)


def make_rig(folder: Path) -> Rig:
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }
    from resilientllm_worker.seams.launch import make_config, make_parser, prepare

    write_tiny_model(folder, TinyModel(max_model_len=32_768))
    flags = {
        "--pipeline-parallel-size": "2",
        "--dtype": "float32",
        "--max-model-len": "32768",
        "--block-size": str(BLOCK_TOKENS),
        "--max-num-seqs": str(REQUESTS),
        # Without a limit for a step, or the first one after a take-over would schedule only some of the requests.
        "--max-num-batched-tokens": "300000",
        "--num-gpu-blocks-override": str(BLOCKS),
    }
    arguments: Any = make_parser("bench", "").parse_args(
        [str(folder), *(word for flag in flags.items() for word in flag)]
    )
    prepare(arguments)
    rig = Rig(make_config(arguments))
    rig.runner = PaperRunner(rig)  # type: ignore[assignment]
    return rig


def fill(rig: Rig) -> None:
    """All blocks get content of requests that end; then come those that go on."""
    per_request = OTHERS_TOKENS // BLOCK_TOKENS
    for number in range(-(-BLOCKS // per_request)):
        rig.ask(f"other-{number}", prompt_tokens=OTHERS_TOKENS, tokens=1)
        rig.run()
    for number in range(REQUESTS):
        rig.ask(f"running-{number}", prompt_tokens=PROMPT_TOKENS, tokens=20_000)
    decode(rig)


def decode(rig: Rig) -> None:
    """Until all requests decode, with steps in flight as in a pipeline of two stages."""
    while len(rig.scheduler.running) < REQUESTS or any(not r.num_output_tokens for r in rig.scheduler.running):
        rig.step()
    for _ in range(4):
        rig.step()


def seal_all(rig: Rig) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Blocks and numbers of all that has a hash, those of running requests first: as if all had been sealed lately."""
    cache, pool = rig.scheduler._cache, rig.scheduler.kv_cache_manager.block_pool
    rig.scheduler._tell_seals(0.0)
    numbers = np.frombuffer(cache._numbers, dtype=np.int64)
    np.frombuffer(cache._doubtful, dtype=np.uint8)[:] = 0
    hashed = [block for block in pool.blocks if block.block_hash is not None]
    for block in hashed:
        if not numbers[block.block_id]:
            cache._last += 1
            numbers[block.block_id] = cache._last
    hashed.sort(key=lambda block: block.ref_cnt == 0)
    blocks = np.array([block.block_id for block in hashed], dtype=np.int32)
    return blocks, numbers[blocks].copy()


def take_over(rig: Rig, case: Case, watch: Stopwatch) -> dict[str, Any]:
    blocks, numbers = seal_all(rig)
    running, in_use = (
        len(rig.scheduler.running),
        int(sum(b.ref_cnt > 0 for b in rig.scheduler.kv_cache_manager.block_pool.blocks)),
    )
    rig.lose(capacity=case.capacity)
    at, kept = rig.pipeline.at, slice(0, case.confirmed)
    rig.pipeline.at = Boundary(
        at.stamp, True, case.capacity, 0.0, (Holding(0, at.stamp, blocks[kept].copy(), numbers[kept].copy()),)
    )
    rig.pipeline.recomputed, rig.pipeline.kept = [], 0
    watch.reset()
    while rig.in_flight:  # what was in flight comes back as lost; the first of it rolls back
        with watch.during("all: engine work until the first step is out"):
            rig.complete()
    with watch.during("all: engine work until the first step is out"), watch.during("first schedule: all"):
        rig.schedule()
    assert len(rig.scheduler.running) == running, "expected all requests in the first step"
    return {
        "parts_ms": dict(watch.spent),
        "requests": running,
        "blocks_with_content": len(blocks),
        "blocks_in_use": in_use,
        "recomputed_max": max(rig.pipeline.recomputed),
    }


def restore(rig: Rig) -> None:
    """Back to the own stages, which have all."""
    blocks, numbers = seal_all(rig)
    stamp = Stamp(rig.pipeline.at.stamp.term, rig.pipeline.at.stamp.epoch + 1)
    rig.lose()
    rig.pipeline.at = Boundary(stamp, True, rig.blocks - 1, 0.0, (Holding(0, stamp, blocks, numbers),))
    while rig.in_flight:
        rig.complete()
    decode(rig)


def sealing(rig: Rig, watch: Stopwatch, steps: int) -> dict[str, Any]:
    """What sealing costs the engine while nothing fails."""
    watch.reset()
    sealed, done = len(rig.pipeline.seals), 0
    while done < steps:
        before = watch.spent.get("step: update", 0.0)
        rig.step()
        done += watch.spent.get("step: update", 0.0) != before
    blocks = len(rig.pipeline.seals) - sealed
    spent = watch.spent.get("step: seal", 0.0) + watch.spent.get("step: tell", 0.0)
    return {
        "steps": done,
        "requests": REQUESTS,
        "sealed_blocks": blocks,
        "us_per_step": 1000 * spent / done,
        "us_per_sealed_block": 1000 * spent / blocks if blocks else None,
        "share_of_engine_work": spent / (watch.spent["step: schedule"] + watch.spent["step: update"]),
    }


def measure(repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        rig = make_rig(Path(folder))
    gc.collect()
    gc.freeze()
    watch = Stopwatch()
    scheduler = rig.scheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    def stock_schedule(*arguments: Any, **options: Any) -> Any:
        with watch.during("first schedule: vLLM"):
            return untimed(scheduler, *arguments, **options)

    fill(rig)
    steady_watch = Stopwatch()
    for method, name in {
        "_seal": "step: seal",
        "_tell_seals": "step: tell",
        "schedule": "step: schedule",
        "update_from_output": "step: update",
    }.items():
        steady_watch.wrap(scheduler, method, name)
    steady = sealing(rig, steady_watch, 400)
    for method in ("_seal", "_tell_seals", "schedule", "update_from_output"):
        delattr(scheduler, method)
    watch.wrap(scheduler, "_roll_back_to", "roll back: everything")
    watch.wrap(scheduler, "_preempt_request", "roll back: preempting (vLLM)")
    watch.wrap(scheduler, "_limit", "roll back: balloon, inflate")
    watch.wrap(scheduler, "_deflate", "roll back: balloon, deflate")
    watch.wrap(scheduler._cache, "keep", "roll back: keep")
    untimed = Scheduler.schedule
    Scheduler.schedule = lambda self, *arguments, **options: stock_schedule(*arguments, **options)
    found = []
    for case in CASES:
        runs = []
        for number in range(repetitions + 1):
            run = take_over(rig, case, watch)
            decode(rig)
            restore(rig)
            if number:
                runs.append(run)
        names = sorted({name for run in runs for name in run["parts_ms"]})
        samples = {name: [run["parts_ms"].get(name, 0.0) for run in runs] for name in names}
        samples["ours: all but vLLM's own"] = [
            all_of_it - preempting - scheduling
            for all_of_it, preempting, scheduling in zip(
                samples["all: engine work until the first step is out"],
                samples["roll back: preempting (vLLM)"],
                samples["first schedule: vLLM"],
                strict=True,
            )
        ]
        found.append(
            {
                "case": case.name,
                "confirmed_blocks": case.confirmed,
                "capacity_blocks": case.capacity,
                "n": len(runs),
                **{key: median(run[key] for run in runs) for key in runs[0] if key != "parts_ms"},
                "ms": {
                    name: {"p50": median(values), "p99": percentile(values, 99), "samples": values}
                    for name, values in samples.items()
                },
            }
        )
    return {"blocks": BLOCKS, "block_tokens": BLOCK_TOKENS, "requests": REQUESTS, "cases": found, "sealing": steady}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=30, help="of each case")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/takeover-at-scale.json"))
    arguments = parser.parse_args()
    result = {**measure(arguments.repetitions), "machine": machine.describe(), "versions": machine.versions()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    for case in result["cases"]:
        print(
            f"{case['case']}: {case['n']} take-overs, at most {case['recomputed_max']} tokens recomputed of a request"
        )
        for name, part in sorted(case["ms"].items()):
            print(f"  {name:46} {part['p50']:8.2f} ms median {part['p99']:8.2f} ms p99")
    print(f"sealing: {result['sealing']}")


if __name__ == "__main__":
    main()
