"""Finds the provider that a test or a person asked for by name."""

from __future__ import annotations

from pathlib import Path

from .kind import KindProvider
from .namespaces import NamespaceProvider
from .provider import Provider

PROVIDERS = ("namespaces", "kind")


def provider(kind: str, name: str, folder: Path | None = None) -> Provider:
    """A way to make the cluster ``name``; ``kind`` is one of :data:`PROVIDERS`."""
    if kind == "namespaces":
        return NamespaceProvider(name, folder)
    if kind == "kind":
        return KindProvider(name, folder)
    raise ValueError(f"expected one of {', '.join(PROVIDERS)}; found {kind!r}")
