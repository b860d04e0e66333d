"""Whom to kill: a stage of the instance that serves most at this moment, so that the kill meets running requests.

The Service spreads streams by chance, so this must be asked and cannot be planned.
"""

from __future__ import annotations

import os
import signal
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from resilientllm_api.ports import ENGINE_API_PORT

from e2e.cluster.errors import ClusterError
from e2e.cluster.provider import Cluster, HostPort

from .observation import Observation, Pod

RUNNING_METRIC = "vllm:num_requests_running"
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class Candidate:
    pod: Pod
    pid: int
    """The container's first process, as this machine numbers it."""


def candidates(cluster: Cluster, seen: Observation, stage: int, namespace: str) -> dict[int, Candidate]:
    """A stage's process in each instance. Looked up ahead, so that no time passes between choice and kill."""
    pods = [pod for pod in seen.pods if pod.stage == stage]
    if not pods:
        raise ClusterError(
            expected=f"a pod of stage {stage} of an instance",
            found=", ".join(each.place for each in seen.pods) or "no pod",
            remedy="choose a stage that exists: --stage",
        )
    return {pod.instance: Candidate(pod, cluster.container_pids(namespace, pod.name, pod.container)[0]) for pod in pods}


def engine_ports(cluster: Cluster, seen: Observation) -> dict[int, HostPort]:
    """Where each engine's own API is, by instance; the Service would hide which one answers."""
    return {pod.instance: cluster.forward(pod.ip, ENGINE_API_PORT) for pod in seen.pods if pod.stage is None and pod.ip}


def running_requests(engines: Mapping[int, HostPort]) -> dict[int, int]:
    return {instance: running_in(_metrics(address)) for instance, address in engines.items()}


def busiest(running: Mapping[int, int]) -> int:
    """The instance with most requests. Raises ClusterError if there is none at all."""
    instance = max(sorted(running), key=lambda each: running[each], default=None)
    if instance is None or running[instance] == 0:
        raise ClusterError(
            expected="an engine that serves some of the streams",
            found=f"running requests by instance: {dict(running)}",
            remedy="make the streams longer: --tokens",
        )
    return instance


def kill(victim: Candidate) -> None:
    """Not asked to end, and not able to say goodbye."""
    os.kill(victim.pid, signal.SIGKILL)


def _metrics(address: HostPort) -> str:
    url = f"http://{address.host}:{address.port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as answer:
            text: str = answer.read().decode()
    except OSError as error:
        raise ClusterError(
            expected="metrics of an engine", found=str(error), remedy="see the log of the engine's pod"
        ) from error
    return text


def running_in(metrics: str) -> int:
    """From Prometheus' text format, summed over label sets. Raises ClusterError if the metric is not there."""
    values = [float(line.rpartition(" ")[2]) for line in metrics.splitlines() if _names(line)]
    if not values:
        raise ClusterError(
            expected=f"the metric {RUNNING_METRIC}", found="none of that name", remedy="see what this vLLM calls it"
        )
    return int(sum(values))


def _names(line: str) -> bool:
    return line.startswith((f"{RUNNING_METRIC}{{", f"{RUNNING_METRIC} "))
