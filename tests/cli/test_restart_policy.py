"""When a process that ended is started again."""

from __future__ import annotations

import pytest
from resilientllm_cli.supervise.restart_policy import Ended, GiveUp, History, Policy, RestartAfter, after_exit

POLICY = Policy(first_delay_seconds=0.1, second_delay_seconds=1.0, longest_delay_seconds=10.0, good_run_seconds=5.0)
KILLED, CRASHED, BAD_CONFIGURATION, FINISHED = -9, 1, 2, 0


def delays(*runs: Ended) -> list[float | None]:
    """The delay after each of these runs of one process; None where it is given up."""
    history, found = History(), list[float | None]()
    for run in runs:
        history, action = after_exit(history, run, POLICY)
        found.append(action.delay_seconds if isinstance(action, RestartAfter) else None)
    return found


@pytest.mark.parametrize("exit_code", [KILLED, CRASHED, FINISHED])
def test_whatever_ends_is_started_again(exit_code: int) -> None:
    assert delays(Ended(exit_code, useful_seconds=60)) == [0.1]


def test_a_crash_loop_is_slowed_down_up_to_a_limit() -> None:
    assert delays(*[Ended(CRASHED, useful_seconds=None)] * 7) == [0.1, 1, 2, 4, 8, 10, 10]


def test_a_short_good_moment_does_not_end_a_crash_loop() -> None:
    assert delays(*[Ended(CRASHED, useful_seconds=1)] * 3) == [0.1, 1, 2]


def test_a_good_run_ends_a_crash_loop() -> None:
    crash, good = Ended(CRASHED, useful_seconds=None), Ended(KILLED, useful_seconds=5)
    assert delays(crash, crash, crash, good, crash) == [0.1, 1, 2, 0.1, 1]


def test_bad_configuration_at_the_first_start_is_given_up() -> None:
    assert after_exit(History(), Ended(BAD_CONFIGURATION, useful_seconds=None), POLICY) == (History(), GiveUp())


def test_bad_configuration_later_is_a_crash_like_any_other() -> None:
    assert delays(Ended(BAD_CONFIGURATION, useful_seconds=30)) == [0.1]
    assert delays(Ended(CRASHED, useful_seconds=None), Ended(BAD_CONFIGURATION, useful_seconds=None)) == [0.1, 1]
