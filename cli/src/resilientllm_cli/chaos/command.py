"""`resilientllm chaos`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resilientllm_api.plan import StageId
from rich.console import Console

from resilientllm_cli.chaos import enclosure, growth, timeline
from resilientllm_cli.chaos import line as lines
from resilientllm_cli.chaos.faults import KINDS
from resilientllm_cli.chaos.line import Line
from resilientllm_cli.chaos.load import Phase, undisturbed
from resilientllm_cli.chaos.matrix import SHAPES, Case, cases, soak, worlds
from resilientllm_cli.chaos.network import Network
from resilientllm_cli.chaos.network import run as run_program
from resilientllm_cli.chaos.run import Outcome
from resilientllm_cli.chaos.run import run as run_case
from resilientllm_cli.chaos.shape import Shape
from resilientllm_cli.chaos.world import World
from resilientllm_cli.errors import UsageError
from resilientllm_cli.progress import progress
from resilientllm_cli.tiny_model import TinyModel, write_tiny_model

FAILED = 1
RUNS = 20
WORLDS = 8
"""Made at most of one shape: a run that breaks one costs the time of another."""
RELAYED_STAGE = 1
"""Of instance 0: the place that gets commands, hidden states and replicas."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("chaos", help="faults under load, each proven to have landed; one line of JSON each")
    actions = parser.add_subparsers(title="of results", metavar="plot|table|growth")
    timeline.add_parser(actions)
    _add_print(actions, "table", "figures of each kind, in markdown", lines.table)
    _add_print(
        actions,
        "growth",
        "descriptors and memory over many runs, in markdown",
        lambda found: growth.table(growth.longest_lives(found)),
    )
    parser.add_argument("--faults", default="", metavar="KIND,…", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each kind (default: %(default)s)")
    parser.add_argument(
        "--shapes", default=",".join(map(str, SHAPES)), help="instances x stages, in turns (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next ones count on from it")
    parser.add_argument("--for-seconds", type=float, default=float("inf"), help="begin no run after that")
    parser.add_argument("--resume", action="store_true", help="leave out what the output has already")
    parser.add_argument(
        "--soak", action="store_true", help="the kinds at random, in one world of the first shape, for --for-seconds"
    )
    parser.add_argument("--output", type=Path, default=Path("build/chaos.jsonl"), help="lines are appended")
    parser.add_argument("--directory", type=Path, default=Path("build/chaos"), help="timelines and logs")
    parser.set_defaults(run=run)


def _add_print(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    tell: Callable[[list[dict[str, Any]]], str],
) -> None:
    parser = actions.add_parser(name, help=text)
    parser.add_argument("file", type=Path, nargs="?", default=Path("build/chaos.jsonl"))
    parser.set_defaults(run=_print, tell=tell)


def _print(arguments: argparse.Namespace) -> int:
    try:
        print(arguments.tell(lines.read(arguments.file.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{arguments.file} must have lines of chaos: {error}") from error
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a run had a problem."""
    shapes = [Shape.parse(text) for text in arguments.shapes.split(",")]
    names = arguments.faults.split(",") if arguments.faults else list(KINDS)
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"unknown faults {', '.join(unknown)}: expected some of {', '.join(KINDS)}")
    kinds = [KINDS[name] for name in names]
    if arguments.soak:
        wanted = soak(kinds, shapes[0], arguments.runs, arguments.seed)
    else:
        wanted = cases(kinds, shapes, arguments.runs, arguments.seed)
    if arguments.resume and arguments.output.exists():
        done = {(each["fault"], each["shape"], each["seed"]) for each in lines.read(arguments.output.read_text())}
        wanted = [case for case in wanted if case.key not in done]
    for folder in (arguments.directory, arguments.output.parent):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder} must be a folder, or one that can be made: {error.strerror}") from error
    enclosure.enter(sys.argv[2:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + arguments.for_seconds
    total = len(wanted) if deadline == float("inf") else None
    with progress(Console(), "chaos", total) as say:
        problems = _run_all(wanted, arguments.output, arguments.directory, deadline, say)
    return FAILED if problems else 0


def _run_all(wanted: Sequence[Case], output: Path, directory: Path, deadline: float, say: Callable[[str], None]) -> int:
    """Returns how many runs had a problem."""
    problems = 0
    with tempfile.TemporaryDirectory(prefix="rllm-") as folder:
        model, disk = Path(folder) / "tiny", Path(folder) / "disk"
        disk.mkdir()
        write_tiny_model(model, TinyModel())
        run_program("mount", "-t", "tmpfs", "none", "/dev/shm")
        network = Network()
        for shape, relayed, group in worlds(wanted):
            left = list(group)
            worlds_left = WORLDS
            while left and worlds_left and time.monotonic() < deadline:
                worlds_left -= 1
                behind = StageId(instance=0, stage=min(RELAYED_STAGE, shape.stages - 1)) if relayed else None
                logs = directory / "logs" / f"{shape}{'-relayed' * relayed}-{WORLDS - worlds_left}"
                try:
                    with World(shape, model, network, disk, logs, behind) as world:
                        left, failed = _run_in(world, left, output, directory, deadline, say)
                        problems += failed
                except (OSError, RuntimeError) as error:  # a TimeoutError is an OSError
                    say(f"a world of {shape} broke: {error}")
                    problems += 1
            problems += len(left) if time.monotonic() < deadline else 0
    return problems


def _run_in(
    world: World,
    wanted: Sequence[Case],
    output: Path,
    directory: Path,
    deadline: float,
    say: Callable[[str], None],
) -> tuple[list[Case], int]:
    """Until all are done, or the world cannot be used any more. Returns what is left, and how many had a problem."""
    urls = {instance: world.url(instance) for instance in range(world.shape.instances)}
    expected = {phase: undisturbed(urls, phase) for phase in Phase}
    problems = 0
    for number, case in enumerate(wanted, start=1):
        if time.monotonic() > deadline:
            return [], problems
        began = time.monotonic()
        try:
            outcome = run_case(world, case.kind, case.seed, expected)
        except (OSError, RuntimeError, ValueError) as error:
            broken = Line(*case.key, landed={}, problems=(f"the harness failed: {type(error).__name__}: {error}",))
            outcome = Outcome(broken, {}, whole=False)
        problems += bool(outcome.line.problems)
        with output.open("a") as file:
            file.write(outcome.line.to_json() + "\n")
        document = {"line": json.loads(outcome.line.to_json()), "timeline": outcome.timeline}
        (directory / f"{case.kind.name}-{case.shape}-{case.seed}.json").write_text(json.dumps(document))
        say(outcome.line.in_words(time.monotonic() - began))
        if not outcome.whole:
            return list(wanted[number:]), problems
    return [], problems
