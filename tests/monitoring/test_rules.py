"""The alerts: each fires when it should, asks for what exists, and sends people to a page that helps."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.monitoring.programs import program
from tests.monitoring.promql import mistakes

REPOSITORY = Path(__file__).parents[2]
RUNBOOKS = REPOSITORY / "docs" / "runbooks"
SCENARIOS = Path(__file__).parent / "rules_test.yaml"

RULE = yaml.safe_load((REPOSITORY / "manifests" / "components" / "prometheus" / "rules.yaml").read_text())
RULES = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
SECTIONS = ["What it means", "What to look at", "What to do"]


def names(rule: dict[str, Any]) -> str:
    return str(rule.get("alert") or rule["record"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as promtool wants them, and the scenarios beside them."""
    folder = tmp_path_factory.mktemp("rules")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULE["spec"]))
    shutil.copy(SCENARIOS, folder)
    return folder


def promtool(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_can_read_them(folder: Path) -> None:
    promtool(folder, "check", "rules", "rules.yaml")


def test_they_fire_in_the_scenarios_where_they_should_and_in_no_other(folder: Path) -> None:
    promtool(folder, "test", "rules", SCENARIOS.name)


def test_every_alert_fires_in_some_scenario() -> None:
    expected = [
        sample["labels"]
        for scenario in yaml.safe_load(SCENARIOS.read_text())["tests"]
        for test in scenario["promql_expr_test"]
        for sample in test["exp_samples"]
    ]
    fired = {name for labels in expected for name in re.findall(r'alertname="(\w+)"', labels)}

    assert fired == {each["alert"] for each in ALERTS}


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_a_rule_asks_for_series_and_labels_that_exist(rule: dict[str, Any]) -> None:
    assert mistakes(rule["expr"]) == []


@pytest.mark.parametrize("alert", ALERTS, ids=names)
def test_an_alert_says_how_urgent_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    assert name.startswith("ResilientLLM")
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    url = alert["annotations"]["runbook_url"]
    assert url == f"docs/runbooks/{name}.md", "a page of this repository: components/runbooks puts yours in its place"
    page = (REPOSITORY / url).read_text()
    assert page.startswith(f"# {name}\n")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS
    assert f"`{alert['labels']['severity']}`" in page


def test_no_page_is_left_over() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == {each["alert"] for each in ALERTS} | {"README"}


def test_the_docs_list_every_alert_with_its_severity() -> None:
    text = (REPOSITORY / "docs" / "monitoring.md").read_text()
    listed = dict(re.findall(r"^\| `(ResilientLLM\w+)` \| (\w+) \|", text, re.MULTILINE))
    pages = dict(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", (RUNBOOKS / "README.md").read_text(), re.MULTILINE))

    assert listed == {each["alert"]: each["labels"]["severity"] for each in ALERTS} == pages
