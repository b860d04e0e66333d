"""Processes are restarted, stopped in order, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from resilientllm_cli.supervise import warden
from resilientllm_cli.supervise.restart_policy import Policy
from resilientllm_cli.supervise.supervisor import Phase, Program, Status, Supervisor

FAST = Policy(first_delay_seconds=0.05, second_delay_seconds=0.05)


def shell(script: str, tmp_path: Path, name: str = "it", stop_order: int = 0) -> Program:
    return Program(name, ["sh", "-c", script], dict(os.environ), tmp_path / f"{name}.log", stop_order)


def eventually(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def gone(session: int) -> bool:
    return warden.members({session}) == []


def pid_of(supervisor: Supervisor) -> int:
    pid = supervisor.status()["it"].pid
    assert pid is not None
    return pid


def test_a_killed_process_comes_back_with_another_pid(tmp_path: Path) -> None:
    with Supervisor([shell("sleep 60", tmp_path)], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].phase is Phase.RUNNING)
        killed = supervisor.kill("it")
        assert supervisor.status()["it"].phase is Phase.BACK_OFF
        eventually(lambda: supervisor.status()["it"].phase is Phase.RUNNING)
        assert pid_of(supervisor) != killed
        assert supervisor.status()["it"].restarts == 1


def test_what_a_killed_process_had_started_dies_with_it(tmp_path: Path) -> None:
    with Supervisor([shell("sleep 60 & sleep 60", tmp_path)], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].pid is not None and len(warden.members({pid_of(supervisor)})) == 3)
        assert gone(supervisor.kill("it"))


def test_output_of_all_runs_is_in_the_log(tmp_path: Path) -> None:
    with Supervisor([shell("echo one run; exit 1", tmp_path)], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].restarts >= 2)
    assert (tmp_path / "it.log").read_text().startswith("one run\none run\n")


def test_a_refused_configuration_is_not_tried_again(tmp_path: Path) -> None:
    with Supervisor([shell("exit 2", tmp_path)], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].phase is Phase.REFUSED)
        assert supervisor.status()["it"] == Status("it", Phase.REFUSED, pid=None, restarts=0, last_exit_code=2)


def test_a_program_that_does_not_exist_says_so_in_its_log(tmp_path: Path) -> None:
    missing = Program("it", ["/nowhere/program"], {}, tmp_path / "it.log")
    with Supervisor([missing], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].last_exit_code == 127)
    assert "cannot run /nowhere/program: No such file or directory" in (tmp_path / "it.log").read_text()


def test_processes_stop_in_order(tmp_path: Path) -> None:
    said = tmp_path / "said"

    def says(name: str, order: int) -> Program:
        return shell(
            f"trap 'sleep 0.1; echo {name} >> {said}; exit 0' TERM; while :; do sleep 0.01; done", tmp_path, name, order
        )

    with Supervisor([says("stage", 1), says("engine", 0)], FAST) as supervisor:
        eventually(lambda: all(status.phase is Phase.RUNNING for status in supervisor.status().values()))
        time.sleep(0.3)  # Their traps are set.
    assert said.read_text().split() == ["engine", "stage"]


def test_a_process_that_ignores_sigterm_is_killed_after_a_bounded_time(tmp_path: Path) -> None:
    with Supervisor([shell("trap '' TERM; sleep 60; sleep 60", tmp_path)], FAST, stop_seconds=0.3) as supervisor:
        eventually(lambda: supervisor.status()["it"].pid is not None)
        time.sleep(0.2)  # Its trap is set.
        pid, started = pid_of(supervisor), time.monotonic()
    assert time.monotonic() - started < 5
    assert gone(pid)


def test_every_run_has_an_empty_temporary_folder_and_leaves_none(tmp_path: Path) -> None:
    leaves_a_file = 'echo "$TMPDIR $(ls -A "$TMPDIR" | wc -l)"; touch "$TMPDIR/left"; exit 1'
    with Supervisor([shell(leaves_a_file, tmp_path)], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].restarts >= 2)
    first, second, *_ = (line.split() for line in (tmp_path / "it.log").read_text().splitlines())
    assert first == second == [first[0], "0"]
    assert Path(first[0]).name == "it"
    assert not Path(first[0]).parent.exists()


def test_a_program_that_names_its_own_temporary_folder_keeps_it(tmp_path: Path) -> None:
    says = Program("it", ["sh", "-c", 'echo "$TMPDIR"; exit 1'], {"TMPDIR": "/its/own"}, tmp_path / "it.log")
    with Supervisor([says], FAST) as supervisor:
        eventually(lambda: supervisor.status()["it"].restarts >= 1)
    assert (tmp_path / "it.log").read_text().startswith("/its/own\n")


SUPERVISE_AND_WAIT = """
import os, sys, time
from pathlib import Path
from resilientllm_cli.supervise.supervisor import Program, Supervisor
program = Program("it", ["sh", "-c", "echo $TMPDIR; sleep 60 & sleep 60"], dict(os.environ), Path(sys.argv[1]))
with Supervisor([program]) as supervisor:
    while supervisor.status()["it"].pid is None:
        time.sleep(0.01)
    print(supervisor.status()["it"].pid, flush=True)
    time.sleep(60)
"""


def test_nothing_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISE_AND_WAIT, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        session = int(supervisor.stdout.readline())
        eventually(lambda: len(warden.members({session})) == 3)
        temporary = Path((tmp_path / "log").read_text().strip())
        assert temporary.is_dir()
        supervisor.send_signal(signal.SIGKILL)
    eventually(lambda: gone(session))
    eventually(lambda: not temporary.parent.exists())
