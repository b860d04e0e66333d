"""Which files of this machine the containers of thin images see, read-only, and how.

They are mounts of the container runtime's base spec, under every pod of a node. So pod specs need no
hostPath volume for them and can be the very manifests that run with real images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .commands import run
from .errors import ClusterError

# Programs and libraries, and the two caches without which the dynamic linker and `update-alternatives`
# programs do not find them.
_SYSTEM = (Path("/usr"), Path("/etc/ld.so.cache"), Path("/etc/alternatives"))


def default_mounts(repository: Path, venv: Path | None = None) -> tuple[Path, ...]:
    """The system's programs, the checkout, and the virtual environment with its Python (``.venv`` if any)."""
    chosen = venv or repository / ".venv"
    found = [repository, *(python_folders(chosen) if chosen.exists() else ())]
    return outermost([path for path in _SYSTEM if path.exists()] + found)


def python_folders(venv: Path) -> list[Path]:
    """A virtual environment and every folder that its interpreter really lives in."""
    python = venv / "bin" / "python"
    if not python.exists():
        raise ClusterError(expected=f"a virtual environment in {venv}", found=f"no {python}", remedy="make it: uv sync")
    base = Path(run(python, "-c", "import sys; print(sys.base_prefix)").strip())
    # The path may lead over a symlink (uv keeps one for each minor version), so both ends are needed.
    return [venv, base, base.resolve()]


def outermost(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The given paths without those that lie inside of another, which are seen through it already."""
    kept: list[Path] = []
    for path in paths:
        if path not in kept and not any(path != other and path.is_relative_to(other) for other in paths):
            kept.append(path)
    return tuple(kept)


def base_spec(runtime_default: dict[str, Any], mounts: Sequence[Path]) -> dict[str, Any]:
    """The OCI runtime spec that every container of a node starts from.

    ``runtime_default`` is what ``ctr oci spec`` prints.
    """
    spec = json.loads(json.dumps(runtime_default))
    # The default lowers the number of open files to 1024; a kubelet's containers inherit the machine's.
    spec["process"].pop("rlimits", None)
    for mount in mounts:
        spec["mounts"].append(
            {
                "destination": str(mount),
                "type": "bind",
                "source": str(mount),
                "options": ["rbind", "ro", "nosuid", "nodev"],
            }
        )
    checked: dict[str, Any] = spec
    return checked


def write_base_spec(file: Path, mounts: Sequence[Path]) -> None:
    for mount in mounts:
        if not mount.is_absolute() or not mount.exists():
            raise ClusterError(
                expected="absolute paths of existing files to show to containers",
                found=str(mount),
                remedy="correct the list of mounts",
            )
    file.write_text(json.dumps(base_spec(json.loads(run("ctr", "oci", "spec")), mounts), indent=2))
