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
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from resilientllm_cli.bench import machine
from resilientllm_cli.comparison import percentile
from resilientllm_operator.node_affinity import nodes_kept_off

from e2e.cluster.launch import REPOSITORY
from e2e.cluster.layout import POD_NETWORK
from e2e.cluster.lone import DIES_WITH_US, LoneControlPlane, own_network
from e2e.simulation.api import CUSTOM, AdminApi, Json, Refused
from e2e.simulation.kubelets import running_status

NAMESPACE = "models"
PODS_PER_NODE = 50
METRICS_PORT = 18080
CONCURRENCY = 40
SYSTEM = "resilientllm-system"
CREATION_TIMEOUT_SECONDS = 1800.0
DECISION_TIMEOUT_SECONDS = 60.0
NODE_CONDITION = "GpuMemWatch"
"""NVSentinel's; every stage there is moved."""
MANY_NODES = 3
"""Of one object that fail within a minute: its breaker trips."""
REST_SECONDS = 5.0


@dataclass
class Cluster:
    """What two watches of ours have seen: objects and pods."""

    api: AdminApi
    objects: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    made: dict[str, dict[str, float]] = field(default_factory=dict)
    """When each pod was first seen, by its slot and its name."""
    waiting: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """Pods of which something has changed."""
    addresses: Iterator[str] = field(default_factory=lambda: (str(POD_NETWORK[number]) for number in count(256)))

    async def watch(self, path: str, known: dict[str, Json], seen: Callable[[Json], None] = lambda obj: None) -> None:
        version = ""
        while True:
            if not version:
                page = await self.api.get(path, resourceVersion="0")
                version = page["metadata"]["resourceVersion"]
                known.update({obj["metadata"]["name"]: obj for obj in page["items"]})
            async for event in self.api.watch(path, version):
                obj = event["object"]
                if event["type"] == "ERROR":
                    version = ""
                    break
                version = obj["metadata"]["resourceVersion"]
                if event["type"] == "DELETED":
                    known.pop(obj["metadata"]["name"], None)
                elif event["type"] != "BOOKMARK":
                    known[obj["metadata"]["name"]] = obj
                    seen(obj)
                async with self.changed:
                    self.changed.notify_all()

    def saw_pod(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        self.made.setdefault(slot_of(name), {}).setdefault(name, time.monotonic())
        self.waiting.put_nowait(name)

    async def until(self, check: Callable[[], Any], timeout_seconds: float) -> Any:
        async with asyncio.timeout(timeout_seconds), self.changed:
            while not (found := check()):
                await self.changed.wait()
            return found

    async def moments(self, checks: Mapping[Hashable, Callable[[], float | None]]) -> list[float]:
        """When each of these was the case: a check says when, or that it is not yet."""
        found: dict[Hashable, float] = {}

        def look() -> bool:
            for key in checks.keys() - found.keys():
                if (at := checks[key]()) is not None:
                    found[key] = at
            return len(found) == len(checks)

        try:
            await self.until(look, DECISION_TIMEOUT_SECONDS)
        except TimeoutError as error:
            missing = sorted(map(str, checks.keys() - found.keys()))
            error.add_note(f"{len(missing)} of {len(checks)} are missing: {', '.join(missing)}")
            raise
        return sorted(found.values())

    def stages_on(self, nodes: Collection[str]) -> list[Json]:
        """The pods of stages that stay there."""
        return [
            pod
            for pod in self.pods.values()
            if pod["spec"].get("nodeName") in nodes
            and "resilientllm.dev/stage" in pod["metadata"]["labels"]
            and "deletionTimestamp" not in pod["metadata"]
        ]

    def ready(self) -> int:
        return sum(condition(obj, "Ready") == "True" for obj in self.objects.values())

    async def play(self, nodes: list[str]) -> None:
        """Scheduler and kubelets: a pod is bound, runs at once, and ends when it is told to. One of several workers."""
        while True:
            pod = self.pods.get(await self.waiting.get())
            if pod is None:
                continue
            path = f"api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}"
            with suppress(Refused):  # It has changed meanwhile, or is gone; then there is another event.
                if "deletionTimestamp" in pod["metadata"]:
                    await self.api.delete(path, grace_seconds=0)
                elif "nodeName" not in pod["spec"]:
                    await self._bind(pod, nodes)
                elif "podIP" not in pod["status"]:
                    await self.api.patch(f"{path}/status", {"status": running_status(pod, next(self.addresses))})

    async def _bind(self, pod: Json, nodes: list[str]) -> None:
        """The copies of a stage are never on one node."""
        labels = pod["metadata"]["labels"]
        place = int(labels["resilientllm.dev/stage"]) if "resilientllm.dev/stage" in labels else 9
        number = int(labels["resilientllm.dev/name"].removeprefix("model-"))
        first = 7 * number + 3 * place + len(nodes) // 2 * int(labels["resilientllm.dev/instance"])
        avoided = nodes_kept_off(pod["spec"])
        node = next(each for step in range(len(nodes)) if (each := nodes[(first + step) % len(nodes)]) not in avoided)
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        path = f"api/v1/namespaces/{NAMESPACE}/pods/{name}/binding"
        await self.api.create(path, {"metadata": {"name": name}, "target": target})


def condition(obj: Json, kind: str) -> str:
    found = obj.get("status", {}).get("conditions", [])
    return next((str(each["status"]) for each in found if each["type"] == kind), "")


async def gather(work: Iterable[Awaitable[Any]]) -> None:
    """Some at a time."""
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(each: Awaitable[Any]) -> None:
        async with limit:
            await each

    await asyncio.gather(*(one(each) for each in work))


@dataclass(frozen=True)
class Usage:
    at: float
    cpu_seconds: float
    rss_mb: float
    peak_mb: float


def usage(pid: int) -> Usage:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    memory = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return Usage(
        at=time.monotonic(),
        cpu_seconds=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        rss_mb=int(memory["VmRSS"].split()[0]) / 1024,
        peak_mb=int(memory["VmHWM"].split()[0]) / 1024,
    )


def between(before: Usage, after: Usage) -> dict[str, Any]:
    seconds = after.at - before.at
    return {
        "seconds": seconds,
        "cpu_seconds": after.cpu_seconds - before.cpu_seconds,
        "cpu_share_of_a_core": (after.cpu_seconds - before.cpu_seconds) / seconds,
        "rss_mb": after.rss_mb,
        "peak_rss_mb": after.peak_mb,
    }


def healthy_node(name: str) -> Json:
    ready = {"type": "Ready", "status": "True", "reason": "Bench", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    return {"metadata": {"name": name}, "status": {"conditions": [ready]}}


def obj(number: int, instances: int, stages: int) -> Json:
    return {
        "apiVersion": "resilientllm.dev/v1alpha1",
        "kind": "ResilientLLM",
        "metadata": {"name": f"model-{number}", "namespace": NAMESPACE},
        "spec": {"image": "worker:1", "model": {"path": "/models/m"}, "instances": instances, "stages": stages},
    }


@asynccontextmanager
async def processes(control_plane: LoneControlPlane, token: str, folder: Path) -> AsyncIterator[dict[str, Any]]:
    """Engines and the operator; both are gone afterwards."""
    kubeconfig = folder / "operator.kubeconfig"
    config = json.loads(control_plane.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    kubeconfig.write_text(yaml.safe_dump(config))
    commands: dict[str, list[str | Path]] = {
        "engines": [sys.executable, "-m", "e2e.simulation.engines"],
        "operator": [
            *(sys.executable, "-m", "resilientllm_operator.main", "--kubeconfig", kubeconfig),
            *("--port", str(METRICS_PORT), "--log-level", "WARNING"),
        ],
    }
    running: dict[str, Any] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(
                    [*DIES_WITH_US, *(str(part) for part in command)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE if name == "engines" else log,
                    stderr=log,
                    cwd=REPOSITORY,
                )
            if name == "engines":
                assert running[name].stdout.readline() == b"ready\n"
        yield running
    finally:
        for process in reversed(running.values()):
            process.terminate()
        for process in running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


async def rounds() -> dict[str, float]:
    """The operator's own count: by result, and how many took no longer than ``le`` seconds."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{METRICS_PORT}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = {}
    for line in lines:
        if line.startswith(("resilientllm_operator_rounds_total", "resilientllm_operator_round_seconds_")):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


async def decided(cluster: Cluster, name: str, start: float, place: tuple[int, int], key: str, value: object) -> float:
    """Milliseconds until the object's status has this value for a stage."""
    await cluster.until(
        lambda: stage_status(cluster.objects[name].get("status", {}), *place).get(key) == value,
        DECISION_TIMEOUT_SECONDS,
    )
    return (time.monotonic() - start) * 1000


def stage_status(status: Json, instance: int, stage: int) -> Json:
    found = [each for each in status.get("instances", []) if each["instance"] == instance]
    return next((each for each in found[0]["stages"] if each["stage"] == stage), {}) if found else {}


async def pod_changes(cluster: Cluster, samples: int, chosen: random.Random) -> list[float]:
    """A stage's pod is not ready any more, and the status says so; then it is again."""
    found = []
    for _ in range(samples):
        name = chosen.choice(sorted(cluster.objects))
        pod = chosen.choice(stages_of(cluster, name))
        place = place_of(pod)
        path = f"api/v1/namespaces/{NAMESPACE}/pods/{pod['metadata']['name']}/status"
        for ready in (False, True):
            conditions = [
                each | ({"status": str(ready)} if each["type"] in ("Ready", "ContainersReady") else {})
                for each in pod["status"]["conditions"]
            ]
            await cluster.api.patch(path, {"status": {"conditions": conditions}})
            start = time.monotonic()
            found.append(await decided(cluster, name, start, place, "ready", ready))
        await asyncio.sleep(0.1)
    return found


async def engine_changes(cluster: Cluster, engines: Any, samples: int, chosen: random.Random) -> list[float]:
    """An engine loses a stage and says that a donor stands in; then the stage is back."""
    found = []
    for _ in range(samples):
        name = chosen.choice(sorted(cluster.objects))
        pod = stages_of(cluster, name)[0]
        for lost in ([pod["status"]["podIP"]], []):
            engines.stdin.write(json.dumps(lost).encode() + b"\n")
            engines.stdin.flush()
            start = float(engines.stdout.readline())
            found.append(await decided(cluster, name, start, (0, 0), "servedBy", "1.0" if lost else "0.0"))
        await asyncio.sleep(0.1)
    return found


async def node_conditions(cluster: Cluster, nodes: list[str], storms: int) -> tuple[list[dict[str, Any]], set[str]]:
    """A node's condition says that its stages are to move: from the condition to each one's status, and its new pod.

    No object meets two of them: three nodes within a minute are a matter for its breaker. Also says which ones met one.
    """
    found, met = [], set[str]()
    for _ in range(storms):
        node = next(node for node in nodes if (new := owners(cluster.stages_on([node]))) and new.isdisjoint(met))
        pods = cluster.stages_on([node])
        met |= owners(pods)
        begun = time.monotonic()
        start = await sicken(cluster, [node])
        leaving, made = await asyncio.gather(
            cluster.moments({pod["metadata"]["name"]: partial(is_to_leave, cluster, pod) for pod in pods}),
            cluster.moments({pod["metadata"]["name"]: partial(successor, cluster, pod, begun) for pod in pods}),
        )
        found.append(
            {
                "objects": len(owners(pods)),
                "stages": len(pods),
                "to_status_ms": [(at - start) * 1000 for at in leaving],
                "to_new_pod_ms": [(at - start) * 1000 for at in made],
            }
        )
        await asyncio.sleep(REST_SECONDS)
    return found, met


async def correlated(cluster: Cluster, met: set[str]) -> tuple[list[float], dict[str, int]]:
    """Three nodes get the condition at once: from that to the breaker of each object that has stages on all three.

    And what became of these objects. ``met``: those that have had a storm already.
    """
    fresh = next((name for name in sorted(cluster.objects) if name not in met), None)
    assert fresh is not None, f"all of the {len(met)} objects have met a storm: ask for fewer, or for more objects"
    three = list(dict.fromkeys(pod["spec"]["nodeName"] for pod in stages_of(cluster, fresh)))[:MANY_NODES]
    hit = [name for name in owners(cluster.stages_on(three)) - met if nodes_of(cluster, name) >= set(three)]
    before = {name: {pod["metadata"]["uid"] for pod in stages_of(cluster, name)} for name in hit}
    start = await sicken(cluster, three)
    tripped = await cluster.moments({name: partial(breaker_tripped, cluster, name) for name in hit})
    await asyncio.sleep(REST_SECONDS)
    after = {name: {pod["metadata"]["uid"] for pod in stages_of(cluster, name)} for name in hit}
    return [(at - start) * 1000 for at in tripped], {
        "stages_on_the_nodes": len([pod for pod in cluster.stages_on(three) if owner(pod) in hit]),
        "pods_made": sum(len(after[name] - before[name]) for name in hit),
        "pods_deleted": sum(len(before[name] - after[name]) for name in hit),
        "places_served_by_another": sum(away(cluster.objects[name]["status"]) for name in hit),
    }


async def sicken(cluster: Cluster, nodes: Iterable[str]) -> float:
    """Gives nodes the condition, at once; returns when the API server has taken the last."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    sick = {"type": NODE_CONDITION, "status": "True", "reason": "Bench", "message": "[79] simulated"}
    sick |= {"lastTransitionTime": now, "lastHeartbeatTime": now}
    conditions = [*healthy_node("")["status"]["conditions"], sick]
    await gather(
        cluster.api.patch(f"api/v1/nodes/{node}/status", {"status": {"conditions": conditions}}) for node in nodes
    )
    return time.monotonic()


def stages_of(cluster: Cluster, name: str) -> list[Json]:
    """The pods of an object's stages, in the order of their places."""
    found = [
        pod
        for pod in cluster.pods.values()
        if owner(pod) == name
        and "resilientllm.dev/stage" in pod["metadata"]["labels"]
        and "deletionTimestamp" not in pod["metadata"]
    ]
    return sorted(found, key=place_of)


def nodes_of(cluster: Cluster, name: str) -> set[str]:
    return {pod["spec"]["nodeName"] for pod in stages_of(cluster, name)}


def breaker_tripped(cluster: Cluster, name: str) -> float | None:
    return time.monotonic() if cluster.objects[name]["status"].get("breaker", {}).get("tripped") else None


def away(status: Json) -> int:
    """How many places are not served by their own stages."""
    return sum(
        stage["servedBy"] != f"{each['instance']}.{stage['stage']}"
        for each in status["instances"]
        for stage in each["stages"]
    )


def is_to_leave(cluster: Cluster, pod: Json) -> float | None:
    status = cluster.objects[owner(pod)]["status"]
    return time.monotonic() if stage_status(status, *place_of(pod)).get("leaving") else None


def successor(cluster: Cluster, pod: Json, begun: float) -> float | None:
    """When the next pod of the same slot was seen."""
    return next((at for at in cluster.made[slot_of(pod["metadata"]["name"])].values() if at > begun), None)


def slot_of(pod: str) -> str:
    return pod.rsplit("-", 1)[0]


def owner(pod: Json) -> str:
    return str(pod["metadata"]["labels"]["resilientllm.dev/name"])


def owners(pods: Iterable[Json]) -> set[str]:
    return {owner(pod) for pod in pods}


def place_of(pod: Json) -> tuple[int, int]:
    labels = pod["metadata"]["labels"]
    return int(labels["resilientllm.dev/instance"]), int(labels["resilientllm.dev/stage"])


def summary(samples: list[float]) -> dict[str, Any]:
    return {
        "n": len(samples),
        "p50_ms": percentile(samples, 50),
        "p99_ms": percentile(samples, 99),
        "max_ms": max(samples),
        "samples_ms": [round(each, 1) for each in samples],
    }


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


async def tell_progress(cluster: Cluster, pid: int) -> None:
    while True:
        now = usage(pid)
        print(
            f"{cluster.ready()} ready, {len(cluster.pods)} pods, {now.rss_mb:.0f} MB, {now.cpu_seconds:.0f} s",
            flush=True,
        )
        await asyncio.sleep(5)


def install(control_plane: LoneControlPlane) -> str:
    """CRD and RBAC as shipped; a token of the operator's account."""
    control_plane.kubectl("apply", "--kustomize", str(REPOSITORY / "manifests" / "base"))
    control_plane.kubectl("wait", "--for=condition=Established", "crd/resilientllms.resilientllm.dev", "--timeout=60s")
    account = ("create", "token", "resilientllm-operator", "--duration=6h")
    return control_plane.kubectl(f"--namespace={SYSTEM}", *account).strip()


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
