"""What befalls the machine below: a disk without room, a wall clock that jumps."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from resilientllm_cli.chaos import clock
from resilientllm_cli.chaos.faults.kills import kill
from resilientllm_cli.chaos.scene import Kind, Scene

BALLAST = "ballast"
CHUNK = b"\0" * (1 << 20)
RECOVERY_SECONDS = 20.0
STEPS_SECONDS = (-86_400.0, -3600.0, -60.0, 60.0, 3600.0, 86_400.0)


def fill_disk(scene: Scene) -> None:
    """Before the streams begin, because it takes a moment."""
    ballast = scene.world.disk / BALLAST
    scene.undo.callback(ballast.unlink, missing_ok=True)
    _fill(ballast)


def kill_on_full_disk(scene: Scene) -> None:
    """A full disk alone is not noticed by those that run."""
    kill(scene)
    evidence, scene.landed = scene.landed, {}
    refused = _fill(scene.world.disk / BALLAST)
    if _free(scene.world.disk) == 0:
        scene.landed = {**evidence, "write_refused_with": errno.errorcode[refused], "bytes_free": 0}


def _fill(file: Path) -> int:
    """Returns the error that ended it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        while True:
            try:
                os.write(descriptor, CHUNK)
            except OSError as error:
                return error.errno or 0
    finally:
        os.close(descriptor)


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def step_clock(scene: Scene) -> None:
    """Of every process at once, as on one machine. A stage is killed besides, for engines to date something."""
    seconds = scene.random.choice(STEPS_SECONDS)
    world = scene.world
    files = [world.clock_file(name) for name in world.names()]
    before = scene.state(scene.victim.instance).recoveries_total
    for file in files:
        clock.step(file, seconds)
        scene.undo.callback(clock.step, file, 0.0)
    kill(scene)
    scene.at_wall += seconds
    evidence, scene.landed = scene.landed, {}
    scene.wait_state(scene.victim.instance, lambda now: now.recoveries_total > before, "a recovery", RECOVERY_SECONDS)
    dated = scene.state(scene.victim.instance).recoveries[-1].detected_at.timestamp() - time.time()
    if abs(dated - seconds) < RECOVERY_SECONDS:
        scene.landed = {**evidence, "seconds": seconds, "recovery_dated_off_by": round(dated, 1)}


KINDS = (Kind("disk-full", kill_on_full_disk, prepare=fill_disk), Kind("clock-step", step_clock))
