"""The runbooks name what exists: fields of the status, commands of the plugin, panels of the boards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.crd_schema import openapi_schema
from resilientllm_cli.plugin import command as plugin

from tests.monitoring.test_boards import BOARDS

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
PAGES = [pytest.param(page.read_text(), id=page.stem) for page in sorted(RUNBOOKS.glob("ResilientLLM*.md"))]
OF_PROMETHEUS = {"Status → Targets"}


def field(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """What a path such as ``.status.nodes[*]`` leads to. Raises KeyError if there is no such field."""
    for name in re.sub(r"\[[^]]*\]", "[]", path).strip(".").split("."):
        schema = schema["properties"][name.removesuffix("[]")]
        schema = schema["items"] if name.endswith("[]") else schema
    return schema


def read_by(jsonpath: str) -> Iterator[tuple[str, str]]:
    """Pairs of where and what: fields within a range, and fields of the object."""
    where = ""
    for inner in re.findall(r"\{((?:[^{}\"]|\"[^\"]*\")*)\}", jsonpath):
        if inner.startswith("range "):
            where = inner.removeprefix("range ")
        elif inner == "end":
            where = ""
        elif inner.startswith("."):
            yield where, inner


@pytest.mark.parametrize("page", PAGES)
def test_fields_that_are_read_exist(page: str) -> None:
    schema = openapi_schema()
    for jsonpath in re.findall(r"-o jsonpath='([^']*)'", page):
        found = list(read_by(jsonpath))
        assert found, jsonpath
        for where, what in found:
            assert field(field(schema, where) if where else schema, what)


@pytest.mark.parametrize("page", PAGES)
def test_panels_exist(page: str) -> None:
    titles = {panel["title"] for board in BOARDS.values() for panel in board["panels"]}
    named = {" ".join(each.split()) for each in re.findall(r"(?<![*\w])\*([A-Z][^*]*)\*", page)}

    assert [each for each in named - OF_PROMETHEUS if not any(title.startswith(each) for title in titles)] == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_plugin_exist(page: str) -> None:
    for command in re.findall(r"kubectl resilientllm ((?:status|plan|drain|\w+)[ \w-]*)", page):
        assert plugin._parser().parse_args(command.split())
