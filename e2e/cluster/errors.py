"""What goes wrong with a cluster, said so that a person can act on it."""

from __future__ import annotations


class ClusterError(Exception):
    """Something about the machine or the cluster is not as it must be.

    Every message has the same three parts, so that a failed run in a log explains itself.
    """

    def __init__(self, *, expected: str, found: str, remedy: str) -> None:
        super().__init__(f"expected {expected}; found {found}; {remedy}")
        self.expected = expected
        self.found = found
        self.remedy = remedy


class CommandFailed(ClusterError):
    """An external command ended with an error."""
