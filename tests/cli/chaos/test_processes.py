"""Processes off the zygote: they are what was asked for, and they come back unless they are held down."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from resilientllm_cli.chaos.network import Network
from resilientllm_cli.chaos.processes import Processes, Start
from resilientllm_cli.supervise.warden import members

from tests.cli.chaos.enclosed import enclosed, possible

pytestmark = pytest.mark.skipif(not possible(), reason="namespaces of its own are not allowed here")

PROGRAM = """
import os, sys, time
def main():
    host = open("/proc/thread-self/net/fib_trie").read()
    print(os.getpid(), sys.argv[1], os.environ["NAME"], "10.77.0.2" in host, flush=True)
    time.sleep(600)
"""


def check_life() -> None:
    folder = Path(tempfile.mkdtemp())
    (folder / "program.py").write_text(PROGRAM)
    network = Network()
    network.add("host", 0)
    start = Start(
        name="stage-0.0",
        entry="program:main",
        arguments=("stage", "argument"),
        environment={"NAME": "value"},
        namespace=str(network.namespace("host")),
        log=str(folder / "log"),
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with Processes([start], ["json"], environment, folder / "zygote.log") as processes:
        one = wait(lambda: processes.pid("stage-0.0"))
        wait(lambda: (folder / "log").exists() and (folder / "log").read_text())
        assert (folder / "log").read_text() == f"{one} argument value True\n"
        assert processes.kill("stage-0.0") == {"pid": one, "ended_with": -signal.SIGKILL}
        two = wait(lambda: processes.pid("stage-0.0"))
        with processes.held("stage-0.0"):
            processes.kill("stage-0.0")
            with pytest.raises(ProcessLookupError):
                processes.signal("stage-0.0", signal.SIGTERM)
        three = wait(lambda: processes.pid("stage-0.0"))
        assert len({one, two, three}) == 3 and processes.starts("stage-0.0") == 3
    assert members({three}) == []


def wait(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def test_a_process_is_what_was_asked_for_and_comes_back_unless_it_is_held() -> None:
    enclosed(check_life, __file__)
