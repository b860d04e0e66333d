"""The one error that a user can mend: a wrong argument or a wrong surrounding."""

from __future__ import annotations


class UsageError(Exception):
    """Ends the command with one line on stderr and exit code 2: what was expected, what was found, what to do."""
