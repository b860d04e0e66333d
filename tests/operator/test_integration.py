"""The CRD and the operator on a real Kubernetes: a real API server, scheduler and kubelet, and the shipped RBAC.

The operator runs here as a process with a token of its ServiceAccount, so it can do just what the shipped
ClusterRole allows. What needs engines that answer is in ``e2e/test_smoke.py``, where it runs as a pod.

Set ``RESILIENTLLM_TEST_CLUSTER`` to the name of a running cluster (``python -m e2e.cluster --name NAME up``) to use
that one.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from resilientllm_api.crd import NOTHING_OBSERVED
from resilientllm_api.engine_state import EnginePhase
from resilientllm_operator import login
from resilientllm_operator.kube import KubeClient

from e2e.cluster.errors import CommandFailed
from e2e.cluster.provider import Cluster
from tests.operator.builders import engine_state
from tests.operator.cluster import ACCOUNT, IMAGE, SYSTEM
from tests.operator.engine_stand import EngineStand
from tests.operator.kstatus import Kstatus, kstatus

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NAMESPACE = "operator-test"


@pytest.fixture(scope="module")
def kubeconfig(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's own credentials, and nobody else's."""
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    token = cluster.kubectl("-n", SYSTEM, "create", "token", ACCOUNT).strip()
    (user,) = config["users"]
    user["user"] = {"token": token}
    file = tmp_path_factory.mktemp("credentials") / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="module")
def empty_namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace that admits only pods of the strictest kind."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield NAMESPACE
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=true", timeout_seconds=120)


@pytest.fixture
def namespace(cluster: Cluster, empty_namespace: str) -> Iterator[str]:
    """The namespace; whatever a test leaves there is gone before the next."""
    yield empty_namespace
    cluster.kubectl("-n", empty_namespace, "delete", "rllm", "--all", "--wait=true")
    kinds = "pods,services,endpointslices,secrets"
    eventually("the garbage collector is done", lambda: not read(cluster, kinds)["items"])


