"""What the pods of the object hold: processes, descriptors, memory, connections, shared memory, KV blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resilientllm_api.ports import ENGINE_API_PORT
from resilientllm_cli.chaos.leaks import Holding, sizes_of, together
from resilientllm_cli.chaos.network import established
from resilientllm_cli.local import observe

from e2e.demo.observation import Pod
from e2e.scenarios.ground import NAMESPACE, Ground

KV_IN_USE = "vllm:kv_cache_usage_perc"


@dataclass(frozen=True)
class Holdings:
    pids: Mapping[str, tuple[int, ...]]
    """Of each place, the main process first."""
    all: Holding

    def held(self) -> dict[str, dict[str, int]]:
        """By place, for `resilientllm chaos growth`. What runs under another pid lives another life."""
        return {place: together(pids[0], sizes_of(pids).values()) for place, pids in self.pids.items()}


def look(ground: Ground) -> Holdings:
    """Of an object that is whole. Raises ClusterError where a container does not run."""
    pods = ground.look().pods
    pids = {pod.place: tuple(ground.cluster.container_pids(NAMESPACE, pod.name, pod.container)) for pod in pods}
    sizes = sizes_of(pid for of_pod in pids.values() for pid in of_pod)
    mains = [of_pod[0] for of_pod in pids.values()]
    return Holdings(
        pids,
        Holding(
            # Those of pods that nobody knows any more, too: they would be the leak.
            processes=len(ground.cluster.pod_processes()),
            descriptors={pid: size.descriptors for pid, size in sizes.items()},
            resident_bytes={pid: size.resident_bytes for pid, size in sizes.items()},
            # Pods have namespaces of their own.
            connections=sum(established(str(pid)) for pid in mains),
            shared_memory=sum(1 for pid in mains for _ in Path(f"/proc/{pid}/root/dev/shm").iterdir()),
            kv_in_use=max(_kv_in_use(ground, pod) for pod in pods if pod.stage is None),
        ),
    )


def _kv_in_use(ground: Ground, engine: Pod) -> float:
    assert engine.ip is not None, f"{engine.place} has no address"
    address = ground.forward(engine.ip, ENGINE_API_PORT)
    return observe.metric(f"http://{address.host}:{address.port}", KV_IN_USE)
