"""What can be said of the Dockerfiles without a registry: sources exist, bases are pinned, nobody is root."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from resilientllm_operator.pods import USER_ID

REPOSITORY = Path(__file__).parents[2]
PARTS = ("operator", "worker")


@dataclass(frozen=True)
class Instruction:
    name: str
    words: tuple[str, ...]


def instructions(part: str) -> list[Instruction]:
    lines = (REPOSITORY / part / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#")).replace("\\\n", " ")
    parsed = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [Instruction(name.upper(), tuple(shlex.split(rest))) for name, _, rest in parsed]


def copied(part: str) -> list[str]:
    """Paths that come from the repository, not from an earlier stage."""
    found = [
        each.words for each in instructions(part) if each.name == "COPY" and not each.words[0].startswith("--from")
    ]
    return [source for words in found for source in words[:-1]]


def let_through() -> set[str]:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines, "the file is a list of what is let through"
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


@pytest.mark.parametrize("part", PARTS)
def test_everything_that_is_copied_exists_and_reaches_the_build(part: str) -> None:
    sources = copied(part)

    assert "uv.lock" in sources
    assert [source for source in sources if not (REPOSITORY / source).exists()] == []
    assert [source for source in sources if source.partition("/")[0] not in let_through()] == []


@pytest.mark.parametrize("part", PARTS)
def test_dependencies_are_installed_before_any_code_is_copied(part: str) -> None:
    steps = [" ".join((each.name, *each.words)) for each in instructions(part)]
    first_code = next(number for number, step in enumerate(steps) if re.match(r"COPY \S+/src ", step))
    first_sync = next(number for number, step in enumerate(steps) if "uv sync" in step)

    assert "--no-install-workspace" in steps[first_sync]
    assert first_sync < first_code


@pytest.mark.parametrize("part", PARTS)
def test_the_lock_file_decides_what_is_installed(part: str) -> None:
    syncs = [each.words for each in instructions(part) if "sync" in each.words]

    assert len(syncs) == 2
    for words in syncs:
        assert {"--frozen", "--no-dev", "--package", f"resilientllm-{part}"} <= set(words)


@pytest.mark.parametrize("part", PARTS)
def test_bases_are_pinned_to_a_full_version(part: str) -> None:
    steps = instructions(part)
    (default,) = {each.words[0] for each in steps if each.name == "ARG" and each.words[0].startswith("PYTHON=")}

    assert re.fullmatch(r"PYTHON=python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", default)
    assert {each.words[0] for each in steps if each.name == "FROM"} == {"${PYTHON}"}


@pytest.mark.parametrize("part", PARTS)
def test_the_image_runs_as_the_user_that_the_manifests_name(part: str) -> None:
    last_stage = instructions(part)
    last_stage = last_stage[max(n for n, each in enumerate(last_stage) if each.name == "FROM") :]

    assert [each.words for each in last_stage if each.name == "USER"] == [(f"{USER_ID}:{USER_ID}",)]


def test_the_operator_of_the_manifests_is_the_images_user() -> None:
    documents = yaml.safe_load_all((REPOSITORY / "manifests" / "base" / "operator.yaml").read_text())
    deployment = next(each for each in documents if each["kind"] == "Deployment")

    assert deployment["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == USER_ID


def test_all_members_of_the_workspace_are_there_for_uv() -> None:
    members = {f"{path.parent.name}/pyproject.toml" for path in REPOSITORY.glob("*/pyproject.toml")}

    for part in PARTS:
        assert members <= set(copied(part))
