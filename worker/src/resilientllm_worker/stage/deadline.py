"""How long a step may be in the runner before the stage counts as stuck: learnt from the steps that it has done. Pure.

A step's size is its tokens, each weighed by the context that it attends to, in powers of two. What is known of a size
is an upper envelope of how long such steps took: it rises with them, and sinks slowly. A step may take a multiple of
that. So no step that is long for an honest reason is suspected, however slow the machine, and a stuck one is soon.

    allowed = max(floor, 8 × envelope of all sizes up to this one)

The first steps of all may compile, tune or capture something, which takes as long as it takes: they may take
`UNKNOWN_SECONDS`. The first of another size may still tune something, and may take `UNFAMILIAR_SECONDS`, or more where
smaller ones make that plausible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from resilientllm_worker.protocol.messages import Step

FLOOR_SECONDS = 2.0
"""Where an engine says nothing else."""
UNKNOWN_SECONDS = 60.0
UNFAMILIAR_SECONDS = 10.0
SLACK = 8.0
FEW = 3
"""Steps of a size that must have been seen: the middle one of their times is the first envelope, so that one which
compiled does not count."""
SINKS = 0.98
"""Of the envelope with every step: half of it is forgotten in 34."""
RISES = 2.0
"""One step raises the envelope at most so much: a process that was stopped within a step has learnt nothing."""
GROWTH = 1.5
"""A size that was never seen may take so many powers of its ratio to the next smaller one: attention is quadratic."""
CONTEXT_TOKENS = 4096
"""A token that attends to so many others is worth two that attend to none. Rough, as powers of two are."""


def size_class(step: Step) -> int:
    """The power of two that is at least the step's tokens, weighed by their contexts."""
    contexts = {new.request: new.num_computed_tokens for new in step.new}
    contexts.update(zip(step.cached.requests, step.cached.num_computed_tokens, strict=False))
    weight = sum(
        tokens * (1.0 + contexts.get(request, 0) / CONTEXT_TOKENS) for request, tokens in step.num_scheduled_tokens
    )
    return max(0, int(weight) - 1).bit_length()


@dataclass
class _Size:
    first: list[float] = field(default_factory=list)
    """The first `FEW` durations."""
    envelope: float | None = None


@dataclass
class Deadlines:
    """Of one stage. All times in seconds."""

    floor: float = FLOOR_SECONDS
    _sizes: dict[int, _Size] = field(default_factory=dict)

    def allowed(self, size: int) -> float:
        known = {each: of.envelope for each, of in self._sizes.items() if of.envelope is not None}
        if not known:
            return max(self.floor, UNKNOWN_SECONDS)
        smaller = {each: envelope for each, envelope in known.items() if each <= size}
        if size in known:
            return max(self.floor, SLACK * max(smaller.values()))
        if not smaller:
            return max(self.floor, UNFAMILIAR_SECONDS)
        growth = 2.0 ** (GROWTH * (size - max(smaller)))
        return max(self.floor, UNFAMILIAR_SECONDS, SLACK * growth * max(smaller.values()))

    def observe(self, size: int, seconds: float) -> None:
        """A step of this size is done."""
        of = self._sizes.setdefault(size, _Size())
        if of.envelope is None:
            of.first.append(seconds)
            if len(of.first) == FEW:
                of.envelope = sorted(of.first)[FEW // 2]
            return
        most = RISES * max(of.envelope, self.floor / SLACK)
        of.envelope = max(min(seconds, most), SINKS * of.envelope)
