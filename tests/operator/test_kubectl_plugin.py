"""``kubectl resilientllm`` with a real kubectl and API server. No operator runs: tests write what it would write."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster.provider import Cluster
from tests.operator.cluster import BIN, IMAGE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

NAMESPACE = "plugin-test"
BOUND_SECONDS = 60.0


@pytest.fixture(scope="module")
def environment(cluster: Cluster) -> dict[str, str]:
    """Where kubectl finds the plugin and the cluster."""
    kubectl = Path(cluster.kubectl_command()[0])
    path = f"{BIN}:{kubectl.parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "KUBECONFIG": str(cluster.kubeconfig), "TZ": "UTC"}


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """With an object that an operator has brought to work: its stages are on the only node, and on one that is not."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        obj = {
            "apiVersion": "resilientllm.dev/v1alpha1",
            "kind": "ResilientLLM",
            "metadata": {"name": "tiny", "namespace": NAMESPACE},
            "spec": {"image": IMAGE, "model": {"path": "/models/tiny"}, "instances": 2, "stages": 1},
        }
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(obj))
        yield NAMESPACE
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=true", timeout_seconds=120)


def write_status(cluster: Cluster, served_by: str, kept_by: str) -> None:
    """``served_by`` and ``kept_by`` are those of the first instance."""

    def instance(number: int, node: str, served_by: str, kept_by: str) -> dict[str, Any]:
        place = {"stage": 0, "pod": f"tiny-{number}-s0", "node": node, "ready": True, "pair": f"{1 - number}.0"}
        return {
            "instance": number,
            "phase": "Serving",
            "serving": True,
            "stages": [{**place, "servedBy": served_by, "keptBy": kept_by, "lagSeconds": 0}],
        }

    (node,) = cluster.nodes()
    instances = [instance(0, node, served_by, kept_by), instance(1, "elsewhere", "1.0", "1.0")]
    status = {"observedGeneration": 1, "ready": "2/2", "plan": {"version": 3, "hash": "abc"}, "instances": instances}
    cluster.kubectl(
        "-n",
        NAMESPACE,
        "patch",
        "rllm",
        "tiny",
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps({"status": status}),
    )


@pytest.fixture
def tiny(cluster: Cluster, namespace: str) -> str:
    write_status(cluster, served_by="0.0", kept_by="1.0")
    return "tiny"


@pytest.fixture
def node(cluster: Cluster) -> Iterator[str]:
    (name,) = cluster.nodes()
    yield name
    cluster.kubectl("uncordon", name)


def plugin(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["kubectl", "resilientllm", *words], env=environment, capture_output=True, text=True, timeout=BOUND_SECONDS
    )


def is_cordoned(cluster: Cluster, node: str) -> bool:
    return bool(json.loads(cluster.kubectl("get", "node", node, "-o", "json"))["spec"].get("unschedulable"))


