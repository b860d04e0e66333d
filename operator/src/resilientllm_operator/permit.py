"""Whether this replica may change anything now. Asked before every single action, not once a round."""

from __future__ import annotations

from collections.abc import Callable

Permit = Callable[[], str | None]
"""Says why nothing may be done at this moment; None if it may."""


class NotPermitted(Exception):
    """An action was not done: this replica has lost the lease, or its view of the cluster is too old."""
