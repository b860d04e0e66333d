"""What many objects cost the operator, and how soon it decides: ``python -m bench.operator_scale -o FILE`` (root)

1,000 ResilientLLM objects of 2 instances and 4 stages each: 8,000 stages, 2,000 engines, 10,000 pods. A real API
server with etcd, and the shipped RBAC; this program plays the scheduler and all kubelets, and one HTTP server all
engines. The operator is one process, as it is shipped, with its lease.

From an event to the decision that follows from it: the clock starts when the API server has taken the event (for
engines, when they are told), and stops when a watch of ours shows what the operator wrote. So both ways through
the API server are in it. One object after the other; then a node with many pods at once, another time with other
objects; then three nodes at once, by which the breaker of whoever is on all three trips.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from resilientllm_cli.bench import machine
from resilientllm_cli.comparison import percentile

from bench.operator_scale.cluster import CONCURRENCY, NAMESPACE, Cluster, gather, healthy_node, obj
from bench.operator_scale.events import correlated, engine_changes, node_conditions, pod_changes
from bench.operator_scale.harness import between, install, processes, rounds, usage
from e2e.cluster.lone import LoneControlPlane, own_network
from e2e.simulation.api import CUSTOM, AdminApi, Json

PODS_PER_NODE = 50
CREATION_TIMEOUT_SECONDS = 1800.0


async def measure(
    control_plane: LoneControlPlane, token: str, folder: Path, options: argparse.Namespace, found: Json
) -> None:
    """Adds to ``found`` part by part: what was measured before something fails is worth having."""

    def took(name: str, samples: list[float], **more: Any) -> None:
        found[name] = summary(samples) | more
        print(name, {key: value for key, value in found[name].items() if key != "samples_ms"}, flush=True)

    pods = options.objects * options.instances * (options.stages + 1)
    nodes = [f"node-{number}" for number in range(max(pods // PODS_PER_NODE, 4))]
    chosen = random.Random(7)
    async with (
        AdminApi(control_plane.kubeconfig) as api,
        processes(control_plane, token, folder) as running,
        asyncio.TaskGroup() as tasks,
    ):
        operator = running["operator"]
        cluster = Cluster(api)
        await api.create("api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        # Without a controller manager nobody else makes it, and no pod is admitted without.
        await api.create(f"api/v1/namespaces/{NAMESPACE}/serviceaccounts", {"metadata": {"name": "default"}})
        await gather(api.create("api/v1/nodes", healthy_node(node)) for node in nodes)
        # Every node begins with a taint, which the controller manager would take away.
        await gather(api.patch(f"api/v1/nodes/{node}", {"spec": {"taints": None}}) for node in nodes)
        objects = f"{CUSTOM}/namespaces/{NAMESPACE}/resilientllms"
        background = [
            tasks.create_task(cluster.watch(objects, cluster.objects)),
            tasks.create_task(cluster.watch(f"api/v1/namespaces/{NAMESPACE}/pods", cluster.pods, cluster.saw_pod)),
            *(tasks.create_task(cluster.play(nodes)) for _ in range(CONCURRENCY)),
        ]
        begun, idle = time.monotonic(), usage(operator.pid)
        await gather(api.create(objects, obj(n, options.instances, options.stages)) for n in range(options.objects))
        progress = tasks.create_task(tell_progress(cluster, operator.pid))
        await cluster.until(lambda: cluster.ready() == options.objects, CREATION_TIMEOUT_SECONDS)
        creation = between(idle, usage(operator.pid)) | {"seconds": time.monotonic() - begun}
        progress.cancel()
        print("created", creation, flush=True)
        await asyncio.sleep(30)  # Until pauses between rounds are as long as they become.
        before, counted = usage(operator.pid), await rounds()
        await asyncio.sleep(options.steady_seconds)
        steady = between(before, usage(operator.pid))
        steady["rounds"] = {name: value - counted.get(name, 0) for name, value in (await rounds()).items()}
        print("steady", steady, flush=True)
        found |= {
            "objects": options.objects,
            "instances": options.instances,
            "stages": options.stages,
            "pods": len(cluster.pods),
            "nodes": len(nodes),
            "creation": creation,
            "steady": steady,
        }
        took("pod_status_to_status_write", await pod_changes(cluster, options.samples, chosen))
        engines = running["engines"]
        took("engine_news_to_status_write", await engine_changes(cluster, engines, options.samples, chosen))
        storms, met = await node_conditions(cluster, nodes, options.storms)
        for what in ("status", "new_pod"):
            each = [storm[f"to_{what}_ms"] for storm in storms]
            took(
                f"node_condition_to_{what}",
                [ms for storm in each for ms in storm],
                storms=[len(storm) for storm in each],
            )
        tripped, left = await correlated(cluster, met)
        took("correlated_to_breaker", tripped, **left)
        found["at_the_end"] = between(before, usage(operator.pid)) | {"rounds": await rounds()}
        assert operator.poll() is None, "the operator ended"
        for task in background:
            task.cancel()


def summary(samples: list[float]) -> dict[str, Any]:
    return {
        "n": len(samples),
        "p50_ms": percentile(samples, 50),
        "p99_ms": percentile(samples, 99),
        "max_ms": max(samples),
        "samples_ms": [round(each, 1) for each in samples],
    }


async def tell_progress(cluster: Cluster, pid: int) -> None:
    while True:
        now = usage(pid)
        print(
            f"{cluster.ready()} ready, {len(cluster.pods)} pods, {now.rss_mb:.0f} MB, {now.cpu_seconds:.0f} s",
            flush=True,
        )
        await asyncio.sleep(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--samples", type=int, default=100, help="of each kind of event; every one is undone, too")
    parser.add_argument("--storms", type=int, default=5, help="nodes that get a condition, one after the other")
    parser.add_argument("--steady-seconds", type=float, default=60.0)
    parser.add_argument("--keep", type=Path, help="a folder for the logs of all processes")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/operator-scale.json"))
    options = parser.parse_args()
    own_network()
    # The pods of a thousand objects, whole: looking for cycles among them would take longer than what is measured.
    gc.disable()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with LoneControlPlane(folder, extra=()) as control_plane:
            found: Json = {"machine": machine.describe(), "versions": machine.versions()}
            try:
                asyncio.run(measure(control_plane, install(control_plane), folder, options, found))
            finally:
                options.output.parent.mkdir(parents=True, exist_ok=True)
                options.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
