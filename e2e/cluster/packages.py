"""The Debian packages that a node consists of, installed only where something is missing.

What is looked for are programs, not packages: a machine with another vendor's containerd keeps it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .commands import run
from .errors import ClusterError

PACKAGE_OF_PROGRAM = {
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "sysctl": "procps",
    "openssl": "openssl",
    "mount": "mount",
    "nsenter": "util-linux",
    "unshare": "util-linux",
}

CNI_PACKAGE = "containernetworking-plugins"
CNI_FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
_CNI_PLUGINS = ("bridge", "host-local", "loopback", "portmap")

_POLICY = Path("/usr/sbin/policy-rc.d")


def cni_folder() -> Path | None:
    """The folder that holds all the CNI plugins that a node uses, if there is one."""
    for folder in CNI_FOLDERS:
        if all((folder / plugin).exists() for plugin in _CNI_PLUGINS):
            return folder
    return None


def missing_packages() -> list[str]:
    missing = {package for program, package in PACKAGE_OF_PROGRAM.items() if shutil.which(program) is None}
    if cni_folder() is None:
        missing.add(CNI_PACKAGE)
    return sorted(missing)


def install(packages: list[str]) -> None:
    """Install Debian packages without starting the daemons that they bring."""
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise ClusterError(
            expected="the programs of " + ", ".join(packages),
            found="they are missing, and this is not a Debian machine",
            remedy="install them with the machine's own package manager",
        )
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120")
    run(*apt, "update", env=env, timeout_seconds=300)
    with _no_daemons_started():
        run(*apt, "install", "--yes", "--no-install-recommends", *packages, env=env, timeout_seconds=600)


@contextmanager
def _no_daemons_started() -> Iterator[None]:
    """Debian asks this script before a package may start its daemon; 101 means no."""
    if _POLICY.exists():
        yield
        return
    _POLICY.write_text("#!/bin/sh\nexit 101\n")
    _POLICY.chmod(0o755)
    try:
        yield
    finally:
        _POLICY.unlink()
