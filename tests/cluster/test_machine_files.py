"""Which of the machine's files containers see."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.errors import ClusterError
from e2e.cluster.machine_files import base_spec, default_mounts, outermost, python_folders, write_base_spec

DEFAULT: dict[str, Any] = {
    "process": {"rlimits": [{"type": "RLIMIT_NOFILE"}], "cwd": "/"},
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
}


def test_mounts_come_after_the_runtimes_own_and_can_not_be_written() -> None:
    spec = base_spec(DEFAULT, [Path("/usr")])

    assert [mount["destination"] for mount in spec["mounts"]] == ["/proc", "/usr"]
    assert "ro" in spec["mounts"][1]["options"]
    assert "rlimits" not in spec["process"]


def test_default_is_not_changed() -> None:
    base_spec(DEFAULT, [Path("/usr")])

    assert len(DEFAULT["mounts"]) == 1


def test_paths_seen_through_another_are_left_out() -> None:
    paths = [Path("/usr"), Path("/usr/local"), Path("/work"), Path("/work"), Path("/workshop")]

    assert outermost(paths) == (Path("/usr"), Path("/work"), Path("/workshop"))


def test_interpreter_of_a_virtual_environment_is_included(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)

    folders = python_folders(tmp_path)

    assert folders[0] == tmp_path
    assert Path(sys.base_prefix).resolve() in folders


def test_checkout_without_virtual_environment_shows_itself_and_the_system(tmp_path: Path) -> None:
    mounts = default_mounts(tmp_path)

    assert tmp_path in mounts
    assert Path("/usr") in mounts


def test_broken_virtual_environment_is_an_error_that_says_how_to_make_one(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()

    with pytest.raises(ClusterError, match="uv sync"):
        default_mounts(tmp_path)


def test_path_that_does_not_exist_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="existing"):
        write_base_spec(tmp_path / "spec.json", [tmp_path / "missing"])
