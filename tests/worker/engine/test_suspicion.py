"""The earliest place that has all it needs and does not move is the culprit, and nobody while anything moves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_api.engine_state import LossReason
from resilientllm_worker.engine.suspicion import Awaited, Facts, Suspicion, Waits, suspect, wait
from resilientllm_worker.protocol.messages import Progress, Stamp

STAMP = Stamp(1, 1)
PATIENCE = dict.fromkeys(Awaited, 0.8) | {Awaited.TURN: 2.0}
BEAT = 0.1


def at(
    sent: int = 5,
    received: int = 5,
    landed: int = 5,
    done: int = 5,
    answered: int = 5,
    command_bytes: int = 0,
    landed_bytes: int = 0,
    running: float = 0.0,
    is_stuck: bool = False,
    steps_done: int = 0,
) -> Facts:
    """A place at which all steps up to the fifth are done, unless told otherwise."""
    progress = Progress(STAMP, received, landed, done, command_bytes, landed_bytes)
    return Facts(sent, answered, progress, steps_done, running, is_stuck, witnessed=0.0)


def after(seconds: float, *places: Facts, before: Waits = ()) -> Suspicion | None:
    """What is suspected when nothing changes for so long, heartbeat by heartbeat."""
    waits, now = before, 0.0
    while True:
        seen = [replace(place, witnessed=now) for place in places]
        waits = wait(waits, seen)
        if now >= seconds:
            return suspect(waits, seen, PATIENCE)
        now += BEAT


def named(suspicion: Suspicion | None) -> tuple[int, LossReason] | None:
    return (suspicion.place, suspicion.reason) if suspicion is not None else None


CASES: dict[str, tuple[list[Facts], tuple[int, LossReason] | None]] = {
    "all is done": ([at(), at(), at()], None),
    "the middle one gets no commands": ([at(), at(received=3), at(landed=4)], (1, LossReason.UNREACHABLE)),
    "nothing comes over the first link": (
        [at(), at(landed=2, done=2), at(landed=2, done=2, answered=2)],
        (1, LossReason.NEIGHBOUR),
    ),
    "nothing comes over the second link": ([at(), at(), at(landed=4, done=4)], (2, LossReason.NEIGHBOUR)),
    "the first is within a step": (
        [at(done=4, running=0.7), at(landed=4, done=4), at(landed=4, done=4, answered=4)],
        None,
    ),
    "the middle one is stuck in a step, and the last starves": (
        [at(), at(done=3, running=5.0, is_stuck=True), at(landed=3, done=3, answered=3)],
        (1, LossReason.HANG),
    ),
    "the middle one does not take up what it has": (
        [at(), at(done=3), at(landed=3, done=3, answered=3)],
        (1, LossReason.HANG),
    ),
    "the last one's result does not come": ([at(), at(), at(answered=4)], (2, LossReason.UNREACHABLE)),
    "two at once: the earlier": ([at(received=4), at(), at(is_stuck=True, running=9.0)], (0, LossReason.UNREACHABLE)),
    "the last one is in a guest's step that is stuck": (
        [at(), at(), at(running=9.0, is_stuck=True)],
        (2, LossReason.HANG),
    ),
    "the first has said nothing yet": ([replace(at(), progress=None), at(landed=2, done=2)], None),
    "hidden states are here before the command": (
        [at(), at(received=4, landed=5, done=4, answered=4)],
        (1, LossReason.UNREACHABLE),
    ),
    "nothing was sent": ([at(-1, -1, -1, -1, -1), at(-1, -1, -1, -1, -1)], None),
}


@pytest.mark.parametrize("case", CASES)
def test_who_holds_up_the_pipeline(case: str) -> None:
    places, expected = CASES[case]
    assert named(after(3.0, *places)) == expected


@pytest.mark.parametrize("case", [name for name, (_, expected) in CASES.items() if expected is not None])
def test_nobody_is_suspected_at_once(case: str) -> None:
    places, _ = CASES[case]
    if not any(place.is_stuck for place in places):  # that is decided by the stage's own clock
        assert after(0.6, *places) is None


def test_a_slow_link_is_slow_and_a_cut_one_is_not() -> None:
    waits: Waits = ()
    for count in range(200):
        places = [at(), at(landed=4, landed_bytes=100 * count, done=4, answered=4)]
        places = [replace(place, witnessed=count * BEAT) for place in places]
        waits = wait(waits, places)
        assert suspect(waits, places, PATIENCE) is None
    assert named(after(1.0, *places)) == (1, LossReason.NEIGHBOUR)


def test_a_long_command_that_is_coming_in_is_not_lost() -> None:
    waits: Waits = ()
    for count in range(50):
        places = [replace(at(received=4, command_bytes=count), witnessed=count * BEAT), at(answered=4, landed=4)]
        waits = wait(waits, places)
        assert suspect(waits, places, PATIENCE) is None


def test_a_stage_that_does_the_other_tenants_steps_first_is_not_stuck() -> None:
    waits: Waits = ()
    for count in range(100):
        places = [replace(at(done=4, steps_done=count), witnessed=count * BEAT), at(landed=4, done=4, answered=4)]
        waits = wait(waits, places)
        assert suspect(waits, places, PATIENCE) is None


def test_a_stage_whose_heartbeats_do_not_come_cannot_be_blamed_for_what_they_said() -> None:
    """Its own time stands. Whether it is silent is another question."""
    waits: Waits = ()
    for _ in range(1000):
        places = [at(received=4), at(landed=4, done=4, answered=4)]
        waits = wait(waits, places)
        assert suspect(waits, places, PATIENCE) is None


@pytest.mark.parametrize("asleep", [0, 1])
def test_a_link_is_not_silent_while_one_of_its_ends_sleeps(asleep: int) -> None:
    waits: Waits = ()
    for count in range(100):
        places = [replace(place, witnessed=count * BEAT) for place in (at(), at(landed=4, done=4, answered=4))]
        places[asleep] = replace(places[asleep], witnessed=0.0)
        waits = wait(waits, places)
        assert suspect(waits, places, PATIENCE) is None


@dataclass
class Healthy:
    """A pipeline of stages that do what they should, some faster than others; nothing of it takes 0.7 s."""

    places: list[list[int]]
    """For each received, landed, done."""
    sent: int = -1
    answered: int = -1

    def move(self, place: int, what: int) -> None:
        received, landed, done = self.places[place]
        if what == 0:
            self.places[place][0] = min(received + 1, self.sent)
        elif what == 1 and place > 0:
            self.places[place][1] = min(landed + 1, self.places[place - 1][2])
        elif what == 2:
            self.places[place][2] = min(done + 1, received, landed if place else received)
        elif what == 3:
            self.answered = min(self.answered + 1, self.places[-1][2])

    def facts(self, now: float) -> list[Facts]:
        last = len(self.places) - 1
        return [
            replace(
                at(self.sent, received, landed, done, answered=self.answered if place == last else -1), witnessed=now
            )
            for place, (received, landed, done) in enumerate(self.places)
        ]


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_pipeline_in_which_everything_moves_in_time_is_never_suspected(stages: int, data: st.DataObject) -> None:
    """Whatever the order of events: each movement that is due happens within six heartbeats, and new steps are sent."""
    healthy = Healthy([[-1, -1, -1] for _ in range(stages)])
    waits: Waits = ()
    for turn in range(60):
        if data.draw(st.booleans()):
            healthy.sent += 1
        if turn % 6 == 0:
            for place in range(stages):
                for what in range(4):
                    healthy.move(place, what)
        else:
            healthy.move(data.draw(st.integers(0, stages - 1)), data.draw(st.integers(0, 3)))
        facts = healthy.facts(turn * BEAT)
        waits = wait(waits, facts)
        assert suspect(waits, facts, PATIENCE) is None


@settings(deadline=None)
@given(st.integers(1, 4), st.data())
def test_whatever_stops_for_good_is_found_and_nobody_else_is(stages: int, data: st.DataObject) -> None:
    broken = data.draw(st.integers(0, stages - 1))
    what = data.draw(st.sampled_from([0, 1, 2] if broken else [0, 2]))
    healthy = Healthy([[-1, -1, -1] for _ in range(stages)])
    waits: Waits = ()
    steps_before = data.draw(st.integers(0, 5))
    for turn in range(steps_before + 60):
        healthy.sent += turn < steps_before + 3
        for place in range(stages):
            for each in range(4):
                if turn < steps_before or (place, each) != (broken, what):
                    healthy.move(place, each)
        facts = healthy.facts(turn * BEAT)
        waits = wait(waits, facts)
        found = suspect(waits, facts, PATIENCE)
        if found is not None:
            assert found.place == broken
            expected = {0: LossReason.UNREACHABLE, 1: LossReason.NEIGHBOUR, 2: LossReason.HANG}
            assert found.reason is expected[what]
            assert turn <= steps_before + 3 + 21
            return
    raise AssertionError("it was never found")
