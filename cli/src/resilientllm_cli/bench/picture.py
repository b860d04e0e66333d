"""`resilientllm bench plot`: stall against length of context, from a result of the benchmark."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resilientllm_cli.bench.replication_report import RESTART, WITH, WITHOUT
from resilientllm_cli.errors import UsageError

KINDS = {
    WITH: ("with replicas", "#1b7837"),
    WITHOUT: ("without replicas: computed again", "#d95f02"),
    RESTART: ("restart of stock vLLM", "#5e3c99"),
}

SHORTEST_SECONDS = 0.01
"""Where the axis begins at the latest: differences of small stalls would look large otherwise."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plot", help="draw stall against context from a result file")
    parser.add_argument("file", type=Path, help="what the benchmark wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/replication-benchmark.svg"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    try:
        result = json.loads(arguments.file.read_text())
        replication = result["replication"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{arguments.file} must be a result of the benchmark with its replication: {error}") from error
    draw(replication, arguments.output)
    return 0


def draw(replication: Mapping[str, Any], output: Path) -> None:
    """``output``'s ending says the format. Raises UsageError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as error:
        raise UsageError("plots need matplotlib: install resilientllm[plot]") from error
    # The same result gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "resilientllm", "font.size": 10}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.subplots()
        for kind, (label, colour) in KINDS.items():
            points = replication[kind]
            if not points:
                continue
            contexts = [point["context_tokens"] for point in points]
            counts = sorted({point["n"] for point in points})
            kills = "–".join(str(count) for count in {counts[0]: None, counts[-1]: None})
            axes.plot(
                contexts,
                [point["stall_seconds_p50"] for point in points],
                marker="o",
                color=colour,
                label=f"{label}, median (n = {kills} each)",
            )
            axes.plot(
                contexts,
                [point["stall_seconds_p99"] for point in points],
                linestyle=":",
                marker="_",
                color=colour,
                label=f"{label}, p99",
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, SHORTEST_SECONDS), high)
        axes.set_xlabel("context of each stream when its stage is killed, tokens of prompt")
        axes.set_ylabel("stall that a client sees, s")
        axes.grid(visible=True, which="both", alpha=0.25)
        figure.legend(fontsize=8, loc="outside upper center", ncols=2)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
