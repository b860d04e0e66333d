"""Local mode round stand-ins for stages and engines: what is seen, restarted, stopped and refused."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from resilientllm_api.plan import ReplicationMode
from resilientllm_cli.errors import UsageError
from resilientllm_cli.local import ClusterFailed, Layout, LocalCluster, preflight
from resilientllm_cli.local.layout import Files
from resilientllm_cli.local.state import read
from resilientllm_cli.local.view import transitions
from resilientllm_cli.main import run
from resilientllm_cli.supervise import warden


@pytest.fixture
def layout(tiny_model: Path, tmp_path: Path) -> Layout:
    return Layout(model=tiny_model, port=0, directory=tmp_path / "local")


def test_it_is_ready_and_its_state_file_says_where_everything_is(
    layout: Layout, fake_executables: dict[str, str]
) -> None:
    with LocalCluster(layout, executables=fake_executables) as cluster:
        cluster.wait_ready(30)
        said = json.loads(cluster.files.state.read_text())
        assert said["ready"] is True
        assert [engine["url"] for engine in said["engines"]] == [engine.url for engine in cluster.engines]
        assert [(s["instance"], s["stage"], s["rank"]) for s in said["stages"]] == [
            (0, 0, 0),
            (0, 1, 0),
            (1, 0, 0),
            (1, 1, 0),
        ]
        assert all({"pid", "address"} <= set(stage) for stage in said["stages"])
        assert cluster.files.token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("words", "mode"), [((), "Ring"), (("--replication", "none"), "None")])
def test_replication_goes_into_every_plan(
    tiny_model: Path,
    tmp_path: Path,
    fake_executables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    mode: str,
) -> None:
    def enough(cluster: LocalCluster) -> None:
        raise ClusterFailed("seen enough")

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(preflight, "executables", lambda: fake_executables)
    monkeypatch.setattr(LocalCluster, "check", enough)
    assert run(["local", "up", "--model", str(tiny_model), "--port", "0", "--directory", str(tmp_path), *words]) == 2
    plans = [json.loads(Files(tmp_path).plan(instance).read_text()) for instance in (0, 1)]
    assert [plan["replication"] for plan in plans] == [mode, mode]


def test_it_shows_how_far_copies_are_behind(layout: Layout, fake_executables: dict[str, str]) -> None:
    with LocalCluster(layout, executables=fake_executables) as cluster:
        now = cluster.wait_ready(30)
        assert [engine.lag_seconds for engine in now.engines] == [0.2, 0.2]
        assert read(cluster.files.state) == now
    without = replace(layout, replication=ReplicationMode.NONE)
    with LocalCluster(without, executables=fake_executables) as cluster:
        assert [engine.lag_seconds for engine in cluster.wait_ready(30).engines] == [None, None]


def test_a_killed_stage_comes_back_at_the_same_address(layout: Layout, fake_executables: dict[str, str]) -> None:
    with LocalCluster(layout, executables=fake_executables) as cluster:
        cluster.wait_ready(30)
        before = cluster.stage(0, 1)
        assert cluster.kill_stage(0, 1) == before.pid
        assert not cluster.state().ready
        cluster.wait_ready(30)
        after = cluster.stage(0, 1)
        assert after.pid != before.pid
        assert after.address == before.address
        assert after.restarts == 1


def test_killing_one_rank_of_a_stage_waits_for_the_end_of_them_all(
    layout: Layout, fake_executables: dict[str, str]
) -> None:
    with LocalCluster(replace(layout, tensor_parallel_size=2), executables=fake_executables) as cluster:
        cluster.wait_ready(30)
        before = [cluster.stage(0, 1, rank).pid for rank in (0, 1)]
        assert cluster.kill_stage(0, 1, rank=1) == before[1]
        assert before[0] is not None
        assert warden.members({before[0]}) == []
        cluster.wait_ready(30)
        assert {cluster.stage(0, 1, rank).pid for rank in (0, 1)}.isdisjoint({None, *before})
        assert cluster.stage(0, 1).restarts == 1
        with pytest.raises(KeyError, match=r"there is no rank 2 of stage 0\.1"):
            cluster.kill_stage(0, 1, rank=2)


def test_leaving_it_leaves_no_process(layout: Layout, fake_executables: dict[str, str]) -> None:
    with LocalCluster(layout, executables=fake_executables) as cluster:
        now = cluster.wait_ready(30)
        pids = [engine.pid for engine in now.engines] + [stage.pid for stage in now.stages]
        sessions = {pid for pid in pids if pid}
        assert len(warden.members(sessions)) == 12  # Each has a child of its own.
    assert warden.members(sessions) == []
    assert not json.loads(cluster.files.state.read_text())["ready"]


def test_a_refused_configuration_is_told_in_the_words_of_the_process(
    layout: Layout, fake_executables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_EXIT", "2")
    with (
        LocalCluster(layout, executables=fake_executables) as cluster,
        pytest.raises(ClusterFailed, match="expected a better configuration"),
    ):
        cluster.wait_ready(30)


def test_two_runs_cannot_share_a_directory(layout: Layout, fake_executables: dict[str, str]) -> None:
    with (
        LocalCluster(layout, executables=fake_executables),
        pytest.raises(UsageError, match="another run uses"),
        LocalCluster(layout, executables=fake_executables),
    ):
        pass


def test_transitions_tell_each_change_once(layout: Layout, fake_executables: dict[str, str]) -> None:
    lines: list[str] = []
    with LocalCluster(
        layout, executables=fake_executables, on_change=lambda before, after: lines.extend(transitions(before, after))
    ) as cluster:
        cluster.wait_ready(30)
    assert lines.count("stage 0.1: Ready") == 1
    assert sum(line.startswith("ready: http://127.0.0.1:") for line in lines) == 1


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", "from resilientllm_cli.main import main; main()", *words]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_runs_until_a_signal_and_exits_with_0(
    number: signal.Signals,
    tiny_model: Path,
    tmp_path: Path,
    fake_executables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "local"
    script = (
        "from resilientllm_cli.local import preflight; import sys, json; "
        f"preflight.executables = lambda: {fake_executables!r}; from resilientllm_cli.main import main; main()"
    )
    words = ["local", "up", "--model", str(tiny_model), "--port", "0", "--directory", str(directory)]
    with subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert any(line.split()[1] == "ready:" for line in up.stdout)
        sessions = {stage["pid"] for stage in json.loads((directory / "state.json").read_text())["stages"]}
        up.send_signal(number)
        assert up.wait(30) == 0
    assert warden.members(sessions) == []


def test_a_bad_model_path_is_one_line_and_exit_2(tmp_path: Path) -> None:
    words = ["local", "up", "--model", str(tmp_path / "missing"), "--directory", str(tmp_path)]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--model must be a model directory" in done.stderr


def test_a_taken_port_is_one_line_and_exit_2(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = run(["local", "up", "--model", str(tiny_model), "--port", port, "--directory", str(tmp_path)])
    assert code == 2
    assert capsys.readouterr().err.startswith(f"resilientllm: port {port} is taken")


def test_down_without_a_run_is_fine(tmp_path: Path) -> None:
    started = time.monotonic()
    assert run(["local", "down", "--directory", str(tmp_path)]) == 0
    assert time.monotonic() - started < 1