class TestStatus:
    def test_is_shown_and_that_nobody_calls_it_ready(self, environment: dict[str, str], tiny: str) -> None:
        result = plugin(environment, "status", tiny, "-n", NAMESPACE)
        assert (result.returncode, result.stderr) == (1, "")
        assert "plugin-test/tiny  2/2 instances serve" in result.stdout
        assert "serves home" in result.stdout

    def test_is_there_for_programs(self, environment: dict[str, str], tiny: str) -> None:
        (item,) = json.loads(plugin(environment, "status", "--json", "-A").stdout)["items"]
        assert item["name"] == "plugin-test/tiny"
        assert item["instances"][0]["places"][0]["served_by"] == "0.0"

    def test_is_followed_without_kubectl(self, cluster: Cluster, environment: dict[str, str], tiny: str) -> None:
        words = ("status", tiny, "-n", NAMESPACE, "--watch", "--json")
        with started(environment, *words, program=("resilientllm",)) as watching:
            assert watching.stdout is not None
            seen = [json.loads(watching.stdout.readline())]
            write_status(cluster, served_by="1.0", kept_by="0.0")
            seen.append(json.loads(watching.stdout.readline()))
            watching.terminate()
            assert watching.wait(BOUND_SECONDS) == 1
        assert [each["items"][0]["instances"][0]["places"][0]["served_by"] for each in seen] == ["0.0", "1.0"]

    def test_of_an_object_that_is_not_there(self, environment: dict[str, str], namespace: str) -> None:
        result = plugin(environment, "status", "large", "-n", NAMESPACE)
        assert result.returncode == 2
        assert '"large" not found' in result.stderr

    def test_of_a_namespace_without_objects(self, environment: dict[str, str], namespace: str) -> None:
        result = plugin(environment, "status", "-n", "kube-public")
        assert (result.returncode, result.stdout) == (2, "")
        assert "no ResilientLLM objects in namespace kube-public" in result.stderr

    def test_without_the_right_to_look(self, cluster: Cluster, environment: dict[str, str], tmp_path: Path) -> None:
        config = yaml.safe_load(cluster.kubeconfig.read_text())
        (user,) = config["users"]
        user["user"] = {"token": cluster.kubectl("-n", "default", "create", "token", "default").strip()}
        (tmp_path / "config").write_text(yaml.safe_dump(config))
        result = plugin(environment, "status", "--kubeconfig", str(tmp_path / "config"))
        assert result.returncode == 2
        assert "the API server refuses: " in result.stderr and "cannot list resource" in result.stderr


def test_the_plan_names_donors_in_order(environment: dict[str, str], tiny: str) -> None:
    (item,) = json.loads(plugin(environment, "plan", tiny, "-n", NAMESPACE, "--json").stdout)["items"]
    assert item["donors"] == {"0.0": ["1.0"], "1.0": ["0.0"]}
    assert "plan 3" in plugin(environment, "plan", tiny, "-n", NAMESPACE).stdout


class TestDrain:
    def test_cordons_and_waits_until_nobody_depends_on_the_node(
        self, cluster: Cluster, environment: dict[str, str], tiny: str, node: str
    ) -> None:
        with started(environment, "drain", node, "--timeout=60s") as drain:
            assert drain.stdout is not None
            assert drain.stdout.readline().endswith(f"node {node} is cordoned\n")
            assert drain.stdout.readline().endswith("waits: plugin-test/tiny: place 0.0 is served by stage 0.0\n")
            assert is_cordoned(cluster, node)
            write_status(cluster, served_by="1.0", kept_by="0.0")
            assert drain.stdout.readline().endswith("waits: plugin-test/tiny: place 0.0 has its copies on stage 0.0\n")
            write_status(cluster, served_by="1.0", kept_by="1.0")
            assert f"no stage of node {node} serves an engine or keeps copies for one\n" in drain.stdout.read()
            assert drain.wait(BOUND_SECONDS) == 0

    def test_gives_up_in_time_and_says_what_remains(
        self, cluster: Cluster, environment: dict[str, str], tiny: str, node: str
    ) -> None:
        result = plugin(environment, "drain", node, "--timeout=1s")
        assert result.returncode == 1
        assert "place 0.0 is served by stage 0.0. The node stays cordoned." in result.stderr
        assert is_cordoned(cluster, node)

    def test_says_that_an_object_is_paused(
        self, cluster: Cluster, environment: dict[str, str], tiny: str, node: str
    ) -> None:
        def annotate(value: str) -> None:
            cluster.kubectl("-n", NAMESPACE, "annotate", "--overwrite", "rllm", tiny, f"resilientllm.dev/paused{value}")

        annotate("=true")
        try:
            assert (
                "tiny does not move, because the annotation"
                in plugin(environment, "drain", node, "--timeout=1s").stdout
            )
        finally:
            annotate("-")

    def test_of_a_node_that_is_not_there_cordons_nothing(self, environment: dict[str, str]) -> None:
        result = plugin(environment, "drain", "nowhere")
        assert result.returncode == 2
        assert 'nodes "nowhere" not found' in result.stderr


@contextmanager
def started(
    environment: dict[str, str], *words: str, program: tuple[str, ...] = ("kubectl", "resilientllm")
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*program, *words], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
