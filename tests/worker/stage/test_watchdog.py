"""A stage that is stuck for good ends itself; one that is slow, or was stopped for a while, does not."""

from resilientllm_worker.stage.watchdog import LOOKS, OVERDUE, Watchdog

ALLOWED = 2.0


def bites(*looks: tuple[int, float]) -> list[bool]:
    """For each look, which sees the number of steps done, and how long the one at hand has been running."""
    watchdog = Watchdog()
    return [watchdog.bites(steps_done, seconds, ALLOWED if seconds else 0.0) for steps_done, seconds in looks]


def test_it_bites_when_the_same_step_is_far_overdue_again_and_again() -> None:
    overdue = [(7, OVERDUE * ALLOWED + 0.1 + look) for look in range(LOOKS)]
    assert bites(*overdue) == [False] * (LOOKS - 1) + [True]


def test_a_step_that_is_only_overdue_may_still_end() -> None:
    assert not any(bites(*[(7, OVERDUE * ALLOWED)] * 20))


def test_a_process_that_was_stopped_within_a_step_goes_on() -> None:
    assert not any(bites((7, 0.1), (7, 3600.0), (7, 3600.5), (8, 0.0), (8, 0.1)))


def test_an_idle_stage_is_left_alone() -> None:
    assert not any(bites(*[(7, 0.0)] * 20))


def test_long_steps_one_after_the_other_are_not_one_that_is_stuck() -> None:
    assert not any(bites(*[(number, 7.0) for number in range(20)]))
