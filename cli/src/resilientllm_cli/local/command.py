"""`resilientllm local up|status|down`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resilientllm_api.crd import WeightsSource
from resilientllm_api.plan import ReplicationMode
from rich.console import Console
from rich.live import Live

from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import state, view
from resilientllm_cli.local.cluster import ClusterFailed, LocalCluster
from resilientllm_cli.local.layout import Files, Layout
from resilientllm_cli.local.preflight import RUNNERS
from resilientllm_cli.local.state import LocalState

DEFAULT_DIRECTORY = Path("build/local")
REPLICATION = {"ring": ReplicationMode.RING, "none": ReplicationMode.NONE}
WEIGHTS = {"twin": WeightsSource.TWIN, "storage": WeightsSource.STORAGE}
DOWN_TIMEOUT_SECONDS = 60.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    local = commands.add_parser("local", help="run instances as processes of this machine")
    actions = local.add_subparsers(dest="action", required=True)

    up_parser = actions.add_parser(
        "up", help="start, keep running, restart what dies; flags of `vllm serve` follow after --"
    )
    up_parser.add_argument("--model", type=Path, required=True, help="a model directory")
    up_parser.add_argument("--instances", type=int, default=2)
    up_parser.add_argument("--stages", type=int, default=2, help="pipeline stages of an instance")
    up_parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks of a stage")
    up_parser.add_argument("--port", type=int, default=8000, help="of engine 0; engine i serves on PORT + i")
    up_parser.add_argument("--runner", choices=RUNNERS, default="v1", help="vLLM's model runner")
    up_parser.add_argument(
        "--replication",
        choices=REPLICATION,
        default="ring",
        help="ring: every stage keeps copies of another instance's KV blocks (default); none: it keeps none",
    )
    up_parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        default="storage",
        help="where a stage that is started again gets its weights: twin: from the same stage of another instance; "
        "storage: from --model (default)",
    )
    up_parser.add_argument("--env", metavar="K=V", action="append", default=[], help="for the processes; repeatable")
    add_directory(up_parser)
    up_parser.set_defaults(run=up)

    for name, run, text in (
        ("status", status, "show the processes of a running one; who serves whom: resilientllm status --local"),
        ("down", down, "stop a running one"),
    ):
        parser = actions.add_parser(name, help=text)
        add_directory(parser)
        parser.set_defaults(run=run)


def add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory", type=Path, default=DEFAULT_DIRECTORY, help=f"state, plans and logs (default {DEFAULT_DIRECTORY})"
    )


def up(arguments: argparse.Namespace) -> int:
    layout = Layout(
        model=arguments.model,
        instances=arguments.instances,
        stages=arguments.stages,
        tensor_parallel_size=arguments.tensor_parallel_size,
        port=arguments.port,
        directory=arguments.directory,
        runner=arguments.runner,
        replication=REPLICATION[arguments.replication],
        weights=WEIGHTS[arguments.weights],
        extra_flags=tuple(arguments.passed_on),
        env=dict(_assignment(text) for text in arguments.env),
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with _display() as show, LocalCluster(layout, on_change=show) as cluster:
        while not stop.wait(0.2):
            try:
                cluster.check()
            except ClusterFailed as failure:
                raise UsageError(str(failure)) from failure
    return 0


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageError(f"--env must be NAME=VALUE, found {text!r}")
    return name, value


@contextmanager
def _display() -> Iterator[view.Show]:
    if not sys.stdout.isatty():
        yield _print_transitions
        return
    with Live(console=Console(), auto_refresh=False) as live:
        yield lambda before, after: live.update(view.table(after), refresh=True)


def _print_transitions(before: LocalState | None, after: LocalState) -> None:
    for line in view.transitions(before, after):
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def status(arguments: argparse.Namespace) -> int:
    files = Files(arguments.directory)
    if not state.is_running(files):
        raise UsageError(f"nothing runs in {files.directory}: start it with `resilientllm local up`")
    Console().print(view.table(state.read(files.state)))
    return 0


def down(arguments: argparse.Namespace) -> int:
    files = Files(arguments.directory)
    if not state.is_running(files):
        return 0
    os.kill(state.read(files.state).pid, signal.SIGTERM)
    deadline = time.monotonic() + DOWN_TIMEOUT_SECONDS
    while state.is_running(files):
        if time.monotonic() > deadline:
            print(f"expected the run in {files.directory} to stop within {DOWN_TIMEOUT_SECONDS:g} s", file=sys.stderr)
            return 1
        time.sleep(0.1)
    return 0
