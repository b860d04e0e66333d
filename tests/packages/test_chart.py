"""What can be said of the Helm chart without Helm: it is current, and its values are explained, checked and used."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from resilientllm_operator.main import parse_arguments

from tools.generate_chart import TEMPLATES, templates

REPOSITORY = Path(__file__).parents[2]
CHART = TEMPLATES.parent
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


@pytest.mark.parametrize(("name", "text"), list(templates()), ids=lambda each: each if "\n" not in each else "")
def test_templates_are_current(name: str, text: str) -> None:
    assert (TEMPLATES / name).read_text() == text, "the chart is stale: run `make generate`"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        free = name in ("resources", "nodeSelector", "affinity", "podLabels", "podAnnotations")
        if isinstance(value, dict) and not free:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_value_is_used_and_none_is_missing() -> None:
    text = "".join(path.read_text() for path in TEMPLATES.iterdir())

    assert set(re.findall(r"\.Values\.([A-Za-z.]+)", text)) == set(leaves(VALUES))


def in_schema(schema: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, each in schema["properties"].items():
        if "properties" in each and name != "resources":
            assert each["additionalProperties"] is False, f"a misspelt value below {prefix}{name} would not be noticed"
            yield from in_schema(each, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_the_schema_knows_every_value_and_nothing_else() -> None:
    Draft7Validator.check_schema(SCHEMA)
    assert SCHEMA["additionalProperties"] is False
    assert set(in_schema(SCHEMA)) == {*leaves(VALUES), "global"}
    Draft7Validator(SCHEMA).validate(VALUES)


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 0},
        {"replica": 2},
        {"watchNamespace": "Models"},
        {"logLevel": "info"},
        {"image": {"digest": "latest"}},
        {"image": {"tag": "a b"}},
        {"networkPolicies": {"apiServerPorts": []}},
        {"networkPolicies": {"modelNamespaces": ["a", "a"]}},
        {"tolerations": [{"efect": "NoSchedule"}]},
        {"crds": {"keep": "yes"}},
    ],
    ids=str,
)
def test_the_schema_refuses(wrong: dict[str, Any]) -> None:
    assert not Draft7Validator(SCHEMA).is_valid(wrong)


def test_log_levels_are_those_of_the_program() -> None:
    for level in SCHEMA["properties"]["logLevel"]["enum"]:
        assert parse_arguments([f"--log-level={level}"]).log_level == level
    assert parse_arguments([]).log_level == VALUES["logLevel"]


def test_the_chart_has_the_version_of_the_operator() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((REPOSITORY / "operator" / "pyproject.toml").read_text())["project"]["version"]

    assert chart["version"] == chart["appVersion"] == version


def test_every_value_is_explained_where_people_look_for_it() -> None:
    text = (REPOSITORY / "docs" / "packages.md").read_text()

    assert [name for name in leaves(VALUES) if f"`{name}`" not in text] == []
