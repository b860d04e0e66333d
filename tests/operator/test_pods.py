"""The pods that are made: their commands, where they may run, and that Pod Security ``restricted`` admits them."""

from __future__ import annotations

from typing import Any

import pytest
from resilientllm_api.crd import HOSTNAME
from resilientllm_operator.names import MANAGER, Slot, pod_name, slot_of, slots
from resilientllm_operator.pods import END_SECONDS, build_pod, spec_hash

from tests.operator.builders import UID, engine, obj, spec, stage

SLOTS = (stage(1, 0), engine(1))


def container(slot: Slot, **changes: Any) -> dict[str, Any]:
    (only,) = build_pod(obj(spec=spec(**changes)), slot)["spec"]["containers"]
    return dict(only)


def test_the_stage_command() -> None:
    assert container(stage(1, 0), args=["--max-model-len=64"], replication={"poolPercent": 40})["command"] == [
        "resilientllm-stage",
        "/models/tiny",
        "--instance=1",
        "--stage=0",
        "--listen=0.0.0.0:7000",
        "--health=0.0.0.0:7001",
        "--token-file=/etc/resilientllm/token/token",
        "--pool-fraction=0.4",
        "--leave-timeout=300",
        "--lend-weights",
        "--pipeline-parallel-size=2",
        "--tensor-parallel-size=1",
        "--max-model-len=64",
    ]


def test_a_stage_is_told_who_can_give_it_weights_and_that_does_not_make_the_others_outdated() -> None:
    owner, slot = obj(), stage(1, 0)
    told = build_pod(owner, slot, twins=["10.0.0.1:7000", "10.0.0.2:7000"])
    untold = build_pod(owner, slot)
    (command,) = [each["command"] for each in told["spec"]["containers"]]
    assert command[-1] == "--weights-from=10.0.0.1:7000,10.0.0.2:7000"
    assert command[:-1] == untold["spec"]["containers"][0]["command"]
    assert told["metadata"] == untold["metadata"]


def test_nobody_lends_where_weights_come_from_storage() -> None:
    assert "--lend-weights" not in container(stage(1, 0), recovery={"weights": "Storage"})["command"]


def test_the_pool_is_as_large_as_the_home_unless_the_spec_says_otherwise() -> None:
    assert "--pool-fraction=1.0" in container(stage(1, 0))["command"]


def test_the_engine_command() -> None:
    assert container(engine(1), args=["--max-model-len=64"])["command"] == [
        "resilientllm-engine",
        "/models/tiny",
        "--instance=1",
        "--plan-file=/var/run/resilientllm/plan.json",
        "--control=0.0.0.0:8001",
        "--token-file=/etc/resilientllm/token/token",
        "--host=0.0.0.0",
        "--port=8000",
        "--served-model-name=tiny",
        "--shutdown-timeout=300",
        "--pipeline-parallel-size=2",
        "--tensor-parallel-size=1",
        "--max-model-len=64",
    ]


@pytest.mark.parametrize("slot", SLOTS, ids=str)
class TestEveryPod:
    def test_meets_pod_security_restricted(self, slot: Slot) -> None:
        pod = build_pod(obj(), slot)["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        context = container(slot)["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        allowed = {"secret", "emptyDir", "persistentVolumeClaim"}
        assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])

    def test_cannot_write_to_its_image_and_has_no_api_token(self, slot: Slot) -> None:
        assert container(slot)["securityContext"]["readOnlyRootFilesystem"] is True
        assert build_pod(obj(), slot)["spec"]["automountServiceAccountToken"] is False

    def test_is_restarted_in_place_and_tells_its_last_words(self, slot: Slot) -> None:
        assert build_pod(obj(), slot)["spec"]["restartPolicy"] == "Always"
        assert container(slot)["terminationMessagePolicy"] == "FallbackToLogsOnError"

    def test_mounts_the_model_read_only(self, slot: Slot) -> None:
        mounts = {mount["name"]: mount for mount in container(slot)["volumeMounts"]}
        assert mounts["model"] == {"name": "model", "mountPath": "/models", "readOnly": True}

    def test_the_later_environment_wins(self, slot: Slot) -> None:
        env = [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "HOME", "value": "/elsewhere"}]
        own = {str(slot.role): {"env": [{"name": "OMP_NUM_THREADS", "value": "4"}]}}
        values = {each["name"]: each.get("value") for each in container(slot, env=env, **own)["env"]}
        assert values["OMP_NUM_THREADS"] == "4"
        assert values["HOME"] == "/elsewhere"
        assert values["VLLM_NO_USAGE_STATS"] == "1"
        assert values["HF_HUB_OFFLINE"] == "1"

    def test_carries_labels_that_lead_back_to_its_slot(self, slot: Slot) -> None:
        labels = build_pod(obj(), slot)["metadata"]["labels"]
        assert slot_of(labels) == slot
        assert labels["app.kubernetes.io/managed-by"] == MANAGER


def test_a_stage_that_hangs_gets_no_time_to_drain() -> None:
    """The kubelet would wait as long as for an eviction, while an instance without a donor waits for this stage."""
    probe = container(stage(0, 0), recovery={"drainTimeout": "1h"})["livenessProbe"]
    assert probe["terminationGracePeriodSeconds"] == END_SECONDS


