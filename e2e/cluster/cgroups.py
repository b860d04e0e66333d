"""Control groups: a node's boundary for resources, and the record of every process we started.

No list of pids is kept anywhere. A process is put into its cluster's control group before it runs
its first instruction of ours, and all that it starts is born there, so `down` can end exactly the
processes of this cluster even when `up` crashed half-way.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import ClusterError

_RECORD = "pids"
"""The hierarchy in which processes are looked up; all of them hold the same ones."""

HOST_SIDE = "host"
"""Group of the helpers that run on the host itself, such as port forwarders."""
CONTROL_PLANE = "control-plane"


@dataclass(frozen=True)
class Hierarchy:
    """One mounted cgroup v1 hierarchy, for example of the memory controller."""

    path: Path
    options: str

    @property
    def controllers(self) -> frozenset[str]:
        return frozenset(self.options.split(","))


def parse_hierarchies(mountinfo: str, controllers: frozenset[str]) -> tuple[Hierarchy, ...]:
    """The cgroup v1 hierarchies in the text of ``/proc/self/mountinfo``."""
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        kind, _, super_options = source.split(" ", 2)
        if kind != "cgroup":
            continue
        kept = [word for word in super_options.split(",") if word in controllers or word.startswith("name=")]
        # A hierarchy without a controller, systemd's, can only be mounted again with "none".
        options = ",".join(["none", *kept] if kept and kept[0].startswith("name=") else kept)
        found.setdefault(options, Hierarchy(Path(mount.split(" ")[4]), options))
    return tuple(found.values())


def hierarchies() -> tuple[Hierarchy, ...]:
    enabled = Path("/proc/cgroups").read_text().splitlines()[1:]
    controllers = frozenset(line.split()[0] for line in enabled)
    found = parse_hierarchies(Path("/proc/self/mountinfo").read_text(), controllers)
    mounted = frozenset().union(*(hierarchy.controllers for hierarchy in found))
    needed = {"cpu", "cpuset", "memory", "pids", "devices", "freezer"}
    if not needed <= mounted:
        raise ClusterError(
            expected="cgroup v1 hierarchies of " + ", ".join(sorted(needed)),
            found="none of " + ", ".join(sorted(needed - mounted)) + " (cgroup v2?)",
            remedy="use the kind provider on this machine: it needs Docker, and works with cgroup v2",
        )
    return found


def create(group: str) -> tuple[Path, ...]:
    """Make a group such as ``rllm-x/node-1`` in every hierarchy; the paths to put a process into."""
    paths = []
    for hierarchy in hierarchies():
        path = hierarchy.path
        for part in group.split("/"):
            parent, path = path, path / part
            path.mkdir(exist_ok=True)
            if "cpuset" in hierarchy.controllers:
                # A new cpuset is empty, and no process can enter it before it has been filled.
                for file in ("cpuset.cpus", "cpuset.mems"):
                    (path / file).write_text((parent / file).read_text())
                (path / "cgroup.clone_children").write_text("1")
        paths.append(path)
    return tuple(paths)


def enter(paths: tuple[Path, ...], pid: int) -> None:
    for path in paths:
        (path / "cgroup.procs").write_text(str(pid))


def record(group: str) -> Path:
    """The folder whose tree lists the processes of a group and of everything below it."""
    for hierarchy in hierarchies():
        if _RECORD in hierarchy.controllers:
            return hierarchy.path / group
    raise AssertionError("hierarchies() has checked that the pids hierarchy is mounted")


def processes(group: str) -> list[int]:
    """Host pids of all processes in a group and in the groups below it."""
    return sorted(set(_pids_below(record(group))))


def namespace_init(group: str) -> int | None:
    """Host pid of the process that is pid 1 of the namespace that a group's processes live in."""
    for pid in _pids_in(record(group)):
        ids = namespace_pids(pid)
        if len(ids) == 2 and ids[-1] == 1:
            return pid
    return None


def namespace_pids(pid: int) -> list[int]:
    """A process's pid in every namespace that it is part of, the host's first; empty when it ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return [int(word) for word in line.split()[1:]]
    return []


def kill(group: str, timeout_seconds: float = 15.0) -> None:
    """End every process of a group with SIGKILL, and wait until they are gone."""
    deadline = time.monotonic() + timeout_seconds
    init = namespace_init(group)
    if init is not None:
        # The kernel ends all other processes of the namespace with it, at once.
        kill_member(group, init)
    while left := processes(group):
        if time.monotonic() > deadline:
            raise ClusterError(
                expected=f"no process in the control group {group} {timeout_seconds:g} s after SIGKILL",
                found="pids " + ", ".join(map(str, left)),
                remedy="look at /proc/<pid>/stack: the kernel holds them",
            )
        for pid in left:
            kill_member(group, pid)
        time.sleep(0.02)


def kill_member(group: str, pid: int) -> None:
    """SIGKILL a process if it belongs to a group.

    The descriptor pins the process, so a pid that was given to another program in between is safe.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_member(Path(f"/proc/{pid}/cgroup").read_text(), group):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(descriptor)


def is_member(proc_cgroup: str, group: str) -> bool:
    """Whether the text of ``/proc/<pid>/cgroup`` places a process in a group or below it."""
    for line in proc_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if _RECORD in controllers.split(","):
            return path == f"/{group}" or path.startswith(f"/{group}/")
    return False


def remove(group: str, timeout_seconds: float = 10.0) -> None:
    """Remove a group, and those below it, from every hierarchy. Its processes must have ended."""
    deadline = time.monotonic() + timeout_seconds
    for hierarchy in hierarchies():
        top = hierarchy.path / group
        while top.exists():
            try:
                for folder in _folders_deepest_first(top):
                    folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                # The kernel takes a moment to let go of a group whose processes have just ended.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


def _folders_deepest_first(top: Path) -> Iterator[Path]:
    for folder, _, _ in os.walk(top, topdown=False):
        yield Path(folder)


def _pids_below(top: Path) -> Iterator[int]:
    for folder, _, _ in os.walk(top):
        yield from _pids_in(Path(folder))


def _pids_in(folder: Path) -> list[int]:
    try:
        return [int(word) for word in (folder / "cgroup.procs").read_text().split()]
    except OSError:
        # A container's group may go while we look; a group that is gone has no processes.
        return []
