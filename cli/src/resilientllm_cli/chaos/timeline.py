"""`resilientllm chaos plot`: tokens of each stream over time around a fault, with the phases of the recovery."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resilientllm_cli.errors import UsageError

COLOURS = ("#1b7837", "#5e3c99", "#2166ac")
"""By what the streams were of: an instance, or a Service."""
PHASES = {
    "wait": "#bdbdbd",
    "hold": "#fee090",
    "flush": "#e0f3f8",
    "fence": "#d73027",
    "stitch": "#fdae61",
    "resume": "#abd9e9",
}
BEFORE_SECONDS, AFTER_SECONDS = 0.5, 0.2


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plot", help="draw timelines of runs")
    parser.add_argument("files", type=Path, nargs="+", help="what a run wrote beside its line")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/chaos"), help="folder (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    for file in arguments.files:
        try:
            document = json.loads(file.read_text())
            draw(document, arguments.output / f"{document['line']['fault']}.svg")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} must be the timeline of a run: {error}") from error
    return 0


def draw(document: Mapping[str, Any], output: Path) -> None:
    """``output``'s ending says the format. Raises UsageError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("plots need matplotlib: install resilientllm[plot]") from error
    line, timeline = document["line"], document["timeline"]
    # The same run gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "resilientllm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained")
        axes = figure.subplots()
        told: set[str] = set()
        kinds = sorted({stream["of"] for stream in timeline["streams"]})

        def once(label: str) -> str | None:
            if label in told:
                return None
            told.add(label)
            return label

        for stream in timeline["streams"]:
            arrivals = stream["arrivals"]
            axes.plot(
                arrivals,
                range(1, len(arrivals) + 1),
                drawstyle="steps-post",
                linewidth=1,
                color=COLOURS[kinds.index(stream["of"]) % len(COLOURS)],
                label=once(f"streams of {stream['of']}"),
            )
        for recovery in timeline["recoveries"]:
            start = recovery["detected"]
            axes.axvline(start, color="black", linewidth=0.7, linestyle=":", label=once("detected, or decided"))
            for phase, colour in PHASES.items():
                seconds = recovery["phases_ms"].get(phase, 0.0) / 1000
                if seconds:
                    axes.axvspan(start, start + seconds, color=colour, alpha=0.5, linewidth=0, label=once(phase))
                start += seconds
        for at in timeline["faults"]:
            axes.axvline(at, color="#d73027", linewidth=1.2, label=once("fault, or its end"))
        last = max((stream["arrivals"][-1] for stream in timeline["streams"] if stream["arrivals"]), default=0.0)
        axes.set_xlim(-BEFORE_SECONDS, last + AFTER_SECONDS)
        axes.set_xlabel("seconds since the fault")
        axes.set_ylabel("tokens of each stream")
        phase = f", in {line['phase']}" if line["phase"] else ""
        axes.set_title(f"{line['fault']} of stage {line['victim']}, {line['shape']}{phase}", fontsize=9)
        figure.legend(fontsize=7, loc="outside right upper")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None)
