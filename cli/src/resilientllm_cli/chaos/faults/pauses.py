"""A stage that stops, and goes on later as if nothing had been: what it does then must change nothing."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

from resilientllm_cli.chaos.scene import Kind, Scene

SHORTEST_SECONDS, LONGEST_SECONDS = 0.5, 5.0
SEEN_SECONDS = 2.0


def process_state(pid: int) -> str:
    """One letter, as in ``ps``; ``stat``: pid (name) state …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stop_and_continue(scene: Scene) -> None:
    processes = scene.world.processes
    scene.strike()
    pid = processes.signal(scene.name, signal.SIGSTOP)

    def go_on() -> None:
        with suppress(ProcessLookupError):
            processes.signal(scene.name, signal.SIGCONT)

    scene.undo.callback(go_on)
    deadline = time.monotonic() + SEEN_SECONDS
    while (state := process_state(pid)) != "T" and time.monotonic() < deadline:
        time.sleep(0.002)
    seconds = scene.random.uniform(SHORTEST_SECONDS, LONGEST_SECONDS)
    if state == "T":
        scene.landed = {"pid": pid, "state": state, "seconds": round(seconds, 2)}
    time.sleep(seconds)
    go_on()


KINDS = (Kind("stop-continue", stop_and_continue),)
