"""Where scenarios happen: a cluster with the product on it and one object, whole before each of them.

One node is for engines and the operator, the others are for stages, one each, so that a scenario can end a stage's node
without an engine: nobody takes over the open streams of an engine that dies. Stages ask for a GPU, which their nodes
pretend to have, so that a device can fail as a kubelet sees it fail.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resilientllm_api.ports import ENGINE_API_PORT

from e2e.cluster import faults
from e2e.cluster.errors import ClusterError, CommandFailed
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.namespaces import NamespaceCluster, NamespaceProvider
from e2e.cluster.provider import HostPort
from e2e.cluster.timings import STEADY
from e2e.demo import installation
from e2e.demo.observation import waits_for
from e2e.scenarios.load import PAUSE_SECONDS, Load, Target
from e2e.scenarios.look import KINDS, Look, parse_look
from e2e.scenarios.verdict import Reference

NAME = "tiny"
NAMESPACE = installation.NAMESPACE
NODES = 5
GPUS = 2
"""Of each node for stages: while one node is dead, another carries two stages."""
PURPOSE = "e2e.resilientllm.dev/for"
"""The label that says what a node is for."""
ENGINES, STAGES = "engines", "stages"
API_SERVER = ("control-plane", "kube-apiserver")

SERVICE = Target("service", "", (0, 1))
PINNED = {0: (2, 3), 1: (4, 5)}
"""The prompts of streams that go to one engine, by instance."""

READY_SECONDS = 600.0
MEND_SECONDS = 240.0
STREAMS_SECONDS = 120.0
LOOK_SECONDS = 1.0
"""A look takes a fifth of a second of a core."""


def specified() -> dict[str, Any]:
    """The object: the shipped example, on the nodes that are for it."""
    obj = installation.example()
    spec = obj["spec"]
    spec["engine"]["nodeSelector"] = {PURPOSE: ENGINES}
    # Two processes, which start as long as a stage does, and start together with it.
    spec["engine"]["resources"]["requests"]["cpu"] = "100m"
    spec["stage"]["nodeSelector"] = {PURPOSE: STAGES}
    spec["stage"]["resources"]["limits"] = {"nvidia.com/gpu": "1"}
    spec["recovery"] |= {
        # A node that loses its power says nothing, so this is what a client waits for.
        "heartbeatTimeout": "5s",
        "drainTimeout": "60s",
        # Every scenario fails a node: none of them is to be avoided for what others have done.
        "repeatOffender": {"failures": 10, "window": "1m"},
    }
    return obj


class Ground:
    def __init__(self, models: Path) -> None:
        """``models``: an empty folder that the nodes can read."""
        self._models = models
        self.name = f"scenes-{os.getpid()}"
        self._provider = NamespaceProvider(self.name)
        self._cluster: NamespaceCluster | None = None
        self._forwarded: dict[tuple[str, int], HostPort] = {}
        self.remade = 0
        self.reference: Reference = {}
        self.obj = specified()
        """As it was applied last."""

    @property
    def cluster(self) -> NamespaceCluster:
        assert self._cluster is not None, "make() comes first"
        return self._cluster

    @property
    def nodes_for_stages(self) -> tuple[str, ...]:
        return self.cluster.nodes()[1:]

    def make(self) -> Look:
        """From nothing to the object whole, and the tokens of every prompt undisturbed."""
        cluster = self._cluster = self._provider.up(NODES, mounts=default_mounts(REPOSITORY), timings=STEADY)
        first, *others = cluster.nodes()
        cluster.kubectl("label", "node", first, f"{PURPOSE}={ENGINES}")
        cluster.kubectl("label", "node", *others, f"{PURPOSE}={STAGES}")
        for node in others:
            cluster.fake_gpus(node, GPUS)
        installation.load_thin_images(cluster)
        installation.install_operator(cluster)
        self._keep_operator_from_stages()
        installation.make_model(self._models)
        installation.provide_model(cluster, self._models)
        self.obj = specified()
        installation.apply(cluster, [self.obj])
        whole = self.until_settled(READY_SECONDS)
        with self.load(rounds=1) as load:
            load.finish(STREAMS_SECONDS)
        broken = [f"{sent.target}: {sent.stream.error}" for sent in load.sent if not sent.stream.complete]
        if broken:
            raise ClusterError(
                expected="undisturbed streams to end", found="; ".join(broken), remedy="see the logs of the engines"
            )
        self.reference = {sent.stream.index: list(sent.stream.tokens) for sent in load.sent}
        return whole

    def down(self) -> None:
        self._forwarded.clear()
        self._provider.down()

    def _keep_operator_from_stages(self) -> None:
        """A scenario that ends a node would else end, by chance, the operator with it."""
        template = {"spec": {"template": {"spec": {"nodeSelector": {PURPOSE: ENGINES}}}}}
        deployment = (f"deployment/{installation.OPERATOR}", f"--namespace={installation.SYSTEM_NAMESPACE}")
        self.cluster.kubectl("patch", *deployment, f"--patch={json.dumps(template)}")
        self.cluster.kubectl("rollout", "status", *deployment, "--timeout=120s", timeout_seconds=130)

    def look(self) -> Look:
        at = time.monotonic()
        said = self.cluster.kubectl("get", KINDS, f"--namespace={NAMESPACE}", "--output=json", timeout_seconds=20)
        return parse_look(json.loads(said)["items"], NAME, at)

    def until_settled(self, timeout_seconds: float) -> Look:
        deadline = time.monotonic() + timeout_seconds
        while not (look := self.look()).settled:
            if look.seen.status.hold is not None or time.monotonic() > deadline:
                raise ClusterError(
                    expected=f"the object whole and all nodes there within {timeout_seconds:g} s",
                    found=f"{waits_for(look.seen)} Pods: {_told(look)}. Nodes: {dict(look.nodes)}",
                    remedy="see what was kept of the cluster in build/e2e",
                )
            time.sleep(LOOK_SECONDS)
        return look

    def whole(self) -> Look:
        """Everything back as it was made, whatever a scenario left; with a new cluster if it must be."""
        try:
            self._mend()
            self.until_settled(MEND_SECONDS)
            self._forget_failures()
            return self.until_settled(MEND_SECONDS)
        except ClusterError as error:
            self.keep_evidence(f"not-whole-{self.remade}", str(error))
            self.remade += 1
            self.down()
            return self.make()

    def _mend(self) -> None:
        cluster = self.cluster
        cluster.start_service(*API_SERVER)
        for node in cluster.nodes():
            if not faults.is_alive(cluster.layout, node):
                cluster.start_node(node)
            cluster.heal_node(node)
            cluster.kubectl("uncordon", node)
            self._forget_conditions(node)
        for node in self.nodes_for_stages:
            for gpu in range(GPUS):
                cluster.set_gpu_health(node, f"gpu-{gpu}", healthy=True)
        # What a roll-out has changed stays, because another one would take long. How many there are does not.
        self.obj["spec"]["instances"] = specified()["spec"]["instances"]
        installation.apply(cluster, [self.obj])

    def _forget_failures(self) -> None:
        """Faults of two scenarios must not look like one of several nodes, for which there is a breaker.

        It is left as if a person had reset it just now: only nodes that fail from now on count.
        """
        reset = {
            "tripped": False,
            "at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "message": "another scenario begins",
        }
        patch = json.dumps({"status": {"breaker": reset}})
        of = ("rllm", NAME, f"--namespace={NAMESPACE}")
        self.cluster.kubectl("patch", *of, "--subresource=status", "--type=merge", f"--patch={patch}")

    def _forget_conditions(self, node: str) -> None:
        """Conditions that no kubelet reports are those of a scenario; nobody else removes them."""
        described = json.loads(self.cluster.kubectl("get", "node", node, "--output=json"))
        types = [each["type"] for each in described["status"]["conditions"]]
        foreign = [{"type": each, "$patch": "delete"} for each in types if each not in _OF_THE_KUBELET]
        if foreign:
            self.patch_node_status(node, {"conditions": foreign})

    def patch_node_status(self, node: str, status: dict[str, Any]) -> None:
        patch = json.dumps({"status": status})
        self.cluster.kubectl("patch", "node", node, "--subresource=status", "--type=strategic", f"--patch={patch}")

    def load(
        self, *, engines: Iterable[int] = (0, 1), rounds: int | None = None, pause_seconds: float = PAUSE_SECONDS
    ) -> Load:
        """Streams through the Service, and to each of these engines."""
        look = self.look()
        service = self.forward(*installation.service_address(self.cluster, NAME))
        pods = {instance: look.pod(instance, None).ip for instance in engines}
        return Load(
            NAME,
            [
                Target(SERVICE.name, _url(service), SERVICE.prompts),
                *(
                    Target(f"engine {instance}", _url(self.forward(ip, ENGINE_API_PORT)), PINNED[instance])
                    for instance, ip in pods.items()
                    if ip is not None
                ),
            ],
            rounds,
            pause_seconds,
        )

    def forward(self, address: str, port: int) -> HostPort:
        """Each is a process, so what was asked for once is kept."""
        if (address, port) not in self._forwarded:
            self._forwarded[address, port] = HostPort(*self.cluster.forward(address, port))
        return self._forwarded[address, port]

    def operators(self) -> dict[str, int]:
        """The process of each operator that runs, by pod."""
        namespace, selector = installation.SYSTEM_NAMESPACE, "app.kubernetes.io/component=operator"
        names = self.cluster.kubectl(
            *("get", "pods", f"--namespace={namespace}", f"--selector={selector}"),
            "--output=jsonpath={.items[*].metadata.name}",
        )
        return {name: self.cluster.container_pids(namespace, name, "operator")[0] for name in names.split()}

    def keep_evidence(self, name: str, why: str) -> None:
        """What the cluster says of itself now, in build/e2e/<name>, for whoever asks why a scenario failed."""
        folder = REPOSITORY / "build" / "e2e" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "why.txt").write_text(why + "\n")
        for file, arguments in _EVIDENCE.items():
            with suppress(CommandFailed):
                (folder / file).write_text(self.cluster.kubectl(*arguments, timeout_seconds=20))
        with suppress(CommandFailed):
            for pod in self.cluster.kubectl("get", "pods", f"--namespace={NAMESPACE}", "--output=name").split():
                for previous in ("false", "true"):
                    with suppress(CommandFailed):
                        logs = ("logs", pod, f"--namespace={NAMESPACE}", f"--previous={previous}", "--tail=3000")
                        text = self.cluster.kubectl(*logs, timeout_seconds=20)
                        (folder / f"{pod.partition('/')[2]}{'.previous' * (previous == 'true')}.log").write_text(text)


_OF_THE_KUBELET = {"Ready", "MemoryPressure", "DiskPressure", "PIDPressure", "NetworkUnavailable"}
_IN_SYSTEM = f"--namespace={installation.SYSTEM_NAMESPACE}"
_EVIDENCE = {
    "object.yaml": ("get", "rllm", NAME, f"--namespace={NAMESPACE}", "--output=yaml"),
    "pods.txt": ("get", "pods", "--all-namespaces", "--output=wide"),
    "pods.yaml": ("get", "pods", f"--namespace={NAMESPACE}", "--output=yaml"),
    "nodes.txt": ("describe", "nodes"),
    "events.txt": ("get", "events", f"--namespace={NAMESPACE}", "--sort-by=.metadata.creationTimestamp"),
    "endpoints.yaml": ("get", "endpointslices", f"--namespace={NAMESPACE}", "--output=yaml"),
    "operator.log": ("logs", _IN_SYSTEM, "--selector=app.kubernetes.io/component=operator", "--tail=-1", "--prefix"),
    "operator.previous.log": (
        *("logs", _IN_SYSTEM, "--selector=app.kubernetes.io/component=operator", "--tail=-1", "--prefix"),
        "--previous",
    ),
}


def _url(address: HostPort) -> str:
    return f"http://{address.host}:{address.port}"


def _told(look: Look) -> str:
    return ", ".join(
        f"{pod.place} on {pod.node}{'' if pod.ready else ' not ready'}{' leaving' if pod.uid in look.leaving else ''}"
        for pod in look.seen.pods
    )
