"""The checks that read code without running it, as tests, so that one run of pytest tells everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


def passes(*command: str) -> None:
    """Runs a program of the environment in the root of the repository, and shows what it said if it fails."""
    done = subprocess.run(
        [str(PROGRAMS / command[0]), *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_code_follows_the_rules() -> None:
    passes("ruff", "check", "--output-format=concise", ".")


def test_code_is_formatted() -> None:
    passes("ruff", "format", "--check", "--output-format=concise", ".")


@pytest.mark.timeout(900)  # without a cache, on a busy machine
def test_types_agree() -> None:
    passes("mypy")


def test_imports_point_one_way() -> None:
    passes("lint-imports", "--no-logo")
