"""Removing a cluster, and telling whether anything of it is left: all that a name and a folder suffice for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from . import cgroups, launch, network
from .layout import DEFAULT_ROOT, prefix_of


def remove(name: str, folder: Path) -> None:
    """Remove a cluster, or what is left of one: processes, then groups, then networks, then files."""
    prefix = prefix_of(name)
    cgroups.kill(prefix)
    launch.reap()
    cgroups.remove(prefix)
    for netns in network.namespaces(prefix):
        network.remove_netns(netns)
    if folder.exists():
        shutil.rmtree(folder)
    if folder.parent == DEFAULT_ROOT and DEFAULT_ROOT.exists() and not any(DEFAULT_ROOT.iterdir()):
        DEFAULT_ROOT.rmdir()


def left_behind(name: str, folder: Path) -> list[str]:
    """Everything of a cluster that exists on this machine, in words; empty when it is gone."""
    prefix = prefix_of(name)
    found = [f"process {pid}" for pid in cgroups.processes(prefix)]
    found += [f"control group {path}" for path in (h.path / prefix for h in cgroups.hierarchies()) if path.exists()]
    found += [f"network namespace {netns}" for netns in network.namespaces(prefix)]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    ours = re.compile(rf"/{re.escape(prefix)}\.|{re.escape(str(folder))}[/ ]")
    found += [f"mount {line.split()[4]}" for line in mounts if ours.search(line)]
    if folder.exists():
        found.append(f"folder {folder}")
    return found
