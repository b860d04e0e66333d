"""runc for a root that lacks capabilities: it takes them out of what a container is to be given.

A privileged container is given all capabilities, and runc fails when it cannot give one. The rest of
the machine's meaning of "privileged" stays. Usage: as runc.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PERHAPS_LACKING = {"CAP_SYS_RESOURCE": 24}
"""Capabilities, by their numbers in the kernel, that root lacks on machines that we know of."""


def lacking(bounding_set: int) -> set[str]:
    """Names of the capabilities that are not in a bit set of the kernel."""
    return {name for name, number in _PERHAPS_LACKING.items() if not bounding_set >> number & 1}


def without(process: dict[str, Any], lacking: set[str]) -> dict[str, Any]:
    """An OCI process that asks for none of these capabilities."""
    wanted = process.get("capabilities") or {}
    kept = {kind: [name for name in names or [] if name not in lacking] for kind, names in wanted.items()}
    return {**process, "capabilities": kept} if wanted else process


def option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of a command-line option, in either of the two ways to write it."""
    for position, argument in enumerate(arguments):
        if argument in names and position + 1 < len(arguments):
            return arguments[position + 1]
        for name in names:
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
    return None


def main() -> None:
    arguments = sys.argv[1:]
    missing = lacking(_bounding_set(Path("/proc/self/status").read_text()))
    if "create" in arguments or "run" in arguments:
        file = Path(option(arguments, "--bundle", "-b") or ".") / "config.json"
        spec = json.loads(file.read_text())
        file.write_text(json.dumps({**spec, "process": without(spec["process"], missing)}))
    elif "exec" in arguments and (given := option(arguments, "--process", "-p")):
        file = Path(given)
        file.write_text(json.dumps(without(json.loads(file.read_text()), missing)))
    runc = shutil.which("runc") or "/usr/sbin/runc"
    os.execv(runc, ["runc", *arguments])


def _bounding_set(status: str) -> int:
    for line in status.splitlines():
        if line.startswith("CapBnd:"):
            return int(line.split()[1], 16)
    raise ValueError("expected a line CapBnd in /proc/self/status; found none; this is not a Linux kernel")


if __name__ == "__main__":
    main()
