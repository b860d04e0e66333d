"""Turning fresh Linux namespaces into something that programs take for a machine of their own."""

from __future__ import annotations

import socket
from pathlib import Path

from . import cgroups
from .commands import run

# The kubelet insists on these, and they hold for the whole machine, which is not a cluster's to
# change. It is content when a file that already says so lies over them.
SHIELDED_SYSCTLS = {"vm/overcommit_memory": "1", "kernel/panic": "10", "kernel/panic_on_oops": "1"}


def become_machine(host_name: str) -> None:
    """Give a process in new namespaces its own host name, /proc, /sys, control groups and /run.

    A new mount namespace starts as a copy of the machine's mounts; all else of it stays visible.
    """
    hierarchies = cgroups.hierarchies()
    socket.sethostname(host_name)
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "sysfs", "sysfs", "/sys")
    run("mount", "-t", "tmpfs", "-o", "mode=755", "cgroup", "/sys/fs/cgroup")
    for hierarchy in hierarchies:
        hierarchy.path.mkdir(parents=True)
        run("mount", "-t", "cgroup", "-o", hierarchy.options, "cgroup", hierarchy.path)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "run", "/run")
    for wanted in ("/run/netns", "/run/lock"):
        Path(wanted).mkdir()
    # What is mounted later, such as a pod's volumes, must be seen by the containers that start later.
    run("mount", "--make-rshared", "/")


def shield_sysctls(folder: Path) -> None:
    for sysctl, value in SHIELDED_SYSCTLS.items():
        shield = folder / "sysctl" / sysctl
        shield.parent.mkdir(parents=True, exist_ok=True)
        shield.write_text(value + "\n")
        run("mount", "--bind", shield, Path("/proc/sys") / sysctl)
