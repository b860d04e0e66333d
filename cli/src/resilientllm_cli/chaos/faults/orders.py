"""What happens inside a stage's process: it hangs in a step, its device fails, its memory runs out."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from resilientllm_cli.chaos.scene import Kind, Scene
from resilientllm_cli.chaos.stage_program import Order, What

STEP_SECONDS = 20.0
"""Within which a step comes to the victim: in prefill it may have to wait for those before it."""
EXIT_SECONDS = 10.0
MEMORY_LIMIT_BYTES = 64 << 20
"""Of what is taken from then on: what a process has already is not counted again."""
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


def hang(scene: Scene) -> None:
    pid = scene.world.order(scene.victim, Order(What.HANG, scene.random.random() < 0.5))
    at = scene.world.wait_carried_out(scene.victim, STEP_SECONDS)
    scene.strike(at)
    scene.landed = {"pid": pid, "stuck": "in a step since then"}

    def end() -> None:
        if scene.world.processes.pid(scene.name) == pid:
            scene.landed["ended_by"] = "the harness"
            scene.world.processes.kill(scene.name)
        else:
            scene.landed["ended_by"] = f"itself, with {scene.world.processes.ended(pid)}"

    scene.undo.callback(end)


def fail_device(scene: Scene) -> None:
    pid = scene.world.order(scene.victim, Order(What.RAISE, scene.random.random() < 0.5))
    at = scene.world.wait_carried_out(scene.victim, STEP_SECONDS)
    scene.strike(at)
    scene.landed = {"pid": pid, "ended_with": scene.world.processes.ended(pid, EXIT_SECONDS)}


def run_out_of_memory(scene: Scene) -> None:
    """With a memory cgroup the kernel kills; without one we do, as it would, and say so."""
    processes = scene.world.processes
    pid = processes.pid(scene.name)
    if pid is None:
        raise ProcessLookupError(f"{scene.name} does not run")
    if not (MEMORY_GROUPS / "memory.limit_in_bytes").exists() or os.geteuid() != 0:
        scene.strike()
        scene.landed = {"killed_by": "the harness: there is no memory cgroup", **processes.kill(scene.name)}
        return
    with _limited(pid) as group:
        scene.world.order(scene.victim, Order(What.BALLOON))
        # From then on its memory runs out, within some ten milliseconds.
        scene.strike(scene.world.wait_carried_out(scene.victim, STEP_SECONDS))
        code = processes.ended(pid, EXIT_SECONDS)
        kills = (group / "memory.oom_control").read_text().split()
        if code == -signal.SIGKILL:
            scene.landed = {"pid": pid, "ended_with": code, "oom_kill": int(kills[kills.index("oom_kill") + 1])}


@contextlib.contextmanager
def _limited(pid: int) -> Iterator[Path]:
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    # Pids do not tell two harnesses apart: each counts its own.
    group = MEMORY_GROUPS / own.rpartition(":")[2].strip("/") / f"resilientllm-chaos-{secrets.token_hex(8)}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT_BYTES))
        (group / "cgroup.procs").write_text(str(pid))
        yield group
    finally:
        deadline = time.monotonic() + EXIT_SECONDS
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        group.rmdir()


KINDS = (
    Kind("hang", hang),
    Kind("device-error", fail_device),
    Kind("out-of-memory", run_out_of_memory),
)
