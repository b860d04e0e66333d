"""Steps of home and guest that are at hand together run in one forward, and neither can tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from resilientllm_worker.protocol.messages import NewRequest, Stamp, StepFailed, StepResult
from resilientllm_worker.stage import step_loop
from resilientllm_worker.stage.merge import Room

from tests.worker.stage.builders import (
    GUEST,
    HOME,
    HOME_BLOCKS,
    MALFORMED,
    NEVER_SECONDS,
    PATIENCE_SECONDS,
    POOL_BLOCKS,
    Engine,
    Neighbour,
    Stage,
    closing,
)

FIRST, LAST = 0, 1


@contextmanager
def both_served(stage: Stage, home_next: str | None = None, guest_next: str | None = None) -> Iterator[list[Engine]]:
    engines = [Engine(stage.address, HOME), Engine(stage.address, GUEST)]
    with closing(*engines):
        for engine, following in zip(engines, (home_next, guest_next), strict=True):
            engine.stitch(epoch=1, following=following)
        yield engines


@contextmanager
def while_the_runner_is_busy(stage: Stage, home: Engine, guest: Engine) -> Iterator[None]:
    """With a step 0 of home. What is sent within is at hand when that is done; the guest, who has waited, is first."""
    stage.model.go.clear()
    home.step(0, epoch=1, request="before")
    assert stage.model.within.wait(PATIENCE_SECONDS)
    yield
    for engine in (home, guest):
        engine.ask_stitch(epoch=0)  # refused, but its answer says that the steps before it have been read
    stage.model.within.clear()
    stage.model.go.set()


def forwards(stage: Stage) -> tuple[int, int]:
    """How many the runner has done, and how many of them were both tenants' at once."""
    return stage.server.counts["steps"], stage.server.counts["merged"]


def fresh(**lengths: int) -> dict[str, Any]:
    """The parts of a step of new requests with so many tokens each; a block for each, from 1."""
    return {
        "new": [
            NewRequest(request, [1] * tokens, None, b"", ([block],), 0)
            for block, (request, tokens) in enumerate(lengths.items(), start=1)
        ],
        "num_scheduled_tokens": list(lengths.items()),
    }


def test_steps_that_are_both_at_hand_are_one_forward_and_each_engine_gets_its_own_result() -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        with while_the_runner_is_busy(stage, home, guest):
            home.step(1, epoch=1, **fresh(a=3, b=1))
            guest.step(0, epoch=1, **fresh(a=2))
        assert home.expect(StepResult).requests == ["before"]
        mine, theirs = home.expect(StepResult), guest.expect(StepResult)
        assert len(stage.model.steps) == 2
        assert forwards(stage) == (2, 1)
    assert (mine.stamp, mine.step, mine.requests, mine.sampled_token_ids) == (Stamp(1, 1), 1, ["a", "b"], [[3], [1]])
    assert (theirs.stamp, theirs.step, theirs.requests, theirs.sampled_token_ids) == (Stamp(1, 1), 0, ["a"], [[2]])
    together = {request.request: request.block_ids[0][0] for request in stage.model.steps[1].new}
    assert together.keys() == {"0/a", "0/b", "1/a"}
    assert (together["0/a"], together["0/b"]) == (1, 2)
    assert HOME_BLOCKS <= together["1/a"] < HOME_BLOCKS + POOL_BLOCKS


def test_one_step_of_each_is_merged_and_not_more() -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        with while_the_runner_is_busy(stage, home, guest):
            for number in (1, 2, 3):
                home.step(number, epoch=1)
            for number in (0, 1):
                guest.step(number, epoch=1)
        assert [home.expect(StepResult).step for _ in range(4)] == [0, 1, 2, 3]
        assert [guest.expect(StepResult).step for _ in range(2)] == [0, 1]
    assert [len(step.new) for step in stage.model.steps] == [1, 2, 2, 1]


def test_a_step_that_is_alone_is_not_kept_waiting() -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        for number in range(3):
            home.step(number, epoch=1)
            assert home.expect(StepResult).step == number
        assert guest.heard_nothing
        assert forwards(stage) == (3, 0)


