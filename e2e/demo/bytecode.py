"""Compiles the environment ahead: containers see it read-only, and would compile all they import at every start."""

from __future__ import annotations

import compileall
import sysconfig
from pathlib import Path

_TELLING = ("torch", "transformers", "vllm")
"""Packages that make the start slow."""


def is_compiled(packages: Path) -> bool:
    return all((packages / name / "__pycache__").exists() for name in _TELLING)


def packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def compile_all(folder: Path) -> None:
    """Minutes. A file that does not compile, such as a template, is passed over as its installer would."""
    compileall.compile_dir(folder, quiet=2, workers=0)
