"""Command line of the clusters: `python -m e2e.cluster up`, and then `… kubectl get nodes`.

Exit status: 0 done, 1 the machine or the cluster was not as expected (standard error says how),
2 wrong usage; `kubectl` passes on kubectl's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .choose import PROVIDERS, provider
from .errors import ClusterError
from .kind_smoke import kind_smoke
from .launch import REPOSITORY
from .machine_files import default_mounts
from .provider import Cluster, Provider

_DEFAULT_NAME = "dev"


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        run: Callable[[Provider, argparse.Namespace], int] = chosen.run
        return run(provider(chosen.provider, chosen.name, chosen.dir), chosen)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m e2e.cluster", description="A real Kubernetes with several nodes on this machine, for tests."
    )
    parser.add_argument("--name", default=_DEFAULT_NAME, help="name of the cluster (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="folder of its files, for the namespaces provider")
    parser.add_argument(
        "--provider",
        choices=PROVIDERS,
        default="namespaces",
        help="what nodes are made of: Linux namespaces (no Docker needed), or kind with Docker (default: %(default)s)",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Callable[[Provider, argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    up = command("up", _up, "make a cluster, and wait until it is ready")
    up.add_argument("--nodes", type=int, default=3, help="number of nodes (default: %(default)s)")
    up.add_argument(
        "--mount",
        type=Path,
        action="append",
        help="path of this machine that containers see, read-only; may be repeated"
        " (default: /usr, the checkout, and its .venv with its Python)",
    )
    command("down", _down, "remove a cluster, or what is left of one")
    command("status", _status, "show the nodes, and where the kubeconfig is")
    kubectl = command("kubectl", _kubectl, "run kubectl against the cluster")
    kubectl.add_argument("arguments", nargs=argparse.REMAINDER)
    load = command("load", _load, "put an image archive (of `docker save`, or of `image`) on all nodes")
    load.add_argument("archive", type=Path)
    image = command("image", _image, "write and load an image that runs this machine's own files")
    image.add_argument("ref", help="for example resilientllm/operator:dev")
    image.add_argument("entrypoint", nargs="+", help="for example $PWD/.venv/bin/python -m some_module")
    forward = command("forward", _forward, "print a host:port of the loopback that leads to an address in the cluster")
    forward.add_argument("address")
    forward.add_argument("port", type=int)
    pids = command("pids", _pids, "print this machine's pids of a container's processes, the main one first")
    for part in ("namespace", "pod", "container"):
        pids.add_argument(part)
    command("kind-smoke", _kind_smoke, "show that the kind provider works, with a Docker of our own if there is none")
    faults: tuple[tuple[str, Callable[[Cluster, str], None], str], ...] = (
        ("kill-node", lambda cluster, node: cluster.kill_node(node), "cut a node's power"),
        ("start-node", lambda cluster, node: cluster.start_node(node), "switch a killed node on again"),
        ("partition-node", lambda cluster, node: cluster.partition_node(node), "cut a node's network"),
        ("heal-node", lambda cluster, node: cluster.heal_node(node), "join a partitioned node again"),
    )
    for name, action, text in faults:
        command(name, _on_node(action), text).add_argument("node")
    return parser


def _up(provider: Provider, chosen: argparse.Namespace) -> int:
    mounts = tuple(path.absolute() for path in chosen.mount) if chosen.mount else default_mounts(REPOSITORY)
    cluster = provider.up(chosen.nodes, mounts=mounts)
    print(f"{len(cluster.nodes())} nodes are ready; export KUBECONFIG={cluster.kubeconfig}")
    return 0


def _down(provider: Provider, chosen: argparse.Namespace) -> int:
    provider.down()
    return 0


def _status(provider: Provider, chosen: argparse.Namespace) -> int:
    cluster = provider.existing()
    print(f"KUBECONFIG={cluster.kubeconfig}")
    print(cluster.kubectl("get", "nodes", "--output=wide"), end="")
    return 0


def _kubectl(provider: Provider, chosen: argparse.Namespace) -> int:
    """Becomes kubectl, so that interactive commands, signals and exit statuses are its own."""
    command = provider.existing().kubectl_command(*chosen.arguments)
    sys.stdout.flush()
    os.execv(command[0], command)


def _load(provider: Provider, chosen: argparse.Namespace) -> int:
    if not chosen.archive.exists():
        raise ClusterError(expected="an image archive", found=f"no file {chosen.archive}", remedy="check the path")
    provider.existing().load_image(chosen.archive)
    return 0


def _image(provider: Provider, chosen: argparse.Namespace) -> int:
    cluster = provider.existing()
    cluster.load_thin_image(chosen.ref, entrypoint=chosen.entrypoint)
    return 0


def _forward(provider: Provider, chosen: argparse.Namespace) -> int:
    print("{}:{}".format(*provider.existing().forward(chosen.address, chosen.port)))
    return 0


def _pids(provider: Provider, chosen: argparse.Namespace) -> int:
    print(*provider.existing().container_pids(chosen.namespace, chosen.pod, chosen.container))
    return 0


def _kind_smoke(provider: Provider, chosen: argparse.Namespace) -> int:
    kind_smoke()
    return 0


def _on_node(action: Callable[[Cluster, str], None]) -> Callable[[Provider, argparse.Namespace], int]:
    def run(provider: Provider, chosen: argparse.Namespace) -> int:
        action(provider.existing(), chosen.node)
        return 0

    return run


if __name__ == "__main__":
    sys.exit(main())