class TestWaitingForCompany:
    """After a merged forward the next steps of both come back close together, so the first waits for the second."""

    @pytest.fixture(autouse=True)
    def for_as_long_as_it_takes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(step_loop, "COMPANY_FRACTION", 1e12)
        monkeypatch.setattr(step_loop, "LONGEST_COMPANY_SECONDS", NEVER_SECONDS)

    @contextmanager
    def after_a_merged_forward(self) -> Iterator[tuple[Stage, Engine, Engine]]:
        with Stage(FIRST) as stage, both_served(stage) as (home, guest):
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1)
                guest.step(0, epoch=1)
            assert [home.expect(StepResult).step for _ in range(2)] == [0, 1]
            guest.expect(StepResult)
            yield stage, home, guest

    def test_the_next_steps_are_merged_though_one_was_at_hand_before(self) -> None:
        with self.after_a_merged_forward() as (stage, home, guest):
            home.step(2, epoch=1)
            home.ask_stitch(epoch=0)
            guest.step(1, epoch=1)
            assert home.expect(StepResult).step == 2
            assert guest.expect(StepResult).step == 1
            assert forwards(stage) == (3, 2)

    def test_what_else_is_to_be_done_ends_the_wait(self) -> None:
        with self.after_a_merged_forward() as (stage, home, guest):
            home.step(2, epoch=1)
            home.ask_stitch(epoch=0)
            guest.fence(epoch=2)  # what this leaves to be done is done between steps
            assert home.expect(StepResult).step == 2
            home.step(3, epoch=1)
            assert home.expect(StepResult).step == 3
            assert stage.server.counts["merged"] == 1

    def test_nobody_waits_for_a_tenant_that_is_not_served(self) -> None:
        with self.after_a_merged_forward() as (_, home, guest):
            guest.fence(epoch=2)
            guest.ask_stitch(epoch=1)
            for number in (2, 3):
                home.step(number, epoch=1)
                assert home.expect(StepResult).step == number

    def test_nobody_waits_after_a_forward_of_one_tenant(self) -> None:
        with Stage(FIRST) as stage, both_served(stage) as (home, _):
            for number in range(3):
                home.step(number, epoch=1)
                assert home.expect(StepResult).step == number
            assert forwards(stage) == (3, 0)


def test_the_wait_for_company_is_short_and_is_not_repeated() -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        with while_the_runner_is_busy(stage, home, guest):
            home.step(1, epoch=1)
            guest.step(0, epoch=1)
        for number in range(2, 5):
            home.step(number, epoch=1)
        assert [home.expect(StepResult).step for _ in range(5)] == [0, 1, 2, 3, 4]
        assert forwards(stage) == (5, 1)


@pytest.mark.parametrize("room", [None, Room(tokens=5, requests=8), Room(tokens=64, requests=1)], ids=str)
def test_without_room_for_both_they_take_turns(room: Room | None) -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        stage.model.room = room
        with while_the_runner_is_busy(stage, home, guest):
            home.step(1, epoch=1)
            guest.step(0, epoch=1)
        assert [home.expect(StepResult).step for _ in range(2)] == [0, 1]
        assert guest.expect(StepResult).step == 0
        assert stage.server.counts["merged"] == 0
    assert [step.new[0].request for step in stage.model.steps] == ["0/before", "1/r", "0/r"]


@pytest.mark.parametrize(
    ("shortest_first", "expected"),
    [(False, [20.0, 20.1, 10.0, 10.1, 10.2, 10.3]), (True, [10.0, 20.0, 20.1, 10.1, 10.2, 10.3])],
    ids=["in the step's order", "in an order of the runner's own"],
)
def test_hidden_states_of_both_are_put_where_the_runner_looks_for_them(
    shortest_first: bool, expected: list[float]
) -> None:
    """Home's neighbour sends rows in the order of home's step alone: there b, of one token, may come before a."""
    with Stage(LAST) as stage, both_served(stage) as (home, guest):
        stage.model.shortest_first = shortest_first
        links = [Neighbour(stage.address, epoch=1), Neighbour(stage.address, epoch=1, instance=GUEST)]
        with closing(*links):
            links[0].send(0)
            links[0].send(1, rows=[10.0, 10.1, 10.2, 10.3])
            links[1].send(0, rows=[20.0, 20.1])
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1, **fresh(a=3, b=1))
                guest.step(0, epoch=1, **fresh(c=2))
                stage.wait_arrived(HOME, 1)
                stage.wait_arrived(GUEST, 0)
            home.expect(StepResult)
            mine, theirs = home.expect(StepResult), guest.expect(StepResult)
    assert stage.model.rows[1] == pytest.approx(expected)
    assert dict(zip(mine.requests, mine.sampled_token_ids, strict=True)) == {"a": [3], "b": [1]}
    assert dict(zip(theirs.requests, theirs.sampled_token_ids, strict=True)) == {"c": [2]}


def test_hidden_states_go_to_each_tenants_own_next_stage_in_its_own_order() -> None:
    with (
        Stage(LAST) as mine,
        Stage(LAST) as theirs,
        Stage(FIRST) as stage,
        both_served(stage, mine.address, theirs.address) as (home, guest),
        closing(at_mine := Engine(mine.address), at_theirs := Engine(theirs.address, GUEST)),
    ):
        at_mine.stitch(epoch=1)
        at_theirs.stitch(epoch=1)
        stage.model.shortest_first = True
        with while_the_runner_is_busy(stage, home, guest):
            home.step(1, epoch=1, **fresh(a=3, b=1))
            guest.step(0, epoch=1, **fresh(c=2))
        at_mine.step(0, epoch=1, request="before")
        at_mine.step(1, epoch=1, **fresh(a=3, b=1))
        at_theirs.step(0, epoch=1, **fresh(c=2))
        at_mine.expect(StepResult)
        at_mine.expect(StepResult)
        at_theirs.expect(StepResult)
        stage.wait_counted("merged", 1)
        assert home.heard_nothing and guest.heard_nothing
        together = stage.model.rows[1]
    # In the merged step the rows are b's, then c's two, then a's three.
    assert mine.model.rows[1] == [together[0], *together[3:]]
    assert theirs.model.rows[0] == together[1:3]


