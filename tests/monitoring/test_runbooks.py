"""The runbooks name what exists: fields of the status, commands of the plugin, panels of the boards."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from resilientllm_api.crd import ConditionType, FailureCause, InstancePhase
from resilientllm_api.crd_schema import openapi_schema
from resilientllm_api.engine_state import LossReason
from resilientllm_api.ports import ENGINE_API_PORT, STAGE_HEALTH_PORT
from resilientllm_api.reasons import EventReason, Reason
from resilientllm_cli.plugin import command as plugin
from resilientllm_operator.names import INSTANCE_LABEL, NAME_LABEL, ROLE_LABEL, STAGE_LABEL

from tests.monitoring.test_boards import BOARDS

REPOSITORY = Path(__file__).parents[2]
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
PAGES = [pytest.param(page.read_text(), id=page.stem) for page in sorted(RUNBOOKS.glob("ResilientLLM*.md"))]
OF_PROMETHEUS = {"Status → Targets"}
OF_KUBERNETES = {"Deployment", "Node", "Pending"}
PLACEHOLDERS = {"NAMESPACE", "NAME", "POD", "NODE"}
VERBS = {
    *("annotate", "cordon", "delete", "describe", "events", "get", "logs", "patch", "resilientllm", "scale"),
    *("uncordon",),
}
LABELS = {NAME_LABEL, ROLE_LABEL, INSTANCE_LABEL, STAGE_LABEL, "app.kubernetes.io/component"}
WORDS = {
    str(word) for enum in (ConditionType, EventReason, FailureCause, InstancePhase, LossReason, Reason) for word in enum
}


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


def commands(page: str) -> list[str]:
    """Lines of the blocks, and what is in the text as code."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(kubectl [^`]+)`", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL))
    return [*(line for block in blocks for line in block.splitlines()), *inline]


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_pasted(page: str) -> None:
    """In one line each, quoted right, with nothing to fill in but what the index explains."""
    for command in commands(page):
        assert "\n" not in command
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=30)
        words = shlex.split(command, comments=True)
        assert words[0] == "kubectl"
        after = words[3:] if words[1] == "-n" else words[1:]
        assert after[0] in VERBS
        assert {word for word in re.findall(r"\b[A-Z]{3,}\b", command)} - {"GET", "POST", "PUT"} <= PLACEHOLDERS
        if after[0] in ("events", "logs", "describe") and not {"node", "NODE"} & set(after):
            assert words[1] == "-n", "the object may be anywhere"


@pytest.mark.parametrize("page", PAGES)
def test_labels_objects_and_ports_exist(page: str) -> None:
    text = "\n".join(commands(page))
    shipped = "\n".join(path.read_text() for path in (REPOSITORY / "manifests" / "base").glob("*.yaml"))

    assert set(re.findall(r"([\w./-]+)=", " ".join(re.findall(r" -l (\S+)", text)))) <= LABELS
    assert {name for name in re.findall(r"\bresilientllm-[a-z-]+", page) if f"name: {name}" not in shipped} == set()
    assert set(map(int, re.findall(r":(\d{4})\b", text))) <= {ENGINE_API_PORT, STAGE_HEALTH_PORT}


@pytest.mark.parametrize("page", PAGES)
def test_words_of_the_api_exist(page: str) -> None:
    assert set(re.findall(r"`([A-Z][A-Za-z]+)`", page)) - WORDS - OF_KUBERNETES == set()


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    spec = openapi_schema()["properties"]["spec"]
    for path in re.findall(r"`(?:spec\.)?((?:recovery|replication|stage|engine|image\w*)(?:\.\w+)*)(?:: \w+)?`", page):
        assert field(spec, path)


@cache
def sources() -> str:
    folders = (REPOSITORY / part / "src" for part in ("api", "operator", "worker"))
    return " ".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_logs_are_written_somewhere(page: str) -> None:
    quoted = re.findall(r"\"([a-z][a-z ]+ [a-z ]+)\"", re.sub(r"-o jsonpath='[^']*'", "", page), re.IGNORECASE)
    searched = [part for each in re.findall(r"grep (?:-E -A 20 )?\"([^\"]+)\"", page) for part in each.split("|")]

    assert [line for line in (*quoted, *searched) if line not in sources()] == []
