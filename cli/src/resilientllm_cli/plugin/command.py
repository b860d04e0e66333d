"""`kubectl resilientllm status|plan|drain`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resilientllm_api.crd import ResilientLLM
from resilientllm_api.durations import parse_seconds
from rich.console import Console, RenderableType

from resilientllm_cli.errors import UsageError
from resilientllm_cli.plugin import view
from resilientllm_cli.plugin.cluster import Cluster
from resilientllm_cli.plugin.draining import dependants, engines
from resilientllm_cli.plugin.planned import planned

NOT_DONE = 1
USAGE_ERROR = 2
DRAIN_POLL_SECONDS = 1.0
WIDTH_WITHOUT_TERMINAL = 200

EPILOG = """exit codes: 0 done; 1 drain: not done in time; 2 wrong arguments, or the cluster cannot be asked.
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
    for name, action, text in (
        ("status", status, "instances and stages: who serves whom, who keeps the copies, the last recoveries"),
        ("plan", plan, "for every stage who stands in for it, in order of preference"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("name", nargs="?", help="of the object; by default all of the namespace")
        where = command.add_mutually_exclusive_group()
        where.add_argument("-n", "--namespace", help="by default the context's")
        where.add_argument("-A", "--all-namespaces", action="store_true")
        command.add_argument("--json", action="store_true", help="for programs")
        _add_connection(command)
        command.set_defaults(run=action)
    text = "cordon a node and wait until no engine is served by, or has copies on, a stage there; evicts nothing"
    command = commands.add_parser("drain", help=text, description=text)
    command.add_argument("node")
    command.add_argument("--timeout", type=_duration, default="10m", help="how long to wait (default 10m)")
    _add_connection(command)
    command.set_defaults(run=drain)
    return parser


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kubeconfig", type=Path, help="by default as kubectl finds it")
    parser.add_argument("--context", help="of the kubeconfig; by default the current one")


def _duration(text: str) -> float:
    try:
        return parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def status(cluster: Cluster, arguments: argparse.Namespace) -> int:
    objects = _asked_for(cluster, arguments)
    if arguments.json:
        _print_json(
            {
                **_name(obj),
                "status": obj.status.model_dump(mode="json", by_alias=True, exclude_none=True) if obj.status else {},
            }
            for obj in objects
        )
    else:
        _print(*(view.status(obj, datetime.now(UTC)) for obj in objects))
    return 0


def plan(cluster: Cluster, arguments: argparse.Namespace) -> int:
    objects = _asked_for(cluster, arguments)
    nodes = cluster.nodes()
    plans = [(obj, *planned(obj, nodes)) for obj in objects]
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
        if (obstacle := view.why_nothing_moves(obj)) is not None and dependants([obj], node.name):
            _say(f"note: {view.name_of(obj)} does not move, because {obstacle}")
    deadline = time.monotonic() + arguments.timeout
    told: list[str] | None = None
    while remaining := dependants(objects := cluster.objects(None), node.name):
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
    for engine in engines(objects, node.name):
        _say(f"note: {engine} is on it, too: evicted, it finishes its requests within recovery.drainTimeout")
    _say(f"next: kubectl drain {node.name} --ignore-daemonsets --delete-emptydir-data")
    return 0


def _asked_for(cluster: Cluster, arguments: argparse.Namespace) -> list[ResilientLLM]:
    namespace = None if arguments.all_namespaces else arguments.namespace or cluster.namespace
    if arguments.name is not None:
        if namespace is None:
            raise UsageError("expected a name or --all-namespaces, found both")
        return [cluster.object(namespace, arguments.name)]
    found = cluster.objects(namespace)
    if not found and not arguments.json:
        where = f"namespace {namespace}" if namespace else "any namespace"
        print(f"no ResilientLLM objects in {where}", file=sys.stderr)
    return found


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
