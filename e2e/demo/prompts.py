"""What the demo asks the model. The tiny model knows no words, so any text does; each must be its own."""

from __future__ import annotations

_SUBJECTS = (
    "The engine knows its requests",
    "A stage knows its weights",
    "A donor stands in for a lost stage",
    "An epoch fences what is old",
    "The client sees a pause",
    "A plan names donors in order",
    "Two copies never share a node",
    "The stream goes on where it stopped",
)


def prompts(count: int) -> list[str]:
    """Of some blocks of KV cache each, so that a recovery has something to compute again."""
    return [f"{number}. {_SUBJECTS[number % len(_SUBJECTS)]}, number {number}. " * 3 for number in range(count)]
