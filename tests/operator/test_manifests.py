"""The shipped manifests say what the code needs, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from resilientllm_api.crd import API_VERSION, ResilientLLMSpec
from resilientllm_api.ports import ENGINE_API_PORT, ENGINE_CONTROL_PORT, STAGE_HEALTH_PORT, STAGE_PORT
from resilientllm_operator.controller import WATCHED
from resilientllm_operator.kube import RESOURCES
from resilientllm_operator.main import parse_arguments
from resilientllm_operator.names import Role, Slot, slot_labels, slots

MANIFESTS = Path(__file__).parents[2] / "manifests"


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / file).read_text()))


def rules() -> list[dict[str, Any]]:
    roles = [each for each in documents("base/rbac.yaml") if each["kind"] in ("ClusterRole", "Role")]
    return [rule for role in roles for rule in role["rules"]]


def verbs(resource: str) -> set[str]:
    return {verb for rule in rules() if resource in rule["resources"] for verb in rule["verbs"]}


def test_nothing_is_granted_by_a_wildcard() -> None:
    for rule in rules():
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]


def test_what_is_watched_may_be_watched() -> None:
    for kind in WATCHED:
        assert {"list", "watch"} <= verbs(RESOURCES[kind][1])


def test_secrets_are_never_listed_and_no_pod_is_entered() -> None:
    assert verbs("secrets") == {"get", "create"}
    assert not verbs("pods/exec")


def test_nodes_are_looked_at_and_never_touched() -> None:
    assert verbs("nodes") == {"get", "list", "watch"}


def test_of_leases_only_its_own_is_seen_and_nowhere_else() -> None:
    assert verbs("leases") == {"create", "get", "update"}
    (role,) = [each for each in documents("base/rbac.yaml") if each["kind"] == "Role"]
    for rule in role["rules"]:
        assert rule["verbs"] == ["create"] or rule["resourceNames"] == [parse_arguments([]).lease_name]


def test_a_replica_is_left_when_one_is_drained_or_replaced() -> None:
    deployment, budget = documents("base/operator.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["replicas"] > budget["spec"]["minAvailable"] >= 1
    assert deployment["spec"]["replicas"] > deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_the_spec_of_users_is_never_written() -> None:
    assert verbs("resilientllms") == {"get", "list", "watch"}
    assert verbs("resilientllms/status") == {"patch"}


def test_the_operator_meets_pod_security_restricted() -> None:
    deployment, _ = documents("base/operator.yaml")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_example_is_two_pipelines_of_two_stages() -> None:
    (example,) = documents("examples/tiny.yaml")
    assert example["apiVersion"] == API_VERSION
    spec = ResilientLLMSpec.model_validate(example["spec"])
    assert (example["metadata"]["name"], spec.instances, spec.stages) == ("tiny", 2, 2)
    assert spec.model.volume is not None
    volume, claim = documents("examples/models-pv.yaml")
    assert claim["metadata"]["name"] == spec.model.volume.persistent_volume_claim.claim_name
    assert volume["spec"]["claimRef"]["name"] == claim["metadata"]["name"]


def policies(file: str) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each["spec"] for each in documents(file)}


def ports(rules: list[dict[str, Any]]) -> set[int]:
    return {port["port"] for rule in rules for port in rule["ports"]}


def test_network_policies_select_the_pods_that_the_operator_makes_and_their_ports() -> None:
    made = {slot.role: slot_labels("tiny", slot) for slot in slots(1, 1)}
    found = policies("overlays/models/network-policies.yaml")
    engines, stages = found["resilientllm-engines"], found["resilientllm-stages"]

    assert engines["podSelector"]["matchLabels"].items() <= made[Role.ENGINE].items()
    assert stages["podSelector"]["matchLabels"].items() <= made[Role.STAGE].items()
    assert ports(engines["ingress"]) == {ENGINE_API_PORT, ENGINE_CONTROL_PORT}
    assert ports(stages["ingress"]) == {STAGE_PORT, STAGE_HEALTH_PORT}


def test_only_the_operator_reaches_an_engines_control_port_and_only_our_pods_a_stage() -> None:
    found = policies("overlays/models/network-policies.yaml")
    (control,) = [each for each in found["resilientllm-engines"]["ingress"] if ports([each]) == {ENGINE_CONTROL_PORT}]
    (wire,) = [each for each in found["resilientllm-stages"]["ingress"] if ports([each]) == {STAGE_PORT}]
    deployment, _ = documents("base/operator.yaml")

    (sender,) = control["from"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert sender["podSelector"]["matchLabels"].items() <= labels.items()
    (peer,) = wire["from"]
    for slot in slots(1, 1):
        assert peer["podSelector"]["matchLabels"].items() <= slot_labels("tiny", slot).items()


def test_the_operators_policy_lets_it_reach_engines_and_be_scraped() -> None:
    (policy,) = documents("components/network-policies/operator.yaml")
    deployment, _ = documents("base/operator.yaml")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (engines,) = [rule for rule in policy["spec"]["egress"] if "to" in rule]

    assert ports(policy["spec"]["ingress"]) == {port["containerPort"] for port in container["ports"]}
    assert ports([engines]) == {ENGINE_API_PORT, ENGINE_CONTROL_PORT}
    (peer,) = engines["to"]
    assert peer["podSelector"]["matchLabels"].items() <= slot_labels("tiny", Slot(0, Role.ENGINE)).items()
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= (
        deployment["spec"]["template"]["metadata"]["labels"].items()
    )
