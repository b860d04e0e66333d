"""Which objects a command is about: the arguments that say so, and what the cluster has of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from resilientllm_api.crd import ResilientLLM

from resilientllm_cli.errors import UsageError
from resilientllm_cli.status.of_object import topology
from resilientllm_cli.status.topology import Topology

if TYPE_CHECKING:
    from resilientllm_cli.plugin.cluster import Cluster


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="of the object; by default all of the namespace")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-n", "--namespace", help="by default the context's")
    where.add_argument("-A", "--all-namespaces", action="store_true")
    add_connection(parser)


def add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kubeconfig", type=Path, help="by default as kubectl finds it")
    parser.add_argument("--context", help="of the kubeconfig; by default the current one")


def objects(cluster: Cluster, arguments: argparse.Namespace) -> list[ResilientLLM]:
    """At least one. Raises UsageError if there is none."""
    namespace = None if arguments.all_namespaces else arguments.namespace or cluster.namespace
    if arguments.name is not None:
        if namespace is None:
            raise UsageError("expected a name or --all-namespaces, found both")
        return [cluster.object(namespace, arguments.name)]
    found = cluster.objects(namespace)
    if not found:
        raise UsageError(f"no ResilientLLM objects in {f'namespace {namespace}' if namespace else 'any namespace'}")
    return found


def topologies(cluster: Cluster, arguments: argparse.Namespace) -> list[Topology]:
    return [topology(each) for each in objects(cluster, arguments)]
