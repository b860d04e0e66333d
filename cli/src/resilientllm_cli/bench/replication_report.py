"""The ``replication`` of `build/bench.json`: what copies of KV blocks spare at a kill, and what they cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from statistics import median
from typing import Any

from resilientllm_api.plan import ReplicationMode
from rich.table import Table

from resilientllm_cli.bench.context_run import ContextRun
from resilientllm_cli.bench.estimates import CONFIDENCE_PERCENT, Estimate, mean_ratio, slope
from resilientllm_cli.bench.overhead_run import LagSamples, Pair, SteadyRun
from resilientllm_cli.comparison import percentile, total

WITH, WITHOUT, RESTART = "with_replicas", "without", "restart"
MEASURES = ("inter_token_latency_mean", "inter_token_latency_p99", "throughput")


@dataclass
class ReplicationMeasured:
    """Raw results, so far."""

    block_tokens: int = 0
    runs: dict[ReplicationMode, list[ContextRun]] = field(
        default_factory=lambda: {mode: [] for mode in ReplicationMode}
    )
    restart: list[ContextRun] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    lags: list[LagSamples] = field(default_factory=list)

    @property
    def ours(self) -> list[ContextRun]:
        return [*chain.from_iterable(self.runs.values())]


def document(measured: ReplicationMeasured) -> dict[str, Any]:
    kinds = {
        WITH: measured.runs[ReplicationMode.RING],
        WITHOUT: measured.runs[ReplicationMode.NONE],
        RESTART: measured.restart,
    }
    return {
        "block_size": measured.block_tokens,
        **{kind: _by_context(runs) for kind, runs in kinds.items()},
        "stall_slope_seconds_per_1000_tokens": {
            kind: _estimate(slope([(run.context_tokens / 1000, run.run.worst_stall_seconds) for run in runs]))
            for kind, runs in kinds.items()
        },
        "tokens": {kind: asdict(total(run.run.tokens for run in runs)) for kind, runs in kinds.items()},
        "errors": [error for run in measured.ours for error in run.run.errors],
        "overhead": _overhead(measured.pairs),
        "cpu": _cpu(measured.pairs),
        "bytes": _bytes(measured.pairs, measured.block_tokens),
        "lag": _lag(measured.lags),
    }


def _by_context(runs: Sequence[ContextRun]) -> list[dict[str, Any]]:
    """One sample a kill: of the stream that was hit worst, of the request that most was computed again for."""
    return [
        _of_context(context, [run for run in runs if run.context_tokens == context])
        for context in sorted({run.context_tokens for run in runs})
    ]


def _of_context(context: int, runs: Sequence[ContextRun]) -> dict[str, Any]:
    stalls = [run.run.worst_stall_seconds for run in runs]
    lags = [lag for run in runs for lag in run.lag_tokens]
    phases = sorted({phase for run in runs for phase in run.run.phases_ms})
    return {
        "context_tokens": context,
        "stall_seconds_p50": median(stalls),
        "stall_seconds_p99": percentile(stalls, 99),
        "tokens_recomputed_per_request_max": max(run.tokens_recomputed_max for run in runs),
        "lag_tokens_p99": percentile(lags, 99) if lags else None,
        "lag_tokens_at_kill_max": max(run.lag_tokens_at_kill for run in runs) if lags else None,
        "n": len(runs),
        "stall_seconds": stalls,
        "tokens_recomputed_per_request": [run.tokens_recomputed_max for run in runs],
        "tokens_kept": [run.tokens_kept for run in runs],
        "phases_ms_p50": {
            phase: median(run.run.phases_ms[phase] for run in runs if phase in run.run.phases_ms) for phase in phases
        },
    }


def _overhead(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Ratios on over off: above 1, copies make a latency longer; below 1, they make throughput less.

    Samples are of all pairs, ratios of those that are alike; ``all_pairs`` is for whoever doubts that.
    """
    alike = [pair for pair in pairs if pair.alike]
    return {
        **{
            name: {
                **(_estimate(mean_ratio(_both(alike, name))) or {"value": None, "n": 0}),
                "all_pairs": _estimate(mean_ratio(_both(pairs, name))),
                "on": [getattr(pair.on, name) for pair in pairs],
                "off": [getattr(pair.off, name) for pair in pairs],
            }
            for name in MEASURES
        },
        "steps": {"on": [pair.on.steps for pair in pairs], "off": [pair.off.steps for pair in pairs]},
    }


def _both(pairs: Sequence[Pair], name: str) -> list[tuple[float, float]]:
    return [(getattr(pair.on, name), getattr(pair.off, name)) for pair in pairs]


