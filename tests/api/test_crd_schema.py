"""The generated CustomResourceDefinition is current, and of the form that an API server takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from resilientllm_api import crd_schema

COMMITTED = Path(__file__).parents[2] / "crds" / crd_schema.CRD_FILE


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    """Every schema node below and including this one."""
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from nodes(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from nodes(value)


def version() -> dict[str, Any]:
    (only,) = crd_schema.custom_resource_definition()["spec"]["versions"]
    return dict(only)


def test_the_committed_file_is_what_the_classes_say() -> None:
    assert COMMITTED.read_text() == crd_schema.render(), "crds/ is stale: run `make generate`"


def test_the_schema_is_structural() -> None:
    for node in nodes(crd_schema.openapi_schema()):
        assert not {"$ref", "$defs", "title", "allOf", "oneOf"} & set(node)
        assert "x-kubernetes-preserve-unknown-fields" not in node
        if "anyOf" in node:
            assert node["x-kubernetes-int-or-string"] is True
        assert None not in node.values(), f"null in {node}"


def test_every_rule_has_a_message_for_a_person() -> None:
    rules = [r for node in nodes(crd_schema.openapi_schema()) for r in node.get("x-kubernetes-validations", [])]
    assert len(rules) >= 8
    for rule in rules:
        assert len(rule["message"].split()) > 5
        assert "self." not in rule["message"]


def test_the_spec_documents_its_fields() -> None:
    spec = crd_schema.openapi_schema()["properties"]["spec"]
    undocumented = [name for name, field in spec["properties"].items() if not field.get("description")]
    assert undocumented == ["imagePullPolicy"]


def test_conditions_are_a_map_by_type() -> None:
    conditions = crd_schema.openapi_schema()["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_the_status_is_a_subresource() -> None:
    assert version()["subresources"] == {"status": {}}


def test_the_columns_answer_what_a_person_asks_at_night() -> None:
    names = [column["name"] for column in version()["additionalPrinterColumns"] if not column.get("priority")]
    assert names == ["Ready", "Reason", "Instances", "Degraded", "Last Recovery", "Age"]


def test_replication_is_on_by_default_with_a_pool_as_large_as_the_home() -> None:
    replication = crd_schema.openapi_schema()["properties"]["spec"]["properties"]["replication"]
    assert replication["default"] == {"mode": "Ring", "poolPercent": 100, "topologyKey": "kubernetes.io/hostname"}
    assert {name: field["default"] for name, field in replication["properties"].items()} == replication["default"]


def test_the_file_is_one_plain_document() -> None:
    assert yaml.safe_load(COMMITTED.read_text())["metadata"]["name"] == "resilientllms.resilientllm.dev"
