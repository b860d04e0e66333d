"""The chart on a real cluster, over its life: installed at the version before, upgraded, removed and installed again,
while an object serves, and at last removed with everything.

Engines and stages need no operator, so no client may notice any of it. All tests share one cluster, one object and
streams that never end; the order is that of the release's life.

The version before is the last tag, or the commit before the last change of operator or chart. RESILIENTLLM_PREVIOUS
names another.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.crd_schema import openapi_schema
from resilientllm_cli.main import run as command_line

from e2e.cluster.build import helm
from e2e.cluster.commands import run
from e2e.cluster.errors import CommandFailed
from e2e.cluster.image import OPERATOR_REF
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.namespaces import NamespaceProvider
from e2e.cluster.provider import Cluster, HostPort
from e2e.cluster.timings import PATIENT
from e2e.demo import installation
from e2e.demo.observation import Observation, observe
from e2e.demo.waiting import wait_for
from e2e.scenarios.load import LEISURELY_SECONDS, Load, Target
from e2e.scenarios.verdict import Reference, judge

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1200)]

NAME = "tiny"
NAMESPACE = installation.NAMESPACE
SYSTEM = installation.SYSTEM_NAMESPACE
RELEASE = "resilientllm"
CRD = "crd/resilientllms.resilientllm.dev"
CHART = Path("manifests") / "helm" / "resilientllm"
PARTS = ("api/src", "operator/src", str(CHART))
"""What a version of the operator consists of."""
PREVIOUS_TAG = "previous"
OLDER_WORDS = "An older description."
READY_SECONDS = 600.0
HELM_SECONDS = 240
GONE_SECONDS = 120.0
STREAMS_SECONDS = 120.0
PROMPTS = (0, 1)


def git(*words: str) -> str:
    return run("git", "-C", REPOSITORY, *words).strip()


def version_before() -> str:
    """A commit. Skips where the history is not there, as in a shallow clone."""
    if named := os.environ.get("RESILIENTLLM_PREVIOUS"):
        return named
    try:
        if tags := git("tag", "--list", "v*", "--sort=-version:refname", "--no-contains", "HEAD").splitlines():
            return tags[0]
        return git("rev-parse", "--verify", f"{git('log', '-1', '--format=%H', '--', *PARTS)}^")
    except CommandFailed as error:
        pytest.skip(f"no version before this one in this checkout: {error}")


@pytest.fixture(scope="module")
def previous() -> Iterator[Path]:
    """Operator and chart of the version before, where containers see them, with a CRD that can be told from ours."""
    folder = REPOSITORY / "build" / "e2e" / "previous"
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(
        ["git", "-C", REPOSITORY, "archive", version_before(), *PARTS], capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    crd = folder / CHART / "templates" / "crd.yaml"
    text, changed = re.subn(r"(?m)^( +openAPIV3Schema:\n +description: ).*$", rf"\g<1>{OLDER_WORDS}", crd.read_text())
    assert changed == 1
    crd.write_text(text)
    yield folder


@pytest.fixture(scope="module")
def cluster(previous: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    provider = NamespaceProvider(f"install-{os.getpid()}")
    try:
        made: Cluster = provider.up(2, mounts=default_mounts(REPOSITORY), timings=PATIENT)
        installation.load_thin_images(made)
        programs = REPOSITORY / ".venv" / "bin"
        made.load_thin_image(
            f"{OPERATOR_REF.rpartition(':')[0]}:{PREVIOUS_TAG}",
            entrypoint=[str(programs / installation.OPERATOR)],
            env={
                "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
                "PYTHONPATH": f"{previous / 'api' / 'src'}:{previous / 'operator' / 'src'}",
            },
        )
        models = installation.open_to_all(tmp_path_factory.mktemp("models"))
        installation.make_model(models)
        installation.provide_model(made, models)
        yield made
    finally:
        provider.down()


@dataclass(frozen=True)
class Release:
    """The chart of this version or the one before, as a user drives it."""

    cluster: Cluster

    def install(self, chart: Path, *values: str) -> None:
        """Also an upgrade. Returns when the operator is ready."""
        self._helm(
            *("upgrade", "--install", RELEASE, str(chart), f"--namespace={SYSTEM}", "--create-namespace"),
            *(f"--set={each}" for each in values),
            *("--wait", f"--timeout={HELM_SECONDS}s"),
        )

    def uninstall(self) -> None:
        self._helm("uninstall", RELEASE, f"--namespace={SYSTEM}", "--wait", f"--timeout={HELM_SECONDS}s")

    def _helm(self, *words: str) -> None:
        run(helm(), f"--kubeconfig={self.cluster.kubeconfig}", *words, timeout_seconds=HELM_SECONDS + 30.0)


@pytest.fixture(scope="module")
def release(cluster: Cluster) -> Release:
    return Release(cluster)


class Clients:
    """Streams through the Service that never end, and what they got undisturbed."""

    def __init__(self, cluster: Cluster) -> None:
        at = HostPort(*cluster.forward(*installation.service_address(cluster, NAME)))
        self._target = Target("service", f"http://{at.host}:{at.port}", PROMPTS)
        with Load(NAME, [self._target], rounds=1) as load:
            load.finish(STREAMS_SECONDS)
        assert all(each.stream.complete for each in load.sent)
        self.reference: Reference = {each.stream.index: list(each.stream.tokens) for each in load.sent}
        self.load = Load(NAME, [self._target], pause_seconds=LEISURELY_SECONDS)

    def assert_unharmed_since(self, seconds: float) -> None:
        """Every stream that ran then or began later ended as it should, with the same tokens. The next go on."""
        self.load.finish(STREAMS_SECONDS)
        verdict = judge(self.load.sent, self.reference, seconds)
        assert verdict.met >= 1 and verdict.unharmed, verdict.problems
        self.load = Load(NAME, [self._target], pause_seconds=LEISURELY_SECONDS)


@pytest.fixture(scope="module")
def served(cluster: Cluster, release: Release, previous: Path) -> Observation:
    """The object, as the version before has brought it to serve."""
    release.install(previous / CHART, f"image.tag={PREVIOUS_TAG}")
    installation.apply(cluster, [specified()])
    return until_whole(cluster)


def specified() -> dict[str, Any]:
    """The example, with a single stage: what is tested here is not what stages do."""
    obj = installation.example()
    obj["spec"]["stages"] = 1
    return obj


def until_whole(cluster: Cluster) -> Observation:
    return wait_for(cluster, NAMESPACE, NAME, "Ready, and all copies kept", is_settled, timeout_seconds=READY_SECONDS)


def is_settled(seen: Observation) -> bool:
    now = {each.type: str(each.status) for each in seen.status.conditions}
    return seen.whole and (now.get("Progressing"), now.get("ReplicationHealthy")) == ("False", "True")


@pytest.fixture(scope="module")
def clients(cluster: Cluster, served: Observation) -> Iterator[Clients]:
    made = Clients(cluster)
    try:
        yield made
    finally:
        made.load.cut()


def operators(cluster: Cluster) -> list[dict[str, Any]]:
    """Those that are not on their way out."""
    pods = json.loads(cluster.kubectl("get", "pods", f"--namespace={SYSTEM}", "--output=json"))["items"]
    return [each for each in pods if "deletionTimestamp" not in each["metadata"]]


def change(cluster: Cluster, sick_after: str) -> None:
    """What restarts nothing, so that the object is whole only when the present operator has looked at it."""
    patch = json.dumps({"spec": {"recovery": {"sickAfter": sick_after}}})
    cluster.kubectl("patch", "rllm", NAME, f"--namespace={NAMESPACE}", "--type=merge", f"--patch={patch}")


def words_of_the_crd(cluster: Cluster) -> str:
    schema = "{.spec.versions[0].schema.openAPIV3Schema.description}"
    return cluster.kubectl("get", CRD, f"--output=jsonpath={schema}")


def uids(seen: Observation) -> set[str]:
    return {pod.uid for pod in seen.pods}


def test_the_version_before_serves(cluster: Cluster, served: Observation, previous: Path) -> None:
    assert words_of_the_crd(cluster) == OLDER_WORDS
    for pod in operators(cluster):
        (pid, *_) = cluster.container_pids(SYSTEM, pod["metadata"]["name"], "operator")
        assert str(previous) in Path(f"/proc/{pid}/environ").read_text(), "it runs the code of that version"


def test_status_draws_it(cluster: Cluster, served: Observation, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["status", NAME, f"--namespace={NAMESPACE}", f"--kubeconfig={cluster.kubeconfig}"]
    assert command_line(words) == 0
    picture = capsys.readouterr().out
    for stage, keeper in (("0.0", "1.0"), ("1.0", "0.0")):
        assert f"● {stage}" in picture and f"copies on {keeper}, lag < 1 s" in picture
    assert all(pod.name in picture for pod in served.pods)


def test_an_upgrade_harms_no_stream(cluster: Cluster, release: Release, clients: Clients) -> None:
    clients.load.reach_the_middle(STREAMS_SECONDS)
    before, old = time.monotonic(), {pod["metadata"]["name"] for pod in operators(cluster)}

    # Helm keeps the values of before where it is given none.
    release.install(REPOSITORY / CHART, f"image.tag={OPERATOR_REF.rpartition(':')[2]}")

    assert words_of_the_crd(cluster) == openapi_schema()["description"], "the CRD is upgraded, too"
    assert not old & {pod["metadata"]["name"] for pod in operators(cluster)}
    change(cluster, "31s")
    until_whole(cluster)
    clients.assert_unharmed_since(before)


def test_an_uninstalled_release_leaves_what_serves(cluster: Cluster, release: Release, clients: Clients) -> None:
    served = until_whole(cluster)
    clients.load.reach_the_middle(STREAMS_SECONDS)
    before = time.monotonic()

    release.uninstall()

    wait_until(lambda: not operators(cluster))
    assert uids(observe(cluster, NAMESPACE, NAME)) == uids(served)
    clients.assert_unharmed_since(before)


def test_installed_again_it_goes_on_and_restarts_nothing(cluster: Cluster, release: Release, clients: Clients) -> None:
    left = observe(cluster, NAMESPACE, NAME)
    clients.load.reach_the_middle(STREAMS_SECONDS)
    before = time.monotonic()

    release.install(REPOSITORY / CHART)
    change(cluster, "32s")
    seen = until_whole(cluster)
    assert uids(seen) == uids(left)
    assert [(pod.name, pod.restarts) for pod in seen.pods] == [(pod.name, pod.restarts) for pod in left.pods]
    clients.assert_unharmed_since(before)


def test_uninstalled_with_the_crd_it_takes_everything_but_the_models(
    cluster: Cluster, release: Release, clients: Clients
) -> None:
    clients.load.finish(STREAMS_SECONDS)

    release.install(REPOSITORY / CHART, "crds.keep=false")
    release.uninstall()

    everything = ("pods,services,secrets,endpointslices,poddisruptionbudgets", "--all-namespaces")
    ours = "--selector=app.kubernetes.io/part-of=resilientllm"
    wait_until(lambda: not cluster.kubectl("get", *everything, ours, "--output=name"))
    assert not cluster.kubectl("get", CRD, "--ignore-not-found", "--output=name")
    claims = json.loads(cluster.kubectl("get", "pvc", f"--namespace={NAMESPACE}", "--output=json"))["items"]
    assert [each["status"]["phase"] for each in claims] == ["Bound"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not within {GONE_SECONDS:g} s"
        time.sleep(0.5)
