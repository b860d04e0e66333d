"""What survived a full collection is not looked at by the next one, and is not forgotten either."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
from resilientllm_operator.garbage import EVERYTHING_SECONDS, set_aside_what_survives


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    take_back = set_aside_what_survives(clock)
    yield clock
    take_back()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_a_full_collection_looks_only_at_what_is_new(clock: Clock) -> None:
    assert len(gc.get_objects()) < gc.get_freeze_count()
    new = Cycle()
    assert any(each is new for each in gc.get_objects())
    gc.collect()
    assert not any(each is new for each in gc.get_objects())


def test_other_collections_set_nothing_aside(clock: Clock) -> None:
    new = Cycle()
    gc.collect(1)
    assert any(each is new for each in gc.get_objects())


def test_cycles_that_come_and_go_are_freed(clock: Clock) -> None:
    gone = weakref.ref(Cycle())
    assert gone() is not None
    gc.collect()
    assert gone() is None


def test_what_was_set_aside_is_freed_by_its_reference_count(clock: Clock) -> None:
    class Plain:
        pass

    plain = Plain()
    gc.collect()
    gone = weakref.ref(plain)
    del plain
    assert gone() is None


def test_a_cycle_that_was_set_aside_is_freed_when_everything_is_looked_at(clock: Clock) -> None:
    cycle = Cycle()
    gc.collect()
    gone = weakref.ref(cycle)
    del cycle
    clock.now += EVERYTHING_SECONDS - 1
    gc.collect()
    assert gone() is not None
    clock.now += 1
    gc.collect()
    assert gone() is None
    assert len(gc.get_objects()) < gc.get_freeze_count(), "and then only what is new again"


def test_it_can_be_taken_back() -> None:
    before = len(gc.callbacks)
    set_aside_what_survives()()
    assert (len(gc.callbacks), gc.get_freeze_count()) == (before, 0)
