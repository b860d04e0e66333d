"""What can go wrong where vLLM's objects meet our wire."""

from __future__ import annotations


class Unsupported(Exception):
    """vLLM wants to say something that our wire cannot carry. Refused, because a dropped field is a wrong answer."""


class Malformed(ValueError):
    """What came over the wire is no valid encoding, or not one for the installed vLLM."""
