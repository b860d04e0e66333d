"""`resilientllm bench`."""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from resilientllm_cli.bench import machine, report
from resilientllm_cli.bench.measure import measure, quick
from resilientllm_cli.bench.settings import Settings
from resilientllm_cli.errors import UsageError
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

FAILED = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure recovery and throughput beside stock vLLM")
    parser.add_argument("--kills", type=int, default=Settings.kills, help="of a stage, under load")
    parser.add_argument("--restarts", type=int, default=Settings.restarts, help="of stock vLLM; a minute each")
    parser.add_argument("--throughput-runs", type=int, default=Settings.throughput_runs, help="of each side")
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
    settings = Settings(
        model=arguments.model or _tiny_model(arguments.directory),
        output=arguments.output,
        directory=arguments.directory,
        stock_programs=arguments.stock_programs,
        kills=arguments.kills,
        restarts=arguments.restarts,
        throughput_runs=arguments.throughput_runs,
        stages=arguments.stages,
        streams=arguments.streams,
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

    def say(line: str) -> None:
        console.print(line, highlight=False)
        _write(settings.output, result())

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    broken_off = False
    try:
        measure(settings, measured, say)
    except KeyboardInterrupt:
        broken_off = True
        console.print("broken off: what was measured so far follows", highlight=False)
    _write(settings.output, result())
    console.print(report.table(result()))
    unharmed = all(kill.tokens.unharmed and not kill.errors for kill in measured.ours)
    return 0 if unharmed and not broken_off else FAILED


def _write(output: Path, result: dict[str, Any]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def _check(settings: Settings) -> None:
    for name in ("kills", "restarts", "throughput_runs"):
        if getattr(settings, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 0, found {getattr(settings, name)}")
    if settings.streams < 1:
        raise UsageError(f"--streams must be at least 1, found {settings.streams}")
    needs_stock = settings.restarts or settings.throughput_runs
    if needs_stock and not (settings.stock_programs / "stock_serve.py").is_file():
        raise UsageError(
            f"--stock-programs must be the folder of stock_serve.py, found none in {settings.stock_programs}: "
            "run in a checkout, or name its bench folder"
        )


def _tiny_model(directory: Path) -> Path:
    model = directory / "tiny"
    write_tiny_model(model, TinyModel())
    return model
