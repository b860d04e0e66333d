"""What came of the demo: a verdict that can fail, and the figures of ``build/demo.json``. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from resilientllm_api.crd import RecoveryStatus
from resilientllm_cli.comparison import Tokens, compare, stall_seconds, total
from resilientllm_cli.streams import Sampling, Stream

_PHASES = ("fence", "wait", "stitch", "rollBack", "resume", "total")
"""Those of :class:`resilientllm_api.engine_state.Recovery`."""


@dataclass(frozen=True)
class Kill:
    """What was killed, and when, by both clocks of this machine."""

    instance: int
    stage: int
    pod: str
    running: dict[int, int]
    """Requests that each instance was serving just before."""
    at: datetime
    at_monotonic_seconds: float


@dataclass(frozen=True)
class Outcome:
    """All that was measured."""

    sampling: Sampling
    reference: Sequence[Stream]
    delivered: Sequence[Stream]
    kill: Kill
    recovery: RecoveryStatus | None
    provider: str
    nodes: int
    ready_seconds: float
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    events: Sequence[str] = ()

    @property
    def tokens(self) -> list[Tokens]:
        """By stream."""
        return [
            compare(expected.tokens, stream.tokens)
            for expected, stream in zip(self.reference, self.delivered, strict=True)
        ]

    @property
    def stalls_seconds(self) -> list[float | None]:
        """By stream: what the kill added to its largest gap; None for a stream that was over before."""
        return [_stall(stream, self.kill.at_monotonic_seconds) for stream in self.delivered]


def problems(outcome: Outcome) -> Iterator[str]:
    """Why the demo has failed, in words; nothing if it has not."""
    for stream in outcome.reference:
        if len(stream.tokens) != outcome.sampling.max_tokens or not stream.complete:
            yield f"undisturbed stream {stream.index}: {_short_of(stream, outcome.sampling)}"
    for stream, tokens in zip(outcome.delivered, outcome.tokens, strict=True):
        if not stream.complete:
            yield f"stream {stream.index}: {_short_of(stream, outcome.sampling)}"
        if not tokens.unharmed:
            yield (
                f"stream {stream.index} differs from the undisturbed one from token "
                f"{_first_difference(outcome.reference[stream.index], stream)} on: {tokens.lost} lost, "
                f"{tokens.duplicated} duplicated, {tokens.changed} changed"
            )
    if all(stall is None for stall in outcome.stalls_seconds):
        yield "every stream was over before the kill, so it proves nothing: make them longer (--tokens)"
    yield from _problems_of_recovery(outcome.kill, outcome.recovery)


def _problems_of_recovery(kill: Kill, recovery: RecoveryStatus | None) -> Iterator[str]:
    if recovery is None or recovery.detected_at < kill.at:
        yield "the status tells of no recovery after the kill"
        return
    if recovery.instance != kill.instance or kill.stage not in recovery.stages:
        places = ", ".join(f"{recovery.instance}.{stage}" for stage in recovery.stages)
        yield f"stage {kill.instance}.{kill.stage} was killed, but the status tells of a recovery of {places}"
    if recovery.requests_affected == 0:
        yield "the kill met no running request, so it proves nothing"
    if recovery.restored_at is None:
        yield "the killed stage was not swapped back into its place"


def document(outcome: Outcome) -> dict[str, Any]:
    """``build/demo.json``. Seconds and milliseconds are in the names of the fields."""
    tokens, stalls = outcome.tokens, outcome.stalls_seconds
    return {
        "streams": len(outcome.delivered),
        "tokens": asdict(total(tokens)),
        "stall_seconds_max": max((stall for stall in stalls if stall is not None), default=None),
        "ready_seconds": outcome.ready_seconds,
        "recovery": _recovery(outcome.kill, outcome.recovery),
        "cluster": {"provider": outcome.provider, "nodes": outcome.nodes},
        "ok": not list(problems(outcome)),
        "problems": list(problems(outcome)),
        "killed": {
            "instance": outcome.kill.instance,
            "stage": outcome.kill.stage,
            "pod": outcome.kill.pod,
            "at": outcome.kill.at.isoformat(),
            "requests_running": {str(instance): count for instance, count in outcome.kill.running.items()},
        },
        "step_seconds": dict(outcome.step_seconds),
        "events": list(outcome.events),
        "per_stream": [
            {
                "stream": stream.index,
                "stall_seconds": stall,
                "error": stream.error,
                **asdict(each),
                "difference": _difference(outcome, stream),
            }
            for stream, each, stall in zip(outcome.delivered, tokens, stalls, strict=True)
        ],
    }


def _difference(outcome: Outcome, stream: Stream) -> dict[str, Any] | None:
    """Where and when a stream left the path of the undisturbed one: the first question of whoever looks for why."""
    expected = outcome.reference[stream.index]
    if stream.tokens == expected.tokens:
        return None
    token = _first_difference(expected, stream)
    arrived = stream.arrivals_seconds[token] if token < len(stream.tokens) else None
    after_kill = None if arrived is None else arrived - outcome.kill.at_monotonic_seconds
    return {"token": token, "seconds_after_kill": after_kill}


def detection_ms(kill: Kill, recovery: RecoveryStatus) -> float:
    """From the kill until the engine knew: both are read from the clock of one machine."""
    return (recovery.detected_at.astimezone(UTC) - kill.at).total_seconds() * 1000


def phases_in_order(recovery: RecoveryStatus) -> dict[str, float]:
    """As they followed each other: the API server sorts them by name. A phase that is not known here comes last."""
    places = {phase: place for place, phase in enumerate(_PHASES)}
    return dict(sorted(recovery.phases.items(), key=lambda each: places.get(each[0], len(_PHASES))))


def _recovery(kill: Kill, recovery: RecoveryStatus | None) -> dict[str, Any] | None:
    if recovery is None:
        return None
    return {
        "kind": str(recovery.kind),
        "reason": recovery.reason,
        "instance": recovery.instance,
        "stages": list(recovery.stages),
        "donor": recovery.donor,
        "detection_ms": detection_ms(kill, recovery),
        "phases_ms": phases_in_order(recovery),
        "requests": recovery.requests_affected,
        "tokens_recomputed": recovery.tokens_recomputed,
        "tokens_kept": recovery.tokens_kept,
        "restored_after_seconds": (recovery.restored_at - kill.at).total_seconds() if recovery.restored_at else None,
    }


def _stall(stream: Stream, since_seconds: float) -> float | None:
    try:
        return stall_seconds(stream.arrivals_seconds, since_seconds)
    except ValueError:
        return None


def _short_of(stream: Stream, sampling: Sampling) -> str:
    why = stream.error or f"finish reason {stream.finish_reason}"
    return f"{len(stream.tokens)} of {sampling.max_tokens} tokens came ({why})"


def _first_difference(expected: Stream, delivered: Stream) -> int:
    pairs = zip(expected.tokens, delivered.tokens, strict=False)
    shorter = min(len(expected.tokens), len(delivered.tokens))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), shorter)
