"""What clients noticed of a fault: their streams against the same streams undisturbed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from resilientllm_cli.comparison import Tokens, compare, total
from resilientllm_cli.streams import SEND_AGAIN

from e2e.scenarios.load import Sent

Reference = Mapping[int, Sequence[int]]
"""The tokens of each prompt, undisturbed."""


@dataclass(frozen=True)
class Verdict:
    streams: int
    met: int
    """Streams that ran when the fault came."""
    without_token: int
    """Of those: still without one."""
    failed_explicitly: int
    """With the error that says to send the request again."""
    failed_otherwise: int
    tokens: Tokens
    problems: tuple[str, ...]
    """One for each stream that did not end as it should, or differs."""
    worst_stall_seconds: float
    """The longest that a client waited for a token, its first one included, after the fault."""
    stalls_seconds: tuple[float, ...]
    """The same, of each stream that the fault met."""

    early: tuple[str, ...] = ()
    """Problems of streams that were over before the fault, and that are counted nowhere else."""

    @property
    def unharmed(self) -> bool:
        return not self.problems


def judge(sent: Iterable[Sent], reference: Reference, fault_seconds: float) -> Verdict:
    """``fault_seconds``: of ``time.monotonic``. Streams that were over before say nothing of it, and are left out."""
    sent = list(sent)
    early = [each for each in sent if each.ended_seconds is not None and each.ended_seconds <= fault_seconds]
    streams = [each for each in sent if each.ended_seconds is None or each.ended_seconds > fault_seconds]
    compared = {id(each): compare(reference[each.stream.index], each.stream.tokens) for each in sent}

    def told(these: Iterable[Sent]) -> tuple[str, ...]:
        return tuple(
            f"{each.target}, round {each.round}, prompt {each.stream.index}: {words}"
            for each in these
            if (words := _problem(each, compared[id(each)]))
        )

    met = [each for each in streams if each.asked_seconds < fault_seconds]
    errors = [each.stream.error for each in streams if each.stream.error is not None]
    explicit = sum(SEND_AGAIN in error for error in errors)
    return Verdict(
        streams=len(streams),
        met=len(met),
        without_token=sum(not each.stream.tokens or each.stream.arrivals_seconds[0] > fault_seconds for each in met),
        failed_explicitly=explicit,
        failed_otherwise=len(errors) - explicit,
        tokens=total(compared[id(each)] for each in streams),
        problems=told(streams),
        worst_stall_seconds=stall_between(streams, fault_seconds, float("inf")),
        stalls_seconds=tuple(round(stall_between([each], fault_seconds, float("inf")), 4) for each in met),
        early=told(early),
    )


def stall_between(sent: Iterable[Sent], start_seconds: float, end_seconds: float) -> float:
    """The longest wait for a token that lies, at least in part, between the two moments."""
    waits = (wait for each in sent for wait in _waits(each))
    return max(
        (later - earlier for earlier, later in waits if later > start_seconds and earlier < end_seconds), default=0.0
    )


def _waits(sent: Sent) -> Iterable[tuple[float, float]]:
    return pairwise([sent.asked_seconds, *sent.stream.arrivals_seconds])


def _problem(sent: Sent, tokens: Tokens) -> str:
    if sent.stream.error is not None:
        return f"broke after {tokens.delivered} tokens: {sent.stream.error}"
    if not sent.over:
        return f"did not end: {tokens.delivered} tokens"
    if not tokens.unharmed:
        return f"{tokens.lost} lost, {tokens.duplicated} duplicated, {tokens.changed} changed"
    return ""
