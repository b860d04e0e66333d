"""What counts as a step's time."""

from resilientllm_worker.stage.step_clock import StepClock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_there_is_nothing_to_read_without_a_step() -> None:
    clock = StepClock(Time())
    assert clock.read() == (0.0, 0.0)
    assert clock.end() == 0.0
    with clock.standing():
        assert clock.read() == (0.0, 0.0)


def test_a_step_is_timed_from_its_begin_to_its_end() -> None:
    clock = StepClock(time := Time())
    clock.begin(2.0)
    time.now += 1.5
    assert clock.read() == (1.5, 2.0)
    assert clock.end() == 1.5
    assert clock.read() == (0.0, 0.0)


def test_it_stands_while_the_runner_waits_for_a_link_and_goes_on_then() -> None:
    clock = StepClock(time := Time())
    clock.begin(2.0)
    time.now += 1.0
    for _ in range(2):
        with clock.standing():
            time.now += 30.0
            assert clock.read()[0] == clock.read()[0] > 0
        time.now += 0.25
    assert clock.read() == (1.5, 2.0)
    assert clock.end() == 1.5
