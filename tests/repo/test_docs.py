"""The docs name what exists: files, headings, make targets, fields, reasons, seams."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from jsonschema import Draft7Validator
from resilientllm_api.crd_schema import openapi_schema
from resilientllm_api.reasons import EventReason, Reason

REPOSITORY = Path(__file__).parents[2]
WORKER = REPOSITORY / "worker" / "src" / "resilientllm_worker"


def documents() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [REPOSITORY / name for name in listed.split() if (REPOSITORY / name).exists()]


def prose(document: Path) -> str:
    """The text without code blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Names of the headings, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def links(document: Path) -> Iterator[str]:
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(document)):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_to_elsewhere_are_well_formed(document: Path) -> None:
    """Whether they lead somewhere, only the network knows."""
    targets = re.findall(r"\[[^\]]*\]\(((?:[a-z]+:|//)[^)]*)\)|<((?:https?:)[^>]*)>", prose(document))
    elsewhere = [urlsplit(first or second) for first, second in targets]

    assert [each.geturl() for each in elsewhere if each.scheme != "https" or "." not in (each.hostname or "")] == []
    assert [each.geturl() for each in elsewhere if re.search(r"\s", each.geturl())] == []


def test_every_page_can_be_found() -> None:
    """From the index, or from a page that is in it."""
    index = REPOSITORY / "docs" / "README.md"
    found, rest = {index}, [index]
    while rest:
        page = rest.pop()
        linked = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        rest += (new := {each for each in linked if each.suffix == ".md"} - found)
        found |= new

    assert {page for page in documents() if page.is_relative_to(REPOSITORY / "docs")} - found == set()


def closed(schema: Any) -> Any:
    """The same, and an object has no fields but those that it names."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_objects_in_examples_are_as_the_crd_has_them(document: Path) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    objects = [each for block in blocks for each in yaml.safe_load_all(block) if isinstance(each, dict)]
    schema = closed(openapi_schema())
    schema["properties"]["metadata"] = {"type": "object"}

    for each in objects:
        if each.get("kind") == "ResilientLLM":
            Draft7Validator(schema).validate(each)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+):.*## ", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in links(document):
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_make_targets_exist(document: Path) -> None:
    in_code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", document.read_text(), re.MULTILINE | re.DOTALL))
    named = re.findall(r"^`?make((?: +[a-z0-9-]+)+)(?=$| |`)", in_code, re.MULTILINE)
    words = {word for words in named for word in words.split()}

    assert words <= make_targets()


def test_the_makefile_lists_all_its_targets() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)

    assert phony is not None
    assert set(phony[1].split()) == make_targets()


def test_every_reason_is_explained() -> None:
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()

    assert [reason for reason in Reason if f"| `{reason}` |" not in text] == []
    assert [reason for reason in EventReason if f"`{reason}`" not in text] == []


def field_names(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        nested = list(field_names(field, f"{prefix}{name}."))
        yield from nested or [f"{prefix}{name}"]


def test_every_field_of_the_spec_is_explained() -> None:
    """Those of a pod template are listed with the two that have one."""
    text = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    fields = list(field_names(openapi_schema()["properties"]["spec"]))

    assert "recovery.waitForDonor" in fields
    missing = [name for name in fields if f"`{name}`" not in text]
    assert [name for name in missing if name.partition(".")[0] not in ("engine", "stage")] == []
    for name in ("env", "resources", "nodeSelector", "tolerations"):
        assert f"`{name}`" in text


def test_every_seam_is_listed() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    without = {"__init__.py", "errors.py"}
    seams = [path.relative_to(WORKER) for path in (WORKER / "seams").glob("*.py") if path.name not in without]
    others = [path.relative_to(WORKER) for path in WORKER.rglob("*.py") if '"""Seam:' in path.read_text()[:200]]

    assert len(seams) > 8
    assert sorted({str(path) for path in (*seams, *others) if f"`{path}`" not in text}) == []


def test_every_message_is_listed() -> None:
    source = (WORKER / "protocol" / "messages.py").read_text()
    union = re.search(r"^Message = \((.*?)^\)", source, re.MULTILINE | re.DOTALL)
    text = (REPOSITORY / "docs" / "architecture.md").read_text()

    assert union is not None
    assert [name for name in re.findall(r"\w+", union[1]) if f"`{name}`" not in text] == []
