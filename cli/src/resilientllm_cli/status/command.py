"""`resilientllm status`, and how any topology is shown: once or again and again, as a picture or as JSON."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from resilientllm_cli.errors import UsageError
from resilientllm_cli.local.command import add_directory
from resilientllm_cli.plugin.asked_for import add_arguments, topologies
from resilientllm_cli.status import of_run
from resilientllm_cli.status.picture import picture
from resilientllm_cli.status.topology import Topology

UNHEALTHY = 1
WATCH_SECONDS = 1.0
WIDTH_WITHOUT_TERMINAL = 200

EXIT_CODES = """exit codes: 0 every instance serves, on stages of its own, as asked for; 1 not so; 2 nothing can be
said: no such object, nothing runs there, the cluster cannot be asked, wrong arguments. With --watch that of the last
picture."""

_EPILOG = f"""examples:
  resilientllm status                         all objects of the context's namespace
  resilientllm status my-model -n models      one of them
  resilientllm status -A --json               all, for programs
  resilientllm status --local --watch         a run of `resilientllm local up`, until Ctrl-C

{EXIT_CODES}"""

Look = Callable[[], Sequence[Topology]]
"""Asks how things stand now. Raises UsageError if that cannot be told."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "who serves whom: instances and stages of objects in a cluster, or of a local run, as a picture"
    parser = commands.add_parser(
        "status", help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--local", action="store_true", help="of a local run, not of a cluster")
    add_directory(parser)
    add_output(parser)
    parser.set_defaults(run=run)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs; with --watch a line for every change")
    parser.add_argument("-w", "--watch", action="store_true", help="go on until Ctrl-C")


def run(arguments: argparse.Namespace) -> int:
    return show(_look(arguments), as_json=arguments.json, watch=arguments.watch)


def _look(arguments: argparse.Namespace) -> Look:
    if arguments.local:
        return lambda: [of_run.look(arguments.directory)]
    # Importing the client of Kubernetes takes longer than all else here.
    from resilientllm_cli.plugin.cluster import Cluster

    cluster = Cluster.connect(arguments.kubeconfig, arguments.context)
    return lambda: topologies(cluster, arguments)


def show(look: Look, *, as_json: bool, watch: bool, pause_seconds: float = WATCH_SECONDS) -> int:
    """Returns the exit code. Raises UsageError if nothing can be said at the first look."""
    seen = look()
    with _signals_as_ctrl_c(), _screen(as_json, watch) as draw:
        draw(seen, None)
        try:
            while watch:
                time.sleep(pause_seconds)
                problem = None
                try:
                    seen = look()
                except UsageError as error:
                    problem = str(error)
                draw(seen, problem)
        except KeyboardInterrupt:
            pass
    return 0 if all(each.healthy for each in seen) else UNHEALTHY


@contextmanager
def _signals_as_ctrl_c() -> Iterator[None]:
    """Also SIGTERM, and also where a shell started this in the background, which ignores SIGINT."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Draw = Callable[[Sequence[Topology], str | None], None]
"""Gets what was seen last, and why it could not be seen anew, if so."""


@contextmanager
def _screen(as_json: bool, watch: bool) -> Iterator[Draw]:
    if not (watch and sys.stdout.isatty() and not as_json):
        yield _changes(_json_line if watch else _json) if as_json else _changes(_print)
        return
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        yield lambda seen, problem: live.update(_pictures(seen, problem, console.width), refresh=True)


def _changes(write: Draw) -> Draw:
    """Writes only what differs from what was written last."""
    last: list[tuple[Sequence[Topology], str | None]] = []

    def draw(seen: Sequence[Topology], problem: str | None) -> None:
        if last != [(seen, problem)]:
            last[:] = [(seen, problem)]
            write(seen, problem)

    return draw


def _print(seen: Sequence[Topology], problem: str | None) -> None:
    # In a pipe rich takes 80 columns.
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)
    console.print(_pictures(seen, problem, console.width))


def _pictures(seen: Sequence[Topology], problem: str | None, width: int) -> RenderableType:
    now = datetime.now(UTC)
    pictures = [picture(each, now, width) for each in seen]
    return Group(*pictures, *([Text(f"As it was last seen: {problem}")] if problem else []))


def _json(seen: Sequence[Topology], problem: str | None) -> None:
    print(json.dumps(_document(seen, problem), indent=2), flush=True)


def _json_line(seen: Sequence[Topology], problem: str | None) -> None:
    print(json.dumps(_document(seen, problem)), flush=True)


def _document(seen: Sequence[Topology], problem: str | None) -> dict[str, object]:
    items = [asdict(each) for each in seen]
    for item in items:
        for recovery in item["recoveries"]:
            recovery["detected_at"] = recovery["detected_at"].isoformat()
    return {"items": items, **({"problem": problem} if problem else {})}
