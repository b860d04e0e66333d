"""`kubectl resilientllm status|plan|drain`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from resilientllm_api.crd import ResilientLLM
from resilientllm_api.durations import parse_seconds
from rich.console import Console, RenderableType

from resilientllm_cli.errors import UsageError
from resilientllm_cli.plugin import view
from resilientllm_cli.plugin.asked_for import add_arguments, add_connection, objects, topologies
from resilientllm_cli.plugin.cluster import Cluster
from resilientllm_cli.plugin.draining import dependants, engines
from resilientllm_cli.plugin.planned import planned
from resilientllm_cli.status.command import EXIT_CODES, WIDTH_WITHOUT_TERMINAL, add_output, show
from resilientllm_cli.status.of_object import name_of, why_nothing_moves

NOT_DONE = 1
USAGE_ERROR = 2
DRAIN_POLL_SECONDS = 1.0

EPILOG = """exit codes: 0 done; 1 drain: not done in time, status: not healthy; 2 no such object, wrong arguments, or
the cluster cannot be asked.
Options come after the name of the plugin: kubectl resilientllm status -n NAMESPACE."""


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    arguments = _parser().parse_args(words)
    command: Callable[[Cluster, argparse.Namespace], int] = arguments.run
    try:
        return command(Cluster.connect(arguments.kubeconfig, arguments.context), arguments)
    except UsageError as error:
        print(f"kubectl resilientllm: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kubectl resilientllm",
        description="Looks at ResilientLLM objects, and moves their work away from a node.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "who serves whom: instances and stages as a picture, who keeps the copies, the last recoveries"
    command = commands.add_parser(
        "status",
        help=text,
        description=text,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(command)
    add_output(command)
    command.set_defaults(run=status)
    text = "for every stage who stands in for it, in order of preference"
    command = commands.add_parser("plan", help=text, description=text)
    add_arguments(command)
    command.add_argument("--json", action="store_true", help="for programs")
    command.set_defaults(run=plan)
    text = "cordon a node and wait until no engine is served by, or has copies on, a stage there; evicts nothing"
    command = commands.add_parser("drain", help=text, description=text)
    command.add_argument("node")
    command.add_argument("--timeout", type=_duration, default="10m", help="how long to wait (default 10m)")
    add_connection(command)
    command.set_defaults(run=drain)
    return parser


def _duration(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def status(cluster: Cluster, arguments: argparse.Namespace) -> int:
    return show(lambda: topologies(cluster, arguments), as_json=arguments.json, watch=arguments.watch)


def plan(cluster: Cluster, arguments: argparse.Namespace) -> int:
    asked_for = objects(cluster, arguments)
    nodes = cluster.nodes()
    plans = [(obj, *planned(obj, nodes)) for obj in asked_for]
    if arguments.json:
        _print_json(
            {**_name(obj), "donors": {str(stage): [str(each) for each in ranked] for stage, ranked in donors.items()}}
            for obj, donors, _ in plans
        )
    else:
        _print(*(view.plan(obj, donors, locations) for obj, donors, locations in plans))
    return 0


def drain(cluster: Cluster, arguments: argparse.Namespace) -> int:
    node = cluster.node(arguments.node)
    if not node.cordoned:
        cluster.cordon(node.name)
    _say(f"node {node.name} {'was cordoned already' if node.cordoned else 'is cordoned'}")
    for obj in cluster.objects(None):
        if (obstacle := why_nothing_moves(obj)) is not None and dependants([obj], node.name):
            _say(f"note: {name_of(obj)} does not move, because {obstacle}")
    deadline = time.monotonic() + arguments.timeout
    told: list[str] | None = None
    while remaining := dependants(found := cluster.objects(None), node.name):
        if remaining != told:
            for line in remaining:
                _say(f"waits: {line}")
            told = remaining
        if time.monotonic() >= deadline:
            print(
                f"kubectl resilientllm: expected nothing to depend on node {node.name} within {arguments.timeout:g} s, "
                f"found {'; '.join(remaining)}. The node stays cordoned. See whether the operator runs, and what "
                "kubectl resilientllm status says.",
                file=sys.stderr,
            )
            return NOT_DONE
        time.sleep(DRAIN_POLL_SECONDS)
    _say(f"no stage of node {node.name} serves an engine or keeps copies for one")
    for engine in engines(found, node.name):
        _say(f"note: {engine} is on it, too: evicted, it finishes its requests within recovery.drainTimeout")
    _say(f"next: kubectl drain {node.name} --ignore-daemonsets --delete-emptydir-data")
    return 0


def _name(obj: ResilientLLM) -> dict[str, str]:
    return {"namespace": obj.metadata["namespace"], "name": obj.metadata["name"]}


def _print_json(items: Iterable[Mapping[str, Any]]) -> None:
    print(json.dumps({"items": list(items)}, indent=2))


def _print(*parts: RenderableType) -> None:
    # In a pipe rich takes 80 columns, and cuts what is wider.
    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL, highlight=False)
    for part in parts:
        console.print(part)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
