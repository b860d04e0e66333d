"""Prometheus' own programs: those on PATH, or Debian's, unpacked beside the cluster's and not installed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from e2e.cluster.build import cache_root, cached
from e2e.cluster.commands import run
from e2e.cluster.errors import CommandFailed

PACKAGE = "prometheus"


def program(name: str) -> Path:
    """``prometheus`` or ``promtool``. The first time on a machine without them takes a download of 20 MB."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    home = cache_root() / "prometheus-debian"
    if not home.exists():
        cached(home, _unpack)
    return home / "usr" / "bin" / name


def _unpack(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        # As root, apt would rather download as a user who may not write there.
        fetch = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", PACKAGE)
        try:
            run(*fetch, cwd=Path(download), timeout_seconds=300)
        except CommandFailed:  # a fresh machine, whose apt has never looked at what there is
            run("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "update", timeout_seconds=300)
            run(*fetch, cwd=Path(download), timeout_seconds=300)
        (package,) = Path(download).glob("*.deb")
        run("nice", "dpkg-deb", "--extract", str(package), str(folder), timeout_seconds=300)
