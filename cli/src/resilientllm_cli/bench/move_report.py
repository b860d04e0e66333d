"""The ``moves`` of `build/bench.json`: what a planned move costs, beside what streams do at all other times. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from typing import Any

from resilientllm_api.engine_state import RecoveryKind
from rich.table import Table

from resilientllm_cli.bench.estimates import distribution
from resilientllm_cli.bench.move_run import MoveRun, MoveSample
from resilientllm_cli.comparison import total

MOVE, SWAP_BACK, SIGTERM = KINDS = ("move", "swap_back", "sigterm")


def document(runs: Sequence[MoveRun]) -> dict[str, Any]:
    planned = [sample for run in runs if run.seconds_to_end is None for sample in run.samples]
    kinds = {
        MOVE: [sample for sample in planned if sample.kind is RecoveryKind.MOVE],
        SWAP_BACK: [sample for sample in planned if sample.kind is RecoveryKind.SWAP_BACK],
        SIGTERM: [sample for run in runs if run.seconds_to_end is not None for sample in run.samples],
    }
    intervals = distribution([*chain.from_iterable(run.undisturbed_intervals_seconds for run in runs)])
    longest = max(intervals.pop("samples"), default=None)  # tens of thousands, of no interest one by one
    return {
        **{kind: _kind(samples) for kind, samples in kinds.items()},
        "undisturbed_interval_seconds": {**intervals, "max": longest},
        "sigterm_to_end_seconds": distribution([run.seconds_to_end for run in runs if run.seconds_to_end is not None]),
        "tokens": asdict(total(run.tokens for run in runs)),
        "errors": [error for run in runs for error in run.errors],
    }


def _kind(samples: Sequence[MoveSample]) -> dict[str, Any]:
    """``worst_interval_seconds`` has one sample a move, of the stream that was hit worst."""
    phases = sorted({phase for sample in samples for phase in sample.phases_ms})
    return {
        "worst_interval_seconds": distribution([sample.worst_interval_seconds for sample in samples]),
        "requests": [sample.requests for sample in samples],
        "tokens_recomputed": [sample.tokens_recomputed for sample in samples],
        "tokens_kept": [sample.tokens_kept for sample in samples],
        "phases_ms": {
            phase: distribution([sample.phases_ms[phase] for sample in samples if phase in sample.phases_ms])
            for phase in phases
        },
    }


def table(result: Mapping[str, Any]) -> Table:
    view = Table(title="A stage that is moved from while it works, as clients see it", title_justify="left")
    for heading in ("", "n", "median", "p99", "worst", "tokens recomputed"):
        view.add_column(heading, justify="left" if not heading else "right")
    for kind in KINDS:
        found = result[kind]
        interval = found["worst_interval_seconds"]
        if not interval["n"]:
            continue
        view.add_row(
            f"longest token interval, {kind.replace('_', ' ')}",
            str(interval["n"]),
            *_milliseconds(interval["p50"], interval["p99"], max(interval["samples"])),
            str(sum(found["tokens_recomputed"])),
        )
        for phase, times in found["phases_ms"].items():
            view.add_row(f"  {phase}", "", *(f"{times[name]:.1f} ms" for name in ("p50", "p99")))
    plain = result["undisturbed_interval_seconds"]
    if plain["n"]:
        view.add_row(
            "token interval, undisturbed", str(plain["n"]), *_milliseconds(plain["p50"], plain["p99"], plain["max"])
        )
    ends = result["sigterm_to_end_seconds"]
    if ends["n"]:
        view.add_row(
            "SIGTERM to end of process", str(ends["n"]), *_milliseconds(ends["p50"], ends["p99"], max(ends["samples"]))
        )
    return view


def _milliseconds(*seconds: float) -> list[str]:
    return [f"{1e3 * value:.1f} ms" for value in seconds]