@contextmanager
def operator(kubeconfig: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = ["--kubeconfig", str(kubeconfig), "--namespace", NAMESPACE, "--port", "0"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "resilientllm_operator.main", *arguments], stdout=output, stderr=output
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0, log.read_text()


def manifest(name: str = "tiny", **spec: Any) -> dict[str, Any]:
    """A valid object; ``None`` takes a field out."""
    fields = {"image": IMAGE, "model": {"path": "/models/tiny"}, "instances": 2, "stages": 2} | spec
    return {
        "apiVersion": "resilientllm.dev/v1alpha1",
        "kind": "ResilientLLM",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {key: value for key, value in fields.items() if value is not None},
    }


def apply(cluster: Cluster, obj: dict[str, Any], *options: str) -> str:
    return cluster.kubectl("apply", "-f", "-", *options, stdin=json.dumps(obj))


def refusal(cluster: Cluster, obj: dict[str, Any]) -> str:
    with pytest.raises(CommandFailed) as caught:
        apply(cluster, obj, "--dry-run=server")
    return str(caught.value)


def read(cluster: Cluster, what: str, *options: str) -> Any:
    return json.loads(cluster.kubectl("-n", NAMESPACE, "get", what, *options, "-o", "json"))


def eventually(what: str, check: Callable[[], Any], seconds: float = 90.0) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        assert time.monotonic() < deadline, f"expected within {seconds} s: {what}"
        time.sleep(0.3)
    return answer


def ready(cluster: Cluster, name: str = "tiny") -> dict[str, Any]:
    conditions = read(cluster, f"rllm/{name}").get("status", {}).get("conditions", [])
    return next((each for each in conditions if each["type"] == "Ready"), {})


class TestInvalidObjects:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"instances": 0}, "spec.instances in body should be greater than or equal to 1"),
            ({"stages": 0}, "spec.stages in body should be greater than or equal to 1"),
            ({"stages": 65}, "spec.stages in body should be less than or equal to 64"),
            ({"stages": None}, "spec.stages: Required value"),
            ({"image": None}, "spec.image: Required value"),
            ({"model": {}}, "set either model.path (a folder in the pod) or model.name"),
            ({"model": {"path": "/m", "name": "org/m"}}, "set either model.path (a folder in the pod) or model.name"),
            ({"model": {"path": "models/tiny"}}, "spec.model.path in body should match"),
            ({"replication": {"mode": "Sometimes"}}, 'supported values: "None", "Ring"'),
            ({"replication": {"poolPercent": 201}}, "should be less than or equal to 200"),
            ({"replication": {"poolPercent": 0}}, "should be greater than or equal to 5"),
            ({"recovery": {"waitForDonor": "half an hour"}}, "spec.recovery.waitForDonor in body should match"),
            (
                {"recovery": {"heartbeatInterval": "5s", "heartbeatTimeout": "5s"}},
                "recovery.heartbeatTimeout must be longer than recovery.heartbeatInterval",
            ),
            ({"recovery": {"nodeConditions": [{"type": "A", "action": "Panic"}]}}, 'supported values: "Ignore"'),
            (
                {"recovery": {"nodeConditions": [{"type": "A", "action": "Warn"}, {"type": "A", "action": "Move"}]}},
                "Duplicate value",
            ),
            ({"recovery": {"repeatOffender": {"failures": 1}}}, "should be greater than or equal to 2"),
            ({"recovery": {"repeatOffender": {"window": "10s"}}}, "recovery.repeatOffender.window must be from 1m to"),
            ({"args": ["--pipeline-parallel-size=4"]}, "spec.args must not set what the operator sets itself"),
            ({"args": ["--tensor_parallel_size", "2"]}, "spec.args must not set what the operator sets itself"),
            ({"args": ["-tp", "2"]}, "spec.args must not set what the operator sets itself"),
            ({"args": ["--shutdown-timeout=9"]}, "spec.recovery.drainTimeout"),
            ({"recovery": {"drainTimeout": "0s"}}, "recovery.drainTimeout must be from 1s to 1h"),
            ({"recovery": {"drainTimeout": "61m"}}, "recovery.drainTimeout must be from 1s to 1h"),
            ({"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}, "Duplicate value"),
            ({"service": {"port": 70000}}, "should be less than or equal to 65535"),
            ({"stage": {"resources": {"limits": {"memory": "lots"}}}}, "in body should match"),
        ],
    )
    def test_are_refused_with_a_message(
        self, cluster: Cluster, namespace: str, changes: dict[str, Any], message: str
    ) -> None:
        assert message in refusal(cluster, manifest(**changes))

    @pytest.mark.parametrize("name", ["x" * 41, "1st", "a.b"])
    def test_names_that_no_pod_can_be_named_after(self, cluster: Cluster, namespace: str, name: str) -> None:
        assert "the name must have at most 40 characters, begin with a letter" in refusal(cluster, manifest(name))

    @pytest.mark.parametrize(
        "changes", [{"stages": 3}, {"tensorParallelSize": 2}, {"model": {"path": "/models/other"}}]
    )
    def test_what_decides_the_weights_cannot_change(
        self, cluster: Cluster, namespace: str, changes: dict[str, Any]
    ) -> None:
        apply(cluster, manifest())
        (field,) = changes
        assert f"spec.{field} cannot change" in refusal(cluster, manifest(**changes))

    def test_flags_of_vllm_pass(self, cluster: Cluster, namespace: str) -> None:
        apply(cluster, manifest(args=["--max-model-len=64", "--model-impl=vllm", "--stage-nothing"]))


