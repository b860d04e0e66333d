"""From samples to `build/bench.json` and a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from resilientllm_cli.bench import move_report, replication_report, weights_report
from resilientllm_cli.bench.estimates import distribution
from resilientllm_cli.bench.kill_run import KillRun
from resilientllm_cli.bench.move_run import MoveRun
from resilientllm_cli.bench.replication_report import ReplicationMeasured
from resilientllm_cli.bench.weights_run import Giving, Start
from resilientllm_cli.comparison import total

OURS, RESTART, STOCK = "ours", "restart", "stock"


@dataclass(frozen=True)
class Measured:
    """Raw results, so far. A part that was not measured is empty."""

    ours: list[KillRun] = field(default_factory=list)
    restart: list[KillRun] = field(default_factory=list)
    tokens_per_second: dict[str, list[float]] = field(default_factory=dict)
    replication: ReplicationMeasured = field(default_factory=ReplicationMeasured)
    starts: list[Start] = field(default_factory=list)
    giving: list[Giving] = field(default_factory=list)
    moves: list[MoveRun] = field(default_factory=list)

    @property
    def all_of_ours(self) -> list[KillRun | MoveRun]:
        return [*self.ours, *(run.run for run in self.replication.ours), *self.moves]


def document(measured: Measured, surroundings: Mapping[str, Any]) -> dict[str, Any]:
    rates = {side: list(samples) for side, samples in measured.tokens_per_second.items()}
    ours, stock = (median(rates[side]) if rates.get(side) else None for side in (OURS, STOCK))
    recovery = {OURS: _recovery(measured.ours), RESTART: _recovery(measured.restart)}
    return {
        "recovery": {
            **recovery,
            "ratio_p50": _ratio(recovery[RESTART]["stall_seconds"]["p50"], recovery[OURS]["stall_seconds"]["p50"]),
        },
        "throughput": {
            "ours_tokens_per_second": ours,
            "stock_tokens_per_second": stock,
            "ratio": _ratio(ours, stock),
            "samples": rates,
        },
        "replication": replication_report.document(measured.replication),
        "weights": weights_report.document(measured.starts, measured.giving, distribution),
        "moves": move_report.document(measured.moves),
        **surroundings,
    }


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or not denominator else numerator / denominator


def _recovery(runs: Sequence[KillRun]) -> dict[str, Any]:
    """``stall_seconds`` has one sample a kill, of the stream that was hit worst; ``all_streams`` one a stream."""
    phases = sorted({phase for run in runs for phase in run.phases_ms})
    return {
        "stall_seconds": distribution([run.worst_stall_seconds for run in runs]),
        "all_streams_stall_seconds": distribution([stall for run in runs for stall in run.stalls_seconds]),
        "by_stage_stall_seconds": {
            str(stage): distribution([run.worst_stall_seconds for run in runs if run.stage == stage])
            for stage in sorted({run.stage for run in runs})
        },
        "tokens": asdict(total(run.tokens for run in runs)),
        "errors": [error for run in runs for error in run.errors],
        "phases_ms": {
            phase: distribution([run.phases_ms[phase] for run in runs if phase in run.phases_ms]) for phase in phases
        },
    }


def table(result: Mapping[str, Any]) -> Table:
    view = Table(title="A killed stage, as clients see it", title_justify="left")
    for heading in ("", "n", "median", "p99", "tokens lost", "duplicated", "changed"):
        view.add_column(heading, justify="left" if not heading else "right")
    for side in (OURS, RESTART):
        found = result["recovery"][side]
        stall, tokens = found["stall_seconds"], found["tokens"]
        view.add_row(
            f"stall, {side}",
            str(stall["n"]),
            *(_seconds(stall[name]) for name in ("p50", "p99")),
            *(str(tokens[name]) for name in ("lost", "duplicated", "changed")),
        )
    for phase, found in result["recovery"][OURS]["phases_ms"].items():
        view.add_row(f"  {phase}", str(found["n"]), f"{found['p50']:.1f} ms", f"{found['p99']:.1f} ms")
    throughput = result["throughput"]
    for side in (OURS, STOCK):
        rate = throughput[f"{side}_tokens_per_second"]
        samples = throughput["samples"].get(side, [])
        view.add_row(f"throughput, {side}", str(len(samples)), "-" if rate is None else f"{rate:.0f} tokens/s")
    for name, ratio in (("stall", result["recovery"]["ratio_p50"]), ("throughput", throughput["ratio"])):
        view.add_row(f"ratio, {name}", "", "-" if ratio is None else f"{ratio:.2f}")
    return view


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
