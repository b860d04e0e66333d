"""When a process that ended is started again. Pure, so that the rule is a table in a test."""

from __future__ import annotations

from dataclasses import dataclass, replace

BAD_CONFIGURATION = 2
"""The exit code by which stages and engines say that a restart does not help."""


@dataclass(frozen=True)
class Policy:
    """A kubelet's crash back-off, with shorter times: it doubles, is capped, and is forgotten after a good run."""

    first_delay_seconds: float = 0.1
    second_delay_seconds: float = 1.0
    longest_delay_seconds: float = 10.0
    good_run_seconds: float = 5.0
    """A run that was useful for so long was no crash loop: the next delay is ``first_delay_seconds`` again."""


@dataclass(frozen=True)
class History:
    """What the rule remembers of one process."""

    restarts: int = 0
    crashes_in_a_row: int = 0


@dataclass(frozen=True)
class Ended:
    """How one run ended. ``exit_code`` is negative for a signal, as in ``subprocess``."""

    exit_code: int
    useful_seconds: float | None
    """How long it did what it is for (its imports do not count); None if it never came so far."""


@dataclass(frozen=True)
class RestartAfter:
    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """Refused before it was ever of use: nobody is served yet, so a plain error now beats a crash loop."""


def after_exit(history: History, ended: Ended, policy: Policy) -> tuple[History, RestartAfter | GiveUp]:
    if ended.exit_code == BAD_CONFIGURATION and history.restarts == 0 and ended.useful_seconds is None:
        return history, GiveUp()
    good_run = ended.useful_seconds is not None and ended.useful_seconds >= policy.good_run_seconds
    crashes = 1 if good_run else history.crashes_in_a_row + 1
    return (
        replace(history, restarts=history.restarts + 1, crashes_in_a_row=crashes),
        RestartAfter(_delay_seconds(crashes, policy)),
    )


def _delay_seconds(crashes_in_a_row: int, policy: Policy) -> float:
    if crashes_in_a_row == 1:
        return policy.first_delay_seconds
    return min(policy.second_delay_seconds * 2.0 ** (crashes_in_a_row - 2), policy.longest_delay_seconds)