def _cpu(pairs: Sequence[Pair]) -> dict[str, Any]:
    """CPU seconds. ``replication``: by task of the threads that do nothing else, of all stages of both instances."""
    on = [pair.on for pair in pairs]
    if not on:
        return {}
    alike = [pair for pair in pairs if pair.alike]
    blocks, sent = sum(run.sent_blocks for run in on), sum(run.sent_bytes for run in on)
    tokens, seconds = sum(run.tokens for run in on), sum(run.seconds for run in on)
    tasks = _sums(run.replication_seconds for run in on)
    spent = sum(tasks.values())
    return {
        "replication": {
            task: {
                "per_block": _over(used, blocks),
                "per_token": _over(used, tokens),
                "per_gib": _over(used, sent / 2**30),
                "share_of_a_core": _over(used, seconds),
            }
            for task, used in {**tasks, "all": spent}.items()
        },
        "share_of_all_cpu_time": _over(spent, spent + sum(_sums(run.cpu_seconds for run in on).values())),
        "all_on_over_off": _estimate(
            mean_ratio([(_cpu_per_token(pair.on), _cpu_per_token(pair.off)) for pair in alike])
        ),
        "others_on_over_off": {
            process: _estimate(
                mean_ratio([(_per_token(pair.on, process), _per_token(pair.off, process)) for pair in alike])
            )
            for process in sorted(on[0].cpu_seconds)
            if all(_per_token(run, process) > 0 for pair in alike for run in (pair.on, pair.off))
        },
        "per_token": {
            "on": [_cpu_per_token(pair.on) for pair in pairs],
            "off": [_cpu_per_token(pair.off) for pair in pairs],
        },
    }


def _per_token(run: SteadyRun, process: str) -> float:
    return run.cpu_seconds.get(process, 0.0) / run.tokens


def _cpu_per_token(run: SteadyRun) -> float:
    """Of all processes of both instances, threads that replicate included."""
    return (sum(run.cpu_seconds.values()) + sum(run.replication_seconds.values())) / run.tokens


def _bytes(pairs: Sequence[Pair], block_tokens: int) -> dict[str, Any]:
    """Of the pairs' runs with copies. What was made and not sent are the blocks that were not full at the end."""
    on = [pair.on for pair in pairs]
    blocks, sent = sum(run.sent_blocks for run in on), sum(run.sent_bytes for run in on)
    if not blocks or not block_tokens:
        return {}
    places = sum(process.startswith("stage 0.") for process in on[0].cpu_seconds)
    per_token = sent // blocks // block_tokens * places
    made = per_token * sum(run.tokens for run in on)
    return {
        "block_bytes": sent // blocks,
        "kv_bytes_per_token": per_token,
        "made": made,
        "replicated": sent,
        "replicated_over_made": sent / made,
        "per_second": _over(sent, sum(run.seconds for run in on)),
    }


def _lag(lags: Sequence[LagSamples]) -> dict[str, Any]:
    """Samples are of one place of the pipeline each, evenly spaced in time."""
    samples: dict[str, list[float]] = {
        "tokens": [value for lag in lags for value in lag.tokens],
        "seconds": [value for lag in lags for value in lag.seconds],
    }
    return {
        name: {
            "n": len(values),
            "p50": median(values) if values else None,
            "p90": percentile(values, 90) if values else None,
            "p99": percentile(values, 99) if values else None,
            "max": max(values, default=None),
            "share_without_lag": values.count(0) / len(values) if values else None,
        }
        for name, values in samples.items()
    }


def _sums(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for run in runs:
        for name, used in run.items():
            found[name] = found.get(name, 0.0) + used
    return found


def _over(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _estimate(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "value": found.value,
        "confidence_percent": CONFIDENCE_PERCENT,
        "low": found.low,
        "high": found.high,
        "n": found.n,
    }


def table(result: Mapping[str, Any]) -> Table:
    view = Table(title="A killed stage at several lengths of context", title_justify="left")
    for heading in ("", "context", "n", "stall, median", "p99", "recomputed at most", "lag, p99"):
        view.add_column(heading, justify="left" if not heading else "right")
    for kind in (WITH, WITHOUT, RESTART):
        for found in result[kind]:
            lag = found["lag_tokens_p99"]
            view.add_row(
                kind.replace("_", " "),
                str(found["context_tokens"]),
                str(found["n"]),
                *(f"{found[f'stall_seconds_{name}']:.3f} s" for name in ("p50", "p99")),
                f"{found['tokens_recomputed_per_request_max']} tokens",
                "-" if lag is None else f"{lag} tokens",
            )
        if (grows := result["stall_slope_seconds_per_1000_tokens"][kind]) is not None:
            view.add_row(
                "  slope",
                "",
                "",
                f"{grows['value']:+.3f} s",
                f"{grows['low']:+.3f} … {grows['high']:+.3f}",
                "per 1000 tokens",
                "",
            )
    for name in MEASURES:
        if (ratio := result["overhead"][name])["value"] is not None:
            view.add_row(
                f"on/off: {name}",
                "",
                str(ratio["n"]),
                f"{ratio['value']:.4f}",
                f"{ratio['low']:.4f} … {ratio['high']:.4f}",
                "",
                "",
            )
    return view