class TestObjects:
    def test_get_defaults(self, cluster: Cluster, namespace: str) -> None:
        apply(cluster, manifest())
        spec = read(cluster, "rllm/tiny")["spec"]
        times = {
            "waitForDonor": "30s",
            "heartbeatInterval": "100ms",
            "heartbeatTimeout": "800ms",
            "stepTimeout": "2s",
            "sickAfter": "30s",
            "stragglers": "Report",
            "mode": "Act",
            "weights": "Twin",
            "repeatOffender": {"failures": 3, "window": "1h"},
            "drainTimeout": "5m",
        }
        assert spec["recovery"] == times
        assert spec["replication"] == {"mode": "Ring", "poolPercent": 100, "topologyKey": "kubernetes.io/hostname"}
        assert (spec["tensorParallelSize"], spec["service"]) == (1, {"port": 80})

    def test_are_not_complete_for_other_tools_until_an_operator_has_seen_them(
        self, cluster: Cluster, namespace: str
    ) -> None:
        """By a default of the CRD, which the API server adds when it reads."""
        apply(cluster, manifest())
        assert read(cluster, "rllm/tiny")["status"] == {"observedGeneration": NOTHING_OBSERVED}
        assert kstatus(read(cluster, "rllm/tiny")) is Kstatus.IN_PROGRESS

    def test_are_explained(self, cluster: Cluster) -> None:
        text = cluster.kubectl("explain", "rllm.spec.recovery.waitForDonor")
        assert "How long a request waits" in text


class TestRights:
    @pytest.mark.parametrize(
        ("verb", "resource", "allowed"),
        [
            ("create", "pods", "yes"),
            ("get", "secrets", "yes"),
            ("list", "secrets", "no"),
            ("delete", "secrets", "no"),
            ("update", "resilientllms", "no"),
            ("patch", "pods", "no"),
            ("patch", "poddisruptionbudgets.policy", "yes"),
            ("delete", "poddisruptionbudgets.policy", "no"),
            ("create", "pods/exec", "no"),
            ("watch", "nodes", "yes"),
            ("patch", "nodes", "no"),
        ],
    )
    def test_are_what_is_needed_and_no_more(self, cluster: Cluster, verb: str, resource: str, allowed: str) -> None:
        user = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
        try:
            kind, _, part = resource.partition("/")
            question = ["auth", "can-i", verb, kind, f"--subresource={part}", f"--as={user}", "-A"]
            answer = cluster.kubectl(*question).strip()
        except CommandFailed as refused:  # kubectl says "no" with exit status 1
            answer = "no" if re.search(r"\bno\b", str(refused)) else str(refused)
        assert answer == allowed

    @pytest.mark.parametrize(
        ("verb", "lease", "where", "allowed"),
        [
            ("create", "leases", SYSTEM, "yes"),
            ("update", f"leases/{ACCOUNT}", SYSTEM, "yes"),
            ("update", "leases/another", SYSTEM, "no"),
            ("update", f"leases/{ACCOUNT}", "default", "no"),
            ("delete", f"leases/{ACCOUNT}", SYSTEM, "no"),
        ],
    )
    def test_are_for_one_lease(self, cluster: Cluster, verb: str, lease: str, where: str, allowed: str) -> None:
        user = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
        try:
            answer = cluster.kubectl("auth", "can-i", verb, lease, f"--as={user}", f"--namespace={where}").strip()
        except CommandFailed as refused:
            answer = "no" if re.search(r"\bno\b", str(refused)) else str(refused)
        assert answer == allowed


