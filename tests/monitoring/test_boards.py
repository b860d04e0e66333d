"""The boards: each panel asks for what exists, by the variables of the board, and lies where there is room."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.monitoring.promql import asked_for, mistakes
from tests.monitoring.test_rules import promtool

FOLDER = Path(__file__).parents[2] / "manifests" / "grafana"
BOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
SCOPED = 'namespace=~"$namespace", name=~"$name"'
# What Grafana puts in; any value that could stand there will do.
VARIABLES = {"$__rate_interval": "1m", "$__range": "1h", "$namespace": ".*", "$name": ".*"}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board: dict[str, Any]) -> Iterator[str]:
    for panel in panels(board):
        yield from (target["expr"] for target in panel["targets"])
    yield from (each["expr"] for each in board["annotations"]["list"])


EVERY_PANEL = [pytest.param(panel, id=f"{name}: {panel['title']}") for name in BOARDS for panel in panels(BOARDS[name])]
EVERY_QUERY = [
    pytest.param(query, id=f"{name} {number}")
    for name, board in BOARDS.items()
    for number, query in enumerate(queries(board))
]


def test_there_are_the_two() -> None:
    assert list(BOARDS) == ["overview", "recovery"]


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_can_be_imported_anywhere(name: str) -> None:
    board = BOARDS[name]

    assert board["uid"] == f"resilientllm-{name}"
    assert board.get("id") is None, "an id is that of the Grafana that it was exported from"
    assert board["title"] and board["description"] and "resilientllm" in board["tags"]
    datasource, *others = board["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert [each["name"] for each in others] == ["namespace", "name"]
    assert all(each["datasource"] == DATASOURCE for each in (*others, *board["annotations"]["list"]))


@pytest.mark.parametrize("panel", EVERY_PANEL)
def test_a_panel_is_explained_and_has_a_unit_and_the_boards_data_source(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"] == DATASOURCE
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert [target["refId"] for target in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]
    assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


@pytest.mark.parametrize("query", EVERY_QUERY)
def test_a_query_asks_for_what_exists_of_the_chosen_objects(query: str) -> None:
    assert mistakes(query) == []
    cluster_wide = all(name.startswith("resilientllm_operator_") for name in asked_for(query))
    assert SCOPED in query or cluster_wide


@pytest.mark.parametrize("name", BOARDS)
def test_prometheus_understands_every_query(name: str, tmp_path: Path) -> None:
    rules = []
    for number, query in enumerate(queries(BOARDS[name])):
        for variable, value in VARIABLES.items():
            query = query.replace(variable, value)
        assert "$" not in query
        rules.append({"record": f"query:{number}", "expr": query})
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))

    promtool(tmp_path, "check", "rules", "queries.yaml")


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        at = panel["gridPos"]
        assert 0 <= at["x"] < at["x"] + at["w"] <= 24
        return set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))

    taken = [cell for panel in BOARDS[name]["panels"] for cell in cells(panel)]
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]

    assert len(taken) == len(set(taken))
    assert len(ids) == len(set(ids))


def test_every_board_becomes_a_config_map_that_grafana_finds() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    files = {entry.partition("=")[2] for each in kustomization["configMapGenerator"] for entry in each["files"]}

    assert files == {f"{name}.json" for name in BOARDS}
    assert kustomization["generatorOptions"]["labels"]["grafana_dashboard"] == "1"
