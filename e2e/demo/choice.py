"""Of what the demo's cluster is made, and of what the one is made that is already there."""

from __future__ import annotations

import shutil

from e2e.cluster.choose import provider
from e2e.cluster.errors import ClusterError
from e2e.cluster.kind import Docker
from e2e.cluster.layout import DEFAULT_ROOT
from e2e.cluster.provider import Provider

NAME = "demo"
"""Of the cluster."""

_FILE_OF_KIND = "mounts.json"
"""Only a cluster of kind keeps it in its folder."""


def usual() -> str:
    """kind where Docker works, as most people have it; else namespaces, which need root and nothing more."""
    if shutil.which("docker") is None:
        return "namespaces"
    try:
        Docker().run("info", "--format={{.ServerVersion}}")
    except ClusterError:
        return "namespaces"
    return "kind"


def present() -> Provider:
    """Who made the demo's cluster that is there, or what is left of one; if there is none, any will say so."""
    made_by_kind = (DEFAULT_ROOT / NAME / _FILE_OF_KIND).exists()
    return provider("kind" if made_by_kind else "namespaces", NAME)