class TestOperator:
    def test_makes_what_an_object_needs_and_leaves_nothing_behind(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, manifest(instances=1))
            pods = eventually("3 pods", lambda: (p := read(cluster, "pods")["items"]) and len(p) == 3 and p)
            names = sorted(pod["metadata"]["name"].rsplit("-", 1)[0] for pod in pods)
            assert names == ["tiny-0-engine", "tiny-0-s0", "tiny-0-s1"]
            service = read(cluster, "service/tiny")
            assert "selector" not in service["spec"]
            (port,) = service["spec"]["ports"]
            assert (port["port"], port["targetPort"]) == (80, 8000)
            assert len(read(cluster, "secret/tiny-token")["data"]["token"]) >= 64
            slices = eventually("an EndpointSlice", lambda: read(cluster, "endpointslices")["items"])
            assert slices[0]["metadata"]["labels"]["kubernetes.io/service-name"] == "tiny"
            eventually("a status", lambda: ready(cluster))
            assert "0/1" in cluster.kubectl("-n", NAMESPACE, "get", "rllm")

            cluster.kubectl("-n", NAMESPACE, "delete", "rllm", "tiny")
            kinds = "pods,services,endpointslices,secrets,poddisruptionbudgets"
            eventually("nothing left", lambda: not read(cluster, kinds)["items"])

    def test_comes_back_to_the_same_world(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        def uids() -> set[str]:
            return {pod["metadata"]["uid"] for pod in read(cluster, "pods")["items"]}

        with operator(kubeconfig, tmp_path / "log") as process:
            apply(cluster, manifest(image="example.invalid/none:0", imagePullPolicy="Never", instances=1))
            eventually("3 pods", lambda: len(uids()) == 3)
            before = uids()
            process.kill()
            process.wait()
            process.returncode = 0  # Killed on purpose; the context manager expects an orderly end.
        lost = read(cluster, "pods")["items"][0]["metadata"]["name"]
        cluster.kubectl("-n", NAMESPACE, "delete", "pod", lost, "--wait=true", "--grace-period=0", "--force")
        with operator(kubeconfig, tmp_path / "log"):
            eventually("3 pods again", lambda: len(uids()) == 3)
            assert len(uids() & before) == 2

    def test_says_that_an_image_is_missing(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, manifest(image="example.invalid/none:0", imagePullPolicy="Never", instances=1))
            condition = eventually(
                "ImagePullFailed", lambda: (c := ready(cluster)).get("reason") == "ImagePullFailed" and c
            )
            assert "Correct spec.image" in condition["message"]
            before = {pod["metadata"]["uid"] for pod in read(cluster, "pods")["items"]}
            time.sleep(3)
            assert {pod["metadata"]["uid"] for pod in read(cluster, "pods")["items"]} == before

    def test_says_that_there_are_not_enough_nodes(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        too_many = len(cluster.nodes()) + 1
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, manifest(image="example.invalid/none:0", imagePullPolicy="Never", instances=too_many))
            wanted = too_many * 3
            eventually(f"{wanted} pods", lambda: len(read(cluster, "pods")["items"]) == wanted)

            condition = eventually(
                "Unschedulable", lambda: (c := ready(cluster)).get("reason") == "Unschedulable" and c
            )
            assert "add nodes, or ask for fewer instances" in condition["message"]
            nodes = {
                (pod["metadata"]["labels"]["resilientllm.dev/stage"], pod["spec"]["nodeName"])
                for pod in read(cluster, "pods", "-l", "resilientllm.dev/role=stage")["items"]
                if "nodeName" in pod["spec"]
            }
            assert len(nodes) == 2 * len(cluster.nodes()), "two copies of a stage share a node"

    def test_sees_cordons_conditions_and_devices(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        """With one node there is nowhere to go to: what counts is what is seen, and what follows from it."""

        def stage() -> dict[str, Any]:
            instances = read(cluster, "rllm/tiny").get("status", {}).get("instances", [])
            return dict(instances[0]["stages"][0]) if instances else {}

        def stage_pods() -> dict[str, Any]:
            pods = read(cluster, "pods", "-l", "resilientllm.dev/role=stage")["items"]
            return {pod["metadata"]["name"]: pod for pod in pods}

        def say(status: str) -> None:
            condition = {"type": "GpuMemWatch", "status": status, "reason": "Test", "message": "[95] ECC"}
            patch = json.dumps({"status": {"conditions": [condition]}})
            cluster.kubectl("patch", "node", node, "--subresource=status", "--type=strategic", "-p", patch)

        # The API server takes the health of what a container has asked for only.
        asks = {"resources": {"requests": {"cpu": "1m"}}}
        one: dict[str, Any] = {
            "image": "example.invalid/none:0",
            "imagePullPolicy": "Never",
            "instances": 1,
            "stages": 1,
            "stage": asks,
        }
        log = tmp_path / "log"
        with operator(kubeconfig, log):
            apply(cluster, manifest(**one))
            eventually(
                "the kubelet's word", lambda: any("containerStatuses" in p["status"] for p in stage_pods().values())
            )
            ((first, pod),) = stage_pods().items()
            node = pod["spec"]["nodeName"]

            cluster.kubectl("cordon", node)
            try:
                eventually("a cordon is seen", lambda: "is cordoned" in stage().get("leaving", ""))
                successor = eventually("a successor", lambda: stage().get("successor"))
                assert set(stage_pods()) == {first, successor}
                assert stage()["pod"] == first
            finally:
                cluster.kubectl("uncordon", node)
            eventually("only the first pod is left", lambda: set(stage_pods()) == {first})
            eventually("nothing speaks against it", lambda: "leaving" not in stage())

            say("True")
            try:
                eventually("a condition is seen", lambda: "GpuMemWatch=True: [95] ECC" in stage().get("leaving", ""))
                successor = eventually("a successor", lambda: stage().get("successor"))
                (term,) = stage_pods()[successor]["spec"]["affinity"]["nodeAffinity"][
                    "requiredDuringSchedulingIgnoredDuringExecution"
                ]["nodeSelectorTerms"]
                assert term["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": [node]}]
            finally:
                say("False")
            eventually("only the first pod is left", lambda: set(stage_pods()) == {first})

            # The kubelet soon writes over it; what was seen is in the record.
            sick = [{"name": "cpu", "resources": [{"resourceID": "GPU-1", "health": "Unhealthy"}]}]
            path = "/status/containerStatuses/0/allocatedResourcesStatus"
            patch = json.dumps([{"op": "add", "path": path, "value": sick}])
            cluster.kubectl("-n", NAMESPACE, "patch", "pod", first, "--subresource=status", "--type=json", "-p", patch)

            def causes() -> set[str]:
                return {each["cause"] for each in read(cluster, "rllm/tiny")["status"].get("failures", [])}

            eventually("a sick device is seen", lambda: "DeviceUnhealthy" in causes())
            reasons = {each["reason"] for each in read(cluster, "events.events.k8s.io")["items"]}
            assert {"StageLeaving", "StageStays"} <= reasons
        assert "Forbidden" not in log.read_text()

    def test_works_without_the_right_to_see_nodes(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        binding = json.loads(cluster.kubectl("get", "clusterrolebinding", f"{ACCOUNT}-nodes", "-o", "json"))
        cluster.kubectl("delete", "clusterrolebinding", f"{ACCOUNT}-nodes")
        log = tmp_path / "log"
        try:
            with operator(kubeconfig, log):
                apply(cluster, manifest(image="example.invalid/none:0", imagePullPolicy="Never", instances=1))
                eventually("3 pods", lambda: len(read(cluster, "pods")["items"]) == 3)
                eventually("a status", lambda: ready(cluster))
        finally:
            kept = {"name": f"{ACCOUNT}-nodes"}
            restored = {**binding, "metadata": kept}
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(restored))
        assert log.read_text().count("may not list nodes") == 1

    def test_holds_a_pod_that_cannot_work_as_configured(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, manifest(model={"path": "/models/there-is-none"}, instances=1, stages=1))

            def held() -> Any:
                condition = ready(cluster)
                return condition.get("reason") == "ConfigurationRejected" and condition

            condition = eventually("ConfigurationRejected", held, seconds=300)
            assert "/models/there-is-none" in condition["message"]
            eventually(
                "no pod is left to restart",
                lambda: not [p for p in read(cluster, "pods")["items"] if "s0" in p["metadata"]["name"]],
                seconds=120,
            )
            reasons = {each["reason"] for each in read(cluster, "events.events.k8s.io")["items"]}
            assert "ConfigurationRejected" in reasons

    def test_needs_nothing_that_it_may_not_do(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        log = tmp_path / "log"
        with operator(kubeconfig, log):
            apply(cluster, manifest(image="example.invalid/none:0", imagePullPolicy="Never", instances=1))
            eventually("a status", lambda: ready(cluster))
            cluster.kubectl("-n", NAMESPACE, "delete", "rllm", "tiny")
            time.sleep(2)
        text = log.read_text()
        assert "Forbidden" not in text and "Traceback" not in text, text


NOWHERE = {"nodeSelector": {"resilientllm.test/nowhere": "true"}}
"""No node takes such pods, and so no kubelet has a word in what becomes of them."""


def unplaced(**spec: Any) -> dict[str, Any]:
    return manifest(**{"engine": NOWHERE, "stage": NOWHERE, "instances": 1, "stages": 1, **spec})


def pods(cluster: Cluster) -> dict[str, str]:
    """Names without their suffixes, and uids, of the pods that are not on their way out."""
    return {
        pod["metadata"]["name"].rsplit("-", 1)[0]: pod["metadata"]["uid"]
        for pod in read(cluster, "pods")["items"]
        if "deletionTimestamp" not in pod["metadata"]
    }


def conditions(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """By type, as far as they speak of the present spec."""
    obj = read(cluster, "rllm/tiny")
    found = obj.get("status", {}).get("conditions", [])
    return {each["type"]: each for each in found if each["observedGeneration"] == obj["metadata"]["generation"]}


class TestChanges:
    @pytest.fixture
    def made(self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
        """An object whose pods are there. None of them serves: what must be replaced is replaced at once."""
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, unplaced())
            eventually("2 pods", lambda: len(pods(cluster)) == 2)
            eventually("a status", lambda: conditions(cluster))
            yield pods(cluster)

    @pytest.mark.parametrize(
        ("changes", "replaced"),
        [
            ({"image": f"{IMAGE}-2"}, {"tiny-0-s0", "tiny-0-engine"}),
            ({"args": ["--max-model-len=64"]}, {"tiny-0-s0", "tiny-0-engine"}),
            ({"env": [{"name": "A", "value": "1"}]}, {"tiny-0-s0", "tiny-0-engine"}),
            ({"replication": {"poolPercent": 50}}, {"tiny-0-s0"}),
            ({"stage": NOWHERE | {"resources": {"limits": {"memory": "1Gi"}}}}, {"tiny-0-s0"}),
            ({"engine": NOWHERE | {"env": [{"name": "A", "value": "1"}]}}, {"tiny-0-engine"}),
            ({"replication": {"mode": "None"}}, set()),
            ({"recovery": {"drainTimeout": "20s", "waitForDonor": "5s", "heartbeatTimeout": "4s"}}, set()),
            ({"service": {"port": 8080}}, set()),
            ({"instances": 2}, set()),
        ],
        ids=str,
    )
    def test_replace_what_they_must(
        self, cluster: Cluster, made: dict[str, str], changes: dict[str, Any], replaced: set[str]
    ) -> None:
        apply(cluster, unplaced(**changes))
        eventually("the change is seen", lambda: conditions(cluster))

        def settled() -> bool:
            now = pods(cluster)
            return made.keys() <= now.keys() and {name for name in made if now[name] != made[name]} == replaced

        eventually(f"{replaced or 'nothing'} is replaced", settled)
        time.sleep(2)  # Nothing more comes of it.
        assert settled()

    def test_wait_while_they_are_paused(self, cluster: Cluster, made: dict[str, str]) -> None:
        cluster.kubectl("-n", NAMESPACE, "annotate", "rllm", "tiny", "resilientllm.dev/paused=true")
        apply(cluster, unplaced(args=["--max-model-len=64"]))
        eventually(
            "Progressing says Paused", lambda: conditions(cluster).get("Progressing", {}).get("reason") == "Paused"
        )
        assert pods(cluster) == made
        cluster.kubectl("-n", NAMESPACE, "annotate", "rllm", "tiny", "resilientllm.dev/paused-")
        eventually("both pods are replaced", lambda: len(pods(cluster).items() - made.items()) == 2)


class TestPods:
    def test_carry_what_clusters_with_gpus_ask_for(
        self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path
    ) -> None:
        """As the API server has them: a field that it does not know would be gone, one that is wrong be refused."""
        names = {"metadata": {"name": "test-gpu"}}
        runtime = {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "handler": "nvidia"} | names
        priority = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 7} | names
        limits = {"nvidia.com/gpu": "2", "rdma/hca": "1", "hugepages-2Mi": "2Mi", "memory": "1Gi"}
        asked = {"runtimeClassName": "test-gpu", "priorityClassName": "test-gpu"}
        stage = NOWHERE | asked | {"resources": {"limits": limits}}
        try:
            for each in (runtime, priority):
                apply(cluster, each)
            with operator(kubeconfig, tmp_path / "log"):
                apply(cluster, unplaced(stage=stage, imagePullSecrets=[{"name": "registry"}]))
                selector = ("-l", "resilientllm.dev/role=stage")
                (pod,) = eventually("the pod", lambda: read(cluster, "pods", *selector)["items"])
        finally:
            cluster.kubectl("delete", "runtimeclass/test-gpu", "priorityclass/test-gpu", "--ignore-not-found")
        given = pod["spec"]
        assert given | asked | {"imagePullSecrets": [{"name": "registry"}], "priority": 7} == given
        assert given["containers"][0]["resources"]["limits"] == limits


class TestBudgets:
    def test_let_one_of_two_copies_go(self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path) -> None:
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, unplaced(instances=2))

            def budgets() -> dict[str, Any]:
                items = read(cluster, "poddisruptionbudgets")["items"]
                return {each["metadata"]["name"]: each for each in items if each.get("status", {}).get("expectedPods")}

            eventually(
                "two budgets that the cluster understands", lambda: budgets().keys() == {"tiny-engines", "tiny-s0"}
            )
            for budget in budgets().values():
                assert (budget["status"]["expectedPods"], budget["status"]["desiredHealthy"]) == (2, 1)
                (condition,) = budget["status"]["conditions"]
                assert condition["reason"] != "SyncFailed"
            apply(cluster, unplaced(instances=1))
            eventually("no pod has to stay", lambda: {b["spec"]["minAvailable"] for b in budgets().values()} == {0})


class TestRouting:
    """An engine's own control server tells its state; what reaches the EndpointSlice of it, and how soon."""

    SECONDS = 10.0
    """Only a bound. What it takes is printed: the aim is less than 1."""

    @pytest.fixture
    def engine(self, cluster: Cluster, namespace: str, kubeconfig: Path, tmp_path: Path) -> Iterator[EngineStand]:
        with operator(kubeconfig, tmp_path / "log"):
            apply(cluster, unplaced())
            eventually("2 pods", lambda: len(pods(cluster)) == 2)
            token = eventually("a token", lambda: read(cluster, "secrets")["items"])[0]["data"]["token"]
            with EngineStand(_address_of_ours(cluster), b64decode(token), tmp_path, engine_state(0, 1)) as stand:
                _place(cluster, stand.host)
                eventually("the instance serves", lambda: conditions(cluster).get("Ready", {}).get("status") == "True")
                yield stand

    def test_follows_the_engine(self, cluster: Cluster, kubeconfig: Path, engine: EngineStand) -> None:
        took: dict[str, float] = {}

        async def follow() -> None:
            async with login.connect(login.choose(kubeconfig), aiohttp.TraceConfig()) as kube:

                async def becomes(what: str, ready: bool, serving: bool, terminating: bool = False) -> None:
                    since, wanted = time.monotonic(), {"ready": ready, "serving": serving, "terminating": terminating}
                    async with asyncio.timeout(self.SECONDS):
                        while (found := await _endpoint(kube)) != wanted:
                            await asyncio.sleep(0.01)
                    assert found == wanted
                    took[what] = time.monotonic() - since

                async def never_less() -> None:
                    """For as long as the operator needs to notice a change."""
                    before = await _endpoint(kube)
                    for _ in range(20):
                        assert await _endpoint(kube) == before
                        await asyncio.sleep(0.05)

                engine.says(phase=EnginePhase.WAITING, serving=False)
                await becomes("waits for a donor", False, False)
                engine.says(phase=EnginePhase.DEGRADED, serving=True)
                await becomes("served by a donor, and verified", True, True)
                engine.says(phase=EnginePhase.RECOVERING, serving=False)
                await never_less()
                engine.says(phase=EnginePhase.SERVING, serving=True)
                await never_less()
                engine.store.tell(leaving=True)
                await becomes("told to end", False, True)
                engine.store.tell(leaving=False)
                await becomes("told otherwise", True, True)
                # Without a kubelet, a finalizer keeps the pod in Terminating.
                patch = json.dumps({"metadata": {"finalizers": ["resilientllm.test/keep"]}})
                name = (await _engine_pod(kube))["metadata"]["name"]
                cluster.kubectl("-n", NAMESPACE, "patch", "pod", name, "--type=merge", "-p", patch)
                await asyncio.to_thread(cluster.kubectl, "-n", NAMESPACE, "delete", "pod", name, "--wait=false")
                await becomes("terminating", False, True, True)
                engine.says(phase=EnginePhase.WAITING, serving=False)
                await becomes("terminating, without a donor", False, False, True)
                cluster.kubectl(
                    "-n", NAMESPACE, "patch", "pod", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}'
                )

        asyncio.run(follow())
        print("seconds until the EndpointSlice said so:", {what: round(each, 3) for what, each in took.items()})

    def test_a_roll_out_waits_for_the_requests_of_the_engine(
        self, cluster: Cluster, kubeconfig: Path, engine: EngineStand
    ) -> None:
        made = pods(cluster)
        engine.says(requests_running=1)
        apply(cluster, unplaced(args=["--max-model-len=64"]))
        eventually("it drains", lambda: read(cluster, "rllm/tiny")["status"].get("drain"))
        eventually("the engine is told", lambda: engine.store.plan is not None and engine.store.plan.draining)
        time.sleep(5)  # Longer than an idle engine would be left.
        assert pods(cluster) == made
        assert read(cluster, "rllm/tiny")["status"]["instances"][0]["phase"] == "Draining"
        engine.says(requests_running=0)
        eventually("both pods are replaced", lambda: len(pods(cluster).items() - made.items()) == 2)


def _address_of_ours(cluster: Cluster) -> str:
    """An address of this machine that the cluster's nodes know, and that may stand in an EndpointSlice."""
    node = read(cluster, "nodes")["items"][0]["status"]["addresses"][0]["address"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((node, 9))
        return str(probe.getsockname()[0])


def _place(cluster: Cluster, address: str) -> None:
    """Gives the pods an address, as a kubelet would."""
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    patch = json.dumps({"status": status | {"conditions": [{"type": "Ready", "status": "True"}]}})
    for pod in read(cluster, "pods")["items"]:
        name = pod["metadata"]["name"]
        cluster.kubectl("-n", NAMESPACE, "patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)


async def _endpoint(kube: KubeClient) -> dict[str, bool] | None:
    """What is said of the first engine."""
    slices = await kube.get("EndpointSlice", NAMESPACE, "tiny-engines")
    endpoints = (slices or {}).get("endpoints") or [{}]
    conditions: dict[str, bool] | None = endpoints[0].get("conditions")
    return conditions


async def _engine_pod(kube: KubeClient) -> dict[str, Any]:
    found = [pod async for page, _ in kube.pages("Pod", NAMESPACE, "resilientllm.dev/role=engine") for pod in page]
    (pod,) = found
    return pod