class TestWhenOneOfTheTwoCannotRun:
    def test_a_step_that_cannot_be_translated_fails_alone(self) -> None:
        with Stage(FIRST) as stage, both_served(stage) as (home, guest):
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1)
                guest.step(0, epoch=1, block_ids=([3, 4],), computed=4)
            assert "never written" in guest.expect(StepFailed).reason
            assert [home.expect(StepResult).step for _ in range(2)] == [0, 1]
            assert forwards(stage) == (2, 0)

    @pytest.mark.parametrize("guilty", [HOME, GUEST])
    def test_a_step_that_the_runner_cannot_read_fails_alone(self, guilty: int) -> None:
        with Stage(FIRST) as stage, both_served(stage) as (home, guest):
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1, params=MALFORMED if guilty == HOME else b"")
                guest.step(0, epoch=1, params=MALFORMED if guilty == GUEST else b"")
            assert home.expect(StepResult).step == 0
            bad, good = (home, guest) if guilty == HOME else (guest, home)
            assert "sampling parameters" in bad.expect(StepFailed).reason
            assert good.expect(StepResult).requests == ["r"]
            assert stage.failure is None
        assert [step.new[0].request for step in stage.model.steps] == ["0/before", f"{1 - guilty}/r"]


class TestAFenceInMidForward:
    def test_makes_the_fenced_tenants_outcome_void_and_leaves_the_others(self) -> None:
        with Stage(FIRST) as stage, both_served(stage) as (home, guest):
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1)
                guest.step(0, epoch=1)
                stage.model.stop_again = True
            assert stage.model.within.wait(PATIENCE_SECONDS)
            guest.fence(epoch=2)
            guest.ask_stitch(epoch=1)  # older, so refused; answered after the fence
            stage.model.go.set()
            assert [home.expect(StepResult).step for _ in range(2)] == [0, 1]
            # Answered under its old stamp, by which the engine knows it as void.
            assert guest.expect(StepResult).stamp == Stamp(1, 1)
            home.step(2, epoch=1, request="after")
            home.expect(StepResult)
        assert stage.model.steps[2].finished == ["1/r"], "only the guest's requests are forgotten"
        assert stage.model.held == {"0/before", "0/r", "0/after"}

    def test_keeps_the_guests_new_topology_out_of_its_slots_until_the_forward_is_done(self) -> None:
        with Stage(FIRST) as stage, both_served(stage) as (home, guest):
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1)
                guest.step(0, epoch=1)
                stage.model.stop_again = True
            assert stage.model.within.wait(PATIENCE_SECONDS)
            refusal = guest.ask_stitch(epoch=2)
            assert "still in a step of an older topology" in getattr(refusal, "reason", "")
            stage.model.go.set()
            assert guest.expect(StepResult).stamp == Stamp(1, 1)
            guest.stitch(epoch=3)
            guest.step(0, epoch=3)
            assert guest.expect(StepResult).stamp == Stamp(1, 3)

    def test_sends_the_hidden_states_of_the_other_on(self) -> None:
        with (
            Stage(LAST) as mine,
            Stage(LAST) as theirs,
            Stage(FIRST) as stage,
            both_served(stage, mine.address, theirs.address) as (home, guest),
            closing(at_mine := Engine(mine.address)),
        ):
            at_mine.stitch(epoch=1)
            with while_the_runner_is_busy(stage, home, guest):
                home.step(1, epoch=1)
                guest.step(0, epoch=1)
                stage.model.stop_again = True
            assert stage.model.within.wait(PATIENCE_SECONDS)
            guest.fence(epoch=2)
            guest.ask_stitch(epoch=1)
            stage.model.go.set()
            at_mine.step(0, epoch=1, request="before")
            at_mine.step(1, epoch=1)
            assert [at_mine.expect(StepResult).step for _ in range(2)] == [0, 1]
        assert not theirs.model.steps


def test_what_is_to_be_forgotten_is_so_in_a_merged_step_too() -> None:
    with Stage(FIRST) as stage, both_served(stage) as (home, guest):
        guest.step(0, epoch=1, request="lost")
        guest.expect(StepResult)
        guest.stitch(epoch=2)
        stage.model.go.clear()
        home.step(0, epoch=1, request="before")
        assert stage.model.within.wait(PATIENCE_SECONDS)
        guest.stitch(epoch=3)
        home.step(1, epoch=1)
        guest.step(0, epoch=3, request="fresh")
        home.ask_stitch(epoch=0)
        guest.ask_stitch(epoch=0)
        stage.model.go.set()
        home.expect(StepResult)
        home.expect(StepResult)
        guest.expect(StepResult)
        assert stage.server.counts["merged"] == 1
    assert stage.model.held == {"0/before", "0/r", "1/fresh"}
