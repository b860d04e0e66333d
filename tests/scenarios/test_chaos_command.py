"""`make chaos`: which kinds go where, and what its exit status says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from resilientllm_cli.chaos.faults import KINDS as LOCAL_KINDS

from e2e.chaos import __main__ as command
from e2e.chaos import cluster_runs, local_runs
from e2e.chaos.kinds import KINDS as CLUSTER_KINDS


class Calls:
    """Stands in for both harnesses."""

    def __init__(self) -> None:
        self.local: list[str] | None = None
        self.cluster: tuple[list[str], list[int]] | None = None
        self.local_exit = 0
        self.cluster_failed = False

    def run_local(self, words: list[str]) -> int:
        self.local = words
        return self.local_exit

    def run_cluster(self, kinds: Any, seeds: Any, *_: object, **__: object) -> bool:
        self.cluster = ([kind.name for kind in kinds], list(seeds))
        return self.cluster_failed


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    monkeypatch.setattr(local_runs, "run", made.run_local)
    monkeypatch.setattr(cluster_runs, "run", made.run_cluster)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return made


def run(folder: Path, *words: str) -> int:
    return command.main([f"--output={folder / 'chaos.jsonl'}", f"--directory={folder / 'chaos'}", *words])


def test_all_kinds_run_by_default(tmp_path: Path, calls: Calls) -> None:
    assert run(tmp_path, "--runs=2", "--seed=5") == 0
    assert calls.local is not None and f"--faults={','.join(LOCAL_KINDS)}" in calls.local
    assert calls.cluster == (list(CLUSTER_KINDS), [5, 6])


def test_kinds_go_where_they_can_be_done(tmp_path: Path, calls: Calls) -> None:
    run(tmp_path, "--faults=node-killed,hang,pod-deleted", "--shapes=2x3", "--resume")
    assert calls.local is not None and {"--faults=hang", "--shapes=2x3", "--resume"} <= set(calls.local)
    assert calls.cluster is not None and calls.cluster[0] == ["node-killed", "pod-deleted"]


def test_nothing_is_started_that_was_not_asked_for(tmp_path: Path, calls: Calls) -> None:
    run(tmp_path, "--faults=hang")
    assert calls.cluster is None
    calls.local = None
    run(tmp_path, "--faults=node-killed")
    assert calls.local is None


def test_a_soak_needs_no_cluster(tmp_path: Path, calls: Calls) -> None:
    run(tmp_path, "--soak", "--for-seconds=1800")
    assert calls.cluster is None
    assert calls.local is not None and {"--soak", "--for-seconds=1800.0"} <= set(calls.local)


def test_a_problem_of_either_is_told_and_the_other_runs(tmp_path: Path, calls: Calls) -> None:
    calls.local_exit = command.FAILED
    assert run(tmp_path, "--faults=hang,node-killed") == command.FAILED
    assert calls.cluster is not None
    calls.local_exit, calls.cluster_failed = 0, True
    assert run(tmp_path, "--faults=hang,node-killed") == command.FAILED


def test_what_stops_the_first_is_not_followed_by_the_second(tmp_path: Path, calls: Calls) -> None:
    calls.local_exit = command.WRONG_USAGE
    assert run(tmp_path, "--faults=hang,node-killed", "--shapes=nine") == command.WRONG_USAGE
    assert calls.cluster is None


def test_an_unknown_kind_is_wrong_usage_and_the_known_ones_are_named(
    tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "--faults=hang,node-eaten")
    assert exit_.value.code == command.WRONG_USAGE
    said = capsys.readouterr().err
    assert "unknown faults node-eaten" in said and "node-killed" in said and "hang" in said
    assert calls.local is None


def test_a_folder_that_cannot_be_is_wrong_usage(
    tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chaos").write_text("a file")
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "--faults=node-killed")
    assert exit_.value.code == command.WRONG_USAGE
    assert "must be a folder" in capsys.readouterr().err


def test_a_cluster_without_root_is_wrong_usage_before_anything_ran(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "--faults=hang,node-killed")
    assert exit_.value.code == command.WRONG_USAGE
    assert "node-killed need a cluster" in capsys.readouterr().err
    assert calls.local is None
    assert run(tmp_path, "--faults=hang") == 0


def test_no_cluster_is_made_for_runs_that_are_there_already_or_too_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "chaos.jsonl"
    output.write_text('{"fault": "node-killed", "shape": "2x2", "seed": 1}\n')
    kinds = [CLUSTER_KINDS["node-killed"]]
    assert not cluster_runs.run(kinds, [1], output, tmp_path, float("inf"), resume=True)
    assert not cluster_runs.run(kinds, [2], output, tmp_path, time.monotonic() - 1, resume=True)
    assert "1 runs on a cluster were not begun" in capsys.readouterr().err