def test_a_pod_gets_what_clusters_with_gpus_ask_for() -> None:
    asked = {
        "resources": {"limits": {"nvidia.com/gpu": 4, "rdma/hca": "1", "hugepages-2Mi": "1Gi", "memory": "8Gi"}},
        "nodeSelector": {"nvidia.com/gpu.present": "true"},
        "runtimeClassName": "nvidia",
        "priorityClassName": "serving",
    }
    owner = obj(spec=spec(stage=asked, imagePullSecrets=[{"name": "registry"}]))
    given = build_pod(owner, stage(1, 0))["spec"]
    assert given["containers"][0]["resources"] == asked.pop("resources")
    assert given | asked == given
    assert given["imagePullSecrets"] == [{"name": "registry"}]
    assert build_pod(owner, engine(1))["spec"].keys() & asked.keys() == set()


@pytest.mark.parametrize("slot", SLOTS, ids=str)
def test_what_is_not_asked_for_is_not_in_the_pod(slot: Slot) -> None:
    """Also not as an empty value: that would be another hash, and a new operator would replace every pod."""
    unasked = {"nodeSelector", "runtimeClassName", "priorityClassName", "imagePullSecrets"}
    assert build_pod(obj(), slot)["spec"].keys() & unasked == set()


def test_a_downloaded_model_is_not_offline() -> None:
    names = {each["name"] for each in container(stage(0, 0), model={"name": "org/model"})["env"]}
    assert "HF_HUB_OFFLINE" not in names


Rule = tuple[str, int, str, str]
"""Topology key, weight, and the labels of stage and instance of the pods to be apart from; a star for any."""


def rules(slot: Slot, topology_key: str) -> tuple[list[Rule], list[Rule]]:
    """The anti-affinities that are required (of weight 0) and those that are preferred."""

    def rule(term: dict[str, Any], weight: int = 0) -> Rule:
        labels = term["labelSelector"]["matchLabels"]
        return (
            term["topologyKey"],
            weight,
            *(labels.get(f"resilientllm.dev/{key}", "*") for key in ("stage", "instance")),
        )

    affinity = build_pod(obj(spec=spec(replication={"topologyKey": topology_key})), slot)["spec"]["affinity"]
    found = affinity["podAntiAffinity"]
    return (
        [rule(each) for each in found.get("requiredDuringSchedulingIgnoredDuringExecution", [])],
        [
            rule(each["podAffinityTerm"], each["weight"])
            for each in found["preferredDuringSchedulingIgnoredDuringExecution"]
        ],
    )


@pytest.mark.parametrize(
    ("slot", "topology_key", "required", "preferred"),
    [
        (stage(1, 0), HOSTNAME, [(HOSTNAME, 0, "0", "*")], [(HOSTNAME, 100, "*", "1")]),
        (stage(1, 0), "zone", [(HOSTNAME, 0, "0", "*")], [("zone", 100, "0", "*"), (HOSTNAME, 1, "*", "1")]),
        (engine(1), HOSTNAME, [], [(HOSTNAME, 100, "*", "*")]),
        (engine(1), "zone", [], [("zone", 100, "*", "*")]),
    ],
    ids=str,
)
def test_where_pods_may_run(slot: Slot, topology_key: str, required: list[Rule], preferred: list[Rule]) -> None:
    """Copies of a stage must be on other nodes and should be in other domains, siblings should be on other nodes."""
    assert rules(slot, topology_key) == (required, preferred)


def test_engines_may_share_a_node() -> None:
    rules = build_pod(obj(), engine(0))["spec"]["affinity"]["podAntiAffinity"]
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in rules


def test_names_fit_a_host_name() -> None:
    longest = max((pod_name("n" * 40, UID, slot, ()) for slot in slots(16, 64)), key=len)
    assert len(longest) <= 63


def test_a_name_depends_on_who_was_there_before() -> None:
    names = {pod_name("tiny", UID, stage(0, 0), before) for before in ((), ("a",), ("b",), ("a", "b"))}
    assert len(names) == 4
    assert pod_name("tiny", UID, stage(0, 0), ("a", "b")) == pod_name("tiny", UID, stage(0, 0), ("b", "a"))


def test_the_hash_changes_with_what_the_pod_is_made_from() -> None:
    assert spec_hash(obj(), stage(0, 0)) != spec_hash(obj(spec=spec(image="other")), stage(0, 0))
    assert spec_hash(obj(), stage(0, 0)) == spec_hash(obj(spec=spec(service={"port": 81})), stage(0, 0))
    assert spec_hash(obj(), stage(0, 0)) == spec_hash(obj(spec=spec(instances=5)), stage(0, 0))
    assert spec_hash(obj(), stage(0, 0)) == spec_hash(obj(spec=spec(recovery={"weights": "Storage"})), stage(0, 0))


def test_no_pod_is_replaced_for_other_times() -> None:
    times = {"heartbeatTimeout": "9s", "waitForDonor": "9s", "drainTimeout": "9s"}
    assert spec_hash(obj(), engine(0)) == spec_hash(obj(spec=spec(recovery=times)), engine(0))


@pytest.mark.parametrize("slot", SLOTS, ids=str)
@pytest.mark.parametrize(("timeout", "seconds"), [("90s", 90), ("1m30s", 90), ("1500ms", 2)])
def test_the_kubelet_waits_until_the_drain_is_over(slot: Slot, timeout: str, seconds: int) -> None:
    changed = obj(spec=spec(recovery={"drainTimeout": timeout}))
    assert build_pod(changed, slot)["spec"]["terminationGracePeriodSeconds"] == seconds + END_SECONDS
    flag = "--shutdown-timeout" if slot.stage is None else "--leave-timeout"
    assert f"{flag}={seconds}" in container(slot, recovery={"drainTimeout": timeout})["command"]


@pytest.mark.parametrize("labels", [{}, {"resilientllm.dev/role": "cook"}, {"resilientllm.dev/role": "stage"}])
def test_foreign_labels_lead_nowhere(labels: dict[str, str]) -> None:
    assert slot_of(labels) is None
