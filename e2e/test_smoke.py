"""The main job on a real cluster, as a user has it: the shipped manifests, the operator in its pod, one kill -9.

What the operator does without engines that answer is in ``tests/operator/test_integration.py``; faults of nodes are
in tests of their own. All tests share one cluster and one object, and read what its life has shown; the order is that
of its life, to its deletion.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

import pytest
from resilientllm_api.crd import ConditionStatus, ConditionType, InstancePhase, RecoveryStatus
from resilientllm_api.engine_state import RecoveryKind
from resilientllm_cli.comparison import compare
from resilientllm_cli.streams import Sampling, Stream

from e2e.cluster.errors import CommandFailed
from e2e.cluster.launch import REPOSITORY
from e2e.cluster.machine_files import default_mounts
from e2e.cluster.namespaces import NamespaceCluster, NamespaceProvider
from e2e.cluster.provider import Cluster, HostPort
from e2e.cluster.timings import PATIENT
from e2e.demo import installation, victim
from e2e.demo.observation import NAME_LABEL, Observation, Pod, observe
from e2e.demo.prompts import prompts
from e2e.demo.traffic import Traffic
from e2e.demo.waiting import wait_for
from e2e.monitoring.boards import BOARDS, Chosen, Panel, marks, panels
from e2e.monitoring.prometheus import SCRAPE_SECONDS, Prometheus, Series
from e2e.monitoring.scraping import rules
from tests.monitoring.promql import asked_for, grouped_by

# Most of it is the start of six processes that import torch, on two cores. It is a bound, not an expectation.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

T = TypeVar("T")

NAME = "tiny"
NAMESPACE = installation.NAMESPACE
SPREAD = 4
"""Streams through the Service, which spreads them by chance."""
PINNED = 2
"""Streams of each engine, so that the donor certainly serves two tenants. They are shorter: others go on when they
end, and rows of batches move."""
STREAMS = SPREAD + 2 * PINNED
LONG, SHORT = Sampling(max_tokens=400), Sampling(max_tokens=250)
STAGE = 0
"""Which stage is killed; the demo kills the other."""

READY_SECONDS = 600.0
STREAMS_SECONDS = 300.0
WHOLE_SECONDS = 300.0
GONE_SECONDS = 90.0
SCRAPED_SECONDS = 120.0
BEFORE_SECONDS = 10.0
"""So long before the kill the panels begin."""
LOOK_SECONDS = 0.5

PODS = 8
"""Two engines, four stages, two replicas of the operator."""
PANELS = [panel for board in BOARDS for panel in panels(board)]
RULES = [rule for group in rules()["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    provider = NamespaceProvider(f"smoke-{os.getpid()}")
    try:
        made: Cluster = provider.up(3, mounts=default_mounts(REPOSITORY), timings=PATIENT)
        installation.load_thin_images(made)
        installation.install_operator(made)
        models = installation.open_to_all(tmp_path_factory.mktemp("models"))
        installation.make_model(models)
        installation.provide_model(made, models)
        yield made
    finally:
        provider.down()


@pytest.fixture(scope="module")
def ready(cluster: Cluster) -> Observation:
    """The example, as soon as it is Ready."""
    installation.apply(cluster, [installation.example()])
    # Ready comes with the first verified tokens; the kubelet's own probes, which Progressing waits for, a moment later,
    # and so does the engines' word that every stage has found its keeper.
    return wait_for(
        cluster,
        NAMESPACE,
        NAME,
        "Ready, and no longer Progressing",
        lambda seen: seen.ready and is_settled(seen),
        timeout_seconds=READY_SECONDS,
    )


@pytest.fixture(scope="module")
def prometheus(cluster: Cluster, ready: Observation) -> Iterator[Prometheus]:
    """It scrapes from before the kill on, and what it finds is up."""
    assert isinstance(cluster, NamespaceCluster)
    with Prometheus(cluster) as made:
        eventually(
            "every pod is scraped",
            made.targets,
            lambda found: len(found) == PODS and all(each["health"] == "up" for each in found),
            SCRAPED_SECONDS,
        )
        yield made


def is_settled(seen: Observation) -> bool:
    now = {each.type: str(each.status) for each in seen.status.conditions}
    return (now.get("Progressing"), now.get("ReplicationHealthy")) == ("False", "True")


@dataclass(frozen=True)
class Killed:
    """A life with a kill in it."""

    undisturbed: list[Stream]
    streams: list[Stream]
    victim: Pod
    running: dict[int, int]
    """Requests that each instance was serving."""
    at: datetime
    seen: list[Observation]
    """From before the kill until all was whole again."""

    @property
    def recovery(self) -> RecoveryStatus:
        recovery = self.seen[-1].status.last_recovery
        assert recovery is not None, "the status tells of no recovery"
        return recovery


@pytest.fixture(scope="module")
def killed(cluster: Cluster, ready: Observation, prometheus: Prometheus) -> Killed:
    service = HostPort(*cluster.forward(*installation.service_address(cluster, NAME)))
    before = observe(cluster, NAMESPACE, NAME)
    stages = victim.candidates(cluster, before, STAGE, NAMESPACE)
    engines = victim.engine_ports(cluster, before)
    undisturbed = start_streams(service, engines)
    for traffic in undisturbed:
        assert traffic.wait(STREAMS_SECONDS), "the undisturbed streams did not end"

    disturbed = start_streams(service, engines)
    while min(traffic.least_tokens for traffic in disturbed) < SHORT.max_tokens // 8:
        assert not any(traffic.wait(0.02) for traffic in disturbed), "streams were over before all were in the middle"
    running = victim.running_requests(engines)
    chosen = stages[victim.busiest(running)]
    at = datetime.now(UTC)
    victim.kill(chosen)

    seen = [before]

    def whole(now: Observation) -> bool:
        recovery = now.status.last_recovery
        seen.append(now)
        return now.whole and recovery is not None and recovery.detected_at > at and recovery.restored_at is not None

    wait_for(cluster, NAMESPACE, NAME, "Ready, and not Degraded", whole, timeout_seconds=WHOLE_SECONDS)
    for traffic in disturbed:
        assert traffic.wait(STREAMS_SECONDS), "the streams did not end"
    return Killed(all_of(undisturbed), all_of(disturbed), chosen.pod, running, at, seen)


def start_streams(service: HostPort, engines: dict[int, HostPort]) -> list[Traffic]:
    """Those of the Service, and those of each engine in turn; every prompt is another."""
    texts = prompts(STREAMS)
    starts = range(SPREAD, STREAMS, PINNED)
    return [
        Traffic(url(service), texts[:SPREAD], LONG),
        *(
            Traffic(url(engines[instance]), texts[start : start + PINNED], SHORT)
            for instance, start in zip(sorted(engines), starts, strict=True)
        ),
    ]


def url(address: HostPort) -> str:
    return f"http://{address.host}:{address.port}"


def all_of(traffics: list[Traffic]) -> list[Stream]:
    return [stream for traffic in traffics for stream in traffic.streams]


def get(cluster: Cluster, what: str, *options: str) -> Any:
    return json.loads(cluster.kubectl("get", what, f"--namespace={NAMESPACE}", "--output=json", *options))


class TestReadyObject:
    def test_tells_the_truth_in_its_conditions(self, ready: Observation) -> None:
        assert ready.obj is not None
        generation = ready.obj.metadata["generation"]
        assert {each.observed_generation for each in ready.status.conditions} == {generation}
        assert ready.status.observed_generation == generation
        assert {each.type: (str(each.status), each.reason) for each in ready.status.conditions} == {
            "Ready": ("True", "AllInstancesServing"),
            "Available": ("True", "AllInstancesServing"),
            "Degraded": ("False", "AsSpecified"),
            "Progressing": ("False", "AsSpecified"),
            "ReplicationHealthy": ("True", "Replicating"),
            "Recovering": ("False", "AsSpecified"),
            "Reconciling": ("False", "AsSpecified"),
            "Stalled": ("False", "AsSpecified"),
        }

    def test_names_instances_that_serve_on_their_own_stages(self, ready: Observation) -> None:
        assert ready.status.ready == "2/2"
        assert len(ready.pods) == 6
        for instance in ready.status.instances:
            assert instance.serving and instance.phase is InstancePhase.SERVING
            assert [each.served_by for each in instance.stages] == [f"{instance.instance}.0", f"{instance.instance}.1"]
            for stage in instance.stages:
                pod = ready.pod(instance.instance, stage.stage)
                assert pod is not None and (pod.name, pod.node, pod.ready) == (stage.pod, stage.node, True)

    def test_has_the_copies_of_a_stage_on_different_nodes(self, ready: Observation) -> None:
        for stage in (0, 1):
            nodes = [pod.node for pod in ready.pods if pod.stage == stage]
            assert len(nodes) == len(set(nodes)) == 2

    def test_is_told_in_one_line(self, cluster: Cluster, ready: Observation) -> None:
        heading, row = cluster.kubectl("get", "rllm", NAME, f"--namespace={NAMESPACE}").splitlines()
        columns = {name: row[heading.index(name) :].split()[0] for name in ("NAME", "READY", "INSTANCES", "DEGRADED")}
        assert columns == {"NAME": NAME, "READY": "True", "INSTANCES": "2/2", "DEGRADED": "False"}

    def test_has_exactly_its_engines_behind_the_service(self, cluster: Cluster, ready: Observation) -> None:
        assert "selector" not in get(cluster, f"service/{NAME}")["spec"]
        assert _endpoints(cluster) == {pod.ip: (True, True, False) for pod in ready.pods if pod.stage is None}


class TestKilledStage:
    def test_met_streams_in_the_middle(self, killed: Killed) -> None:
        assert all(running >= PINNED for running in killed.running.values()), "the donor must serve two tenants"
        assert killed.recovery.requests_affected > 0
        assert killed.recovery.tokens_recomputed > 0
        assert killed.recovery.tokens_kept > 0, "the donor had no copies"

    @pytest.mark.parametrize("index", range(STREAMS))
    def test_changed_no_token_of_a_stream(self, killed: Killed, index: int) -> None:
        expected, stream = killed.undisturbed[index], killed.streams[index]
        assert expected.complete and len(expected.tokens) == (LONG if index < SPREAD else SHORT).max_tokens
        assert stream.error is None and stream.finish_reason == "length"
        assert stream.tokens == expected.tokens, compare(expected.tokens, stream.tokens)

    def test_is_recorded_with_its_phases(self, killed: Killed) -> None:
        recovery = killed.recovery
        assert (recovery.instance, recovery.stages) == (killed.victim.instance, (STAGE,))
        assert recovery.kind is RecoveryKind.BORROW
        assert recovery.donor == f"{1 - killed.victim.instance}.{STAGE}"
        assert recovery.reason is not None
        assert recovery.resumed_at is not None and recovery.restored_at is not None
        assert killed.at <= recovery.detected_at <= recovery.resumed_at < recovery.restored_at
        parts = {name: ms for name, ms in recovery.phases.items() if name != "total"}
        assert {"fence", "stitch", "rollBack", "resume"} <= parts.keys()
        assert all(ms >= 0 for ms in parts.values())
        # Rolling back is part of resuming.
        after_each_other = sum(ms for name, ms in parts.items() if name != "rollBack")
        assert recovery.phases["total"] == pytest.approx(after_each_other, abs=1)

    def test_was_told_while_a_donor_stood_in(self, killed: Killed) -> None:
        told = [condition for seen in killed.seen if (condition := seen.condition(ConditionType.DEGRADED))]
        assert {each.reason for each in told if each.status is ConditionStatus.TRUE} == {"StageBorrowed"}
        assert all(seen.ready for seen in killed.seen), "both instances served all the time"

    def test_was_started_again_in_its_place(self, killed: Killed) -> None:
        after = killed.seen[-1]
        pod = after.pod(killed.victim.instance, STAGE)
        assert pod is not None
        assert (pod.uid, pod.ip, pod.restarts) == (killed.victim.uid, killed.victim.ip, killed.victim.restarts + 1)
        others = {(each.uid, each.restarts) for each in killed.seen[0].pods if each.uid != pod.uid}
        assert {(each.uid, each.restarts) for each in after.pods if each.uid != pod.uid} == others

    def test_left_an_event_for_each_step(self, cluster: Cluster, killed: Killed) -> None:
        reasons = [event.reason for event in observe(cluster, NAMESPACE, NAME).events]
        assert reasons.count("Borrowed") == 1
        assert reasons.index("Borrowed") < reasons.index("SwappedBack")

    def test_left_the_service_as_it_was(self, cluster: Cluster, killed: Killed) -> None:
        assert _endpoints(cluster) == {pod.ip: (True, True, False) for pod in killed.seen[-1].pods if pod.stage is None}


@dataclass(frozen=True)
class Scraped:
    """What a Prometheus has of that life."""

    prometheus: Prometheus
    start: float
    end: float

    def has(self, expression: str, instant: bool = False) -> list[Series]:
        chosen = Chosen(NAMESPACE, NAME, range_seconds=self.end - self.start, rate_interval_seconds=30.0)
        filled = chosen.fill(expression)
        if instant:
            return self.prometheus.at(filled, self.end)
        return self.prometheus.over(filled, self.start, self.end, SCRAPE_SECONDS)


@pytest.fixture(scope="module")
def scraped(prometheus: Prometheus, killed: Killed) -> Scraped:
    eventually(
        "the operator's count of capacity that was restored is scraped",
        lambda: prometheus.at("sum(resilientllm_operator_restoration_seconds_count)", time.time()),
        lambda found: bool(found) and found[0].points[-1][1] >= 1,
        SCRAPED_SECONDS,
    )
    # So that the last step of a range comes after what was scraped last.
    return Scraped(prometheus, killed.at.timestamp() - BEFORE_SECONDS, time.time() + SCRAPE_SECONDS)


class TestMonitoring:
    @pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel.board}: {panel.title}")
    def test_a_panel_shows_what_happened(self, scraped: Scraped, panel: Panel) -> None:
        for query in panel.queries:
            assert scraped.has(query.expression, panel.is_instant), query.expression

    @pytest.mark.parametrize("board", BOARDS)
    def test_the_recovery_is_marked_on_a_board(self, scraped: Scraped, board: str) -> None:
        for expression in marks(board):
            assert {each.labels["kind"] for each in scraped.has(expression)} == {"Borrow", "SwapBack"}

    def test_the_loss_is_counted_alike_by_engine_and_operator(self, scraped: Scraped, killed: Killed) -> None:
        for counter in ("resilientllm_recoveries_total", "resilientllm_operator_recoveries_total"):
            (count,) = scraped.has(f'sum(increase({counter}{{kind="Borrow"}}[$__range]))', instant=True)
            assert round(count.points[-1][1]) == 1
        rungs = {
            each.labels["rung"]: each.points[-1][1]
            for each in scraped.has("sum by (rung) (resilientllm_requests_by_rung_total)", instant=True)
        }
        # A request whose first block had no copy yet is computed again; the swap back meets some a second time.
        assert rungs["Kept"] > 0 and rungs["Kept"] + rungs["Recomputed"] >= killed.recovery.requests_affected
        assert rungs["Failed"] == 0

    def test_every_rule_is_evaluated(self, scraped: Scraped) -> None:
        evaluated = {each["name"]: (each["health"], each.get("lastError", "")) for each in scraped.prometheus.rules()}

        assert evaluated == {each.get("alert") or each["record"]: ("ok", "") for each in RULES}

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
    def test_a_rule_looks_at_series_that_are_there_with_their_labels(
        self, scraped: Scraped, rule: dict[str, Any]
    ) -> None:
        scraped.has(rule["expr"])
        present: set[str] = {"le"}
        for series, labels in asked_for(rule["expr"]).items():
            found = scraped.has(series)
            assert found, series
            assert all(labels <= each.labels.keys() for each in found)
            present.update(*(each.labels for each in found))
        assert grouped_by(rule["expr"]) <= present

    def test_the_alert_of_a_donor_at_work_waits_for_its_time(self, scraped: Scraped) -> None:
        (alert,) = scraped.has('ALERTS{alertname="ResilientLLMDegradedTooLong"}')

        assert (alert.labels["alertstate"], alert.labels["name"]) == ("pending", NAME)


class TestBadInput:
    def test_is_refused_with_a_message(self, cluster: Cluster) -> None:
        obj = installation.example()
        obj["metadata"]["name"] = "refused"
        obj["spec"]["args"] = ["--pipeline-parallel-size=4"]
        with pytest.raises(CommandFailed, match=r"spec\.args must not set what the operator sets itself"):
            installation.apply(cluster, [obj])

    def test_of_a_model_that_is_not_there_becomes_a_reason_and_no_restart_loop(self, cluster: Cluster) -> None:
        obj = installation.example()
        obj["metadata"]["name"] = "lost"
        obj["spec"] |= {"instances": 1, "stages": 1}
        obj["spec"]["model"]["path"] = "/models/there-is-none"
        installation.apply(cluster, [obj])
        held = eventually(
            "the operator gives up",
            lambda: observe(cluster, NAMESPACE, "lost"),
            lambda seen: seen.status.hold is not None and not seen.pods,
            READY_SECONDS,
        )
        condition = held.condition(ConditionType.READY)
        assert condition is not None and condition.status is ConditionStatus.FALSE
        assert condition.reason == "ConfigurationRejected"
        assert "/models/there-is-none" in condition.message
        time.sleep(5)
        assert observe(cluster, NAMESPACE, "lost").pods == ()
        cluster.kubectl("delete", "rllm", "lost", f"--namespace={NAMESPACE}")


class TestDeletedObject:
    def test_leaves_nothing(self, cluster: Cluster, killed: Killed) -> None:
        kinds, label = "pods,services,endpointslices,secrets", f"--selector={NAME_LABEL}={NAME}"
        assert {each["kind"] for each in get(cluster, kinds, label)["items"]} == {
            "Pod",
            "Service",
            "EndpointSlice",
            "Secret",
        }

        cluster.kubectl("delete", "rllm", NAME, f"--namespace={NAMESPACE}")

        eventually(
            "nothing of it is left",
            lambda: get(cluster, kinds, label)["items"],
            lambda items: not items,
            GONE_SECONDS,
        )


def _endpoints(cluster: Cluster) -> dict[str, tuple[bool, bool, bool]]:
    """Of the Service's slices: ready, serving and terminating by address, and all on the engines' port."""
    slices = get(cluster, "endpointslices", f"--selector=kubernetes.io/service-name={NAME}")["items"]
    assert [port["port"] for each in slices for port in each["ports"]] == [8000]
    return {
        endpoint["addresses"][0]: tuple(endpoint["conditions"][each] for each in ("ready", "serving", "terminating"))
        for each in slices
        for endpoint in each["endpoints"]
    }


def eventually(what: str, look: Callable[[], T], holds: Callable[[T], bool], within_seconds: float) -> T:
    """The first look for which it holds."""
    deadline = time.monotonic() + within_seconds
    while not holds(seen := look()):
        assert time.monotonic() < deadline, f"expected within {within_seconds:g} s: {what}; last seen: {seen}"
        time.sleep(LOOK_SECONDS)
    return seen
