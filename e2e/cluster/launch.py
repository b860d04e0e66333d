"""Starting long-lived processes inside a control group and a network namespace of the cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cgroups

REPOSITORY = Path(__file__).resolve().parents[2]

# Waits until we have moved it, so that nothing it starts can be outside of the control group. If we
# die first, `read` meets the end of the file and nothing is started at all.
_WAIT_FOR_GO = 'read -r go && exec "$@" </dev/null'

_children: list[subprocess.Popen[bytes]] = []


def environment() -> dict[str, str]:
    """What our own helpers run with: nothing of the user's shell may change a cluster."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/nonexistent",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def module(name: str, *arguments: str | Path) -> list[str]:
    """The command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", f"e2e.cluster.{name}", *(str(argument) for argument in arguments)]


def spawn(
    command: Sequence[str],
    *,
    group: str | None,
    log: Path,
    netns: Path | None = None,
    keep_open: Sequence[int] = (),
) -> int:
    """Start a detached process; its pid. It and all its children belong to ``group``, if one is given."""
    inside = ["nsenter", f"--net={netns}", *command] if netns else list(command)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            ["sh", "-c", _WAIT_FOR_GO, "sh", *inside],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd="/",
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )
    _children.append(child)
    assert child.stdin is not None
    with child.stdin as go:
        if group is not None:
            cgroups.enter(cgroups.create(group), child.pid)
        go.write(b"go\n")
    return child.pid


def spawn_machine(command: Sequence[str], *, group: str, netns: Path, log: Path) -> int:
    """Start ``command`` as pid 1 of a machine: own pid, mount, cgroup, host name and IPC namespaces."""
    unshare = ["unshare", "--cgroup", "--pid", "--fork", "--kill-child=KILL", "--mount", "--uts", "--ipc"]
    return spawn([*unshare, *command], group=group, netns=netns, log=log)


def reap() -> None:
    """Collect the exit status of ended children, so that they do not stay behind as zombies."""
    _children[:] = [child for child in _children if child.poll() is None]
