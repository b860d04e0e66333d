"""`resilientllm bench`."""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from resilientllm_cli.bench import machine, move_report, picture, replication_report, report, weights_report
from resilientllm_cli.bench.measure import measure, quick
from resilientllm_cli.bench.settings import (
    NO_MOVES,
    NO_REPLICATION,
    NO_WEIGHTS,
    MoveSettings,
    ReplicationSettings,
    Settings,
    WeightsSettings,
)
from resilientllm_cli.errors import UsageError
from resilientllm_cli.progress import progress
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

FAILED = 1
RECOVERY, THROUGHPUT, REPLICATION, WEIGHTS, MOVES = PARTS = (
    "recovery",
    "throughput",
    "replication",
    "weights",
    "moves",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure recovery, throughput, replication, start-up and moves")
    picture.add_parser(parser.add_subparsers(title="of a result", metavar="plot"))
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part only; may be repeated")
    parser.add_argument("--kills", type=int, default=Settings.kills, help="of a stage, under load")
    parser.add_argument("--restarts", type=int, default=Settings.restarts, help="of stock vLLM; a minute each")
    parser.add_argument("--throughput-runs", type=int, default=Settings.throughput_runs, help="of each side")
    parser.add_argument(
        "--context-kills", type=int, default=ReplicationSettings.kills, help="at each context, of each mode"
    )
    parser.add_argument(
        "--context-restarts", type=int, default=ReplicationSettings.restarts, help="of stock vLLM, at two contexts"
    )
    parser.add_argument(
        "--pairs", type=int, default=ReplicationSettings.pairs, help="of runs with replication on and off"
    )
    parser.add_argument("--starts", type=int, default=WeightsSettings.starts, help="of a stage, from each source")
    parser.add_argument("--moves", type=int, default=MoveSettings.moves, help="of a stage, there and back, under load")
    parser.add_argument("--sigterms", type=int, default=MoveSettings.sigterms, help="to a stage under load")
    parser.add_argument("--stages", type=int, default=Settings.stages)
    parser.add_argument("--streams", type=int, default=Settings.streams)
    parser.add_argument("--quick", action="store_true", help="few of each: shows that it works")
    parser.add_argument("--model", type=Path, help="default: a tiny model, made now")
    parser.add_argument("--output", type=Path, default=Path("build/bench.json"))
    parser.add_argument("--directory", type=Path, default=Path("build/bench"), help="logs and plans")
    parser.add_argument("--stock-programs", type=Path, default=Path("bench"), help="folder of stock_serve.py")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a token of ours was lost, duplicated or changed, and when it was broken off: no figure then."""
    parts = arguments.only or PARTS
    recovers = RECOVERY in parts
    settings = Settings(
        model=arguments.model or _tiny_model(arguments.directory),
        output=arguments.output,
        directory=arguments.directory,
        stock_programs=arguments.stock_programs,
        kills=arguments.kills if recovers else 0,
        restarts=arguments.restarts if recovers else 0,
        throughput_runs=arguments.throughput_runs if THROUGHPUT in parts else 0,
        stages=arguments.stages,
        streams=arguments.streams,
        replication=_replication(arguments) if REPLICATION in parts else NO_REPLICATION,
        weights=_weights(arguments) if WEIGHTS in parts else NO_WEIGHTS,
        moves=MoveSettings(arguments.moves, arguments.sigterms) if MOVES in parts else NO_MOVES,
    )
    _check(settings)
    settings = quick(settings) if arguments.quick else settings
    console = Console()
    surroundings = {
        "layout": {
            "instances": settings.instances,
            "stages": settings.stages,
            "streams": settings.streams,
            "tokens": settings.tokens,
        },
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    measured, started = report.Measured(), time.monotonic()

    def result() -> dict[str, Any]:
        return report.document(measured, {**surroundings, "seconds": time.monotonic() - started})

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    broken_off = False
    try:
        with progress(console, "bench") as tell:

            def say(line: str) -> None:
                tell(line)
                _write(settings.output, result())

            measure(settings, measured, say)
    except KeyboardInterrupt:
        broken_off = True
        console.print("broken off: what was measured so far follows", highlight=False)
    _write(settings.output, result())
    console.print(report.table(result()))
    if settings.replication.needs_cluster:
        console.print(replication_report.table(result()["replication"]))
    if measured.starts:
        console.print(weights_report.table(result()["weights"]))
    if measured.moves:
        console.print(move_report.table(result()["moves"]))
    unharmed = all(kill.tokens.unharmed and not kill.errors for kill in measured.all_of_ours)
    return 0 if unharmed and not broken_off else FAILED


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def _replication(arguments: argparse.Namespace) -> ReplicationSettings:
    return ReplicationSettings(
        kills=arguments.context_kills, restarts=arguments.context_restarts, pairs=arguments.pairs
    )


def _weights(arguments: argparse.Namespace) -> WeightsSettings:
    return WeightsSettings(starts=arguments.starts, programs=arguments.stock_programs)


def _check(settings: Settings) -> None:
    of_replication = settings.replication
    counts = {
        "--kills": settings.kills,
        "--restarts": settings.restarts,
        "--throughput-runs": settings.throughput_runs,
        "--context-kills": of_replication.kills,
        "--context-restarts": of_replication.restarts,
        "--pairs": of_replication.pairs,
        "--starts": settings.weights.starts,
        "--moves": settings.moves.moves,
        "--sigterms": settings.moves.sigterms,
    }
    for flag, count in counts.items():
        if count < 0:
            raise UsageError(f"{flag} must be at least 0, found {count}")
    if settings.streams < 1:
        raise UsageError(f"--streams must be at least 1, found {settings.streams}")
    needs_stock = settings.restarts or settings.throughput_runs or of_replication.restarts or settings.weights.bursts
    if needs_stock and not (settings.stock_programs / "stock_serve.py").is_file():
        raise UsageError(
            f"--stock-programs must be the folder of stock_serve.py, found none in {settings.stock_programs}: "
            "run in a checkout, or name its bench folder"
        )


def _tiny_model(directory: Path) -> Path:
    model = directory / "tiny"
    write_tiny_model(model, TinyModel())
    return model
