"""A stage obeys only the highest stamp: what is older changes nothing, whatever it is and whenever it comes."""

import pytest
from resilientllm_worker.protocol.messages import Failed, LinkLost, Stamp, StepResult, Stitched

from tests.worker.stage.builders import PATIENCE_SECONDS, Engine, Neighbour, Stage, closing


def test_a_step_of_the_stamp_in_force_is_run_and_answered() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        engine.step(0, epoch=1)
        result = engine.expect(StepResult)
    assert (result.stamp, result.step, result.requests) == (Stamp(1, 1), 0, ["r"])


@pytest.mark.parametrize(("term", "epoch"), [(1, 4), (2, 2), (2, 4)], ids=["old term", "old epoch", "future epoch"])
def test_a_step_of_another_stamp_is_dropped(term: int, epoch: int) -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=3, term=2)
        engine.step(0, epoch=epoch, term=term)
        engine.step(1, epoch=3, term=2)
        assert engine.expect(StepResult).step == 1
    assert [step.step for step in stage.model.steps] == [1]


def test_an_older_fence_changes_nothing() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=3)
        engine.fence(epoch=2)
        engine.step(0, epoch=3)
        assert engine.expect(StepResult).stamp == Stamp(1, 3)


def test_an_older_stitch_is_refused_and_changes_nothing() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=3)
        refusal = engine.ask_stitch(epoch=2)
        engine.step(0, epoch=3)
        assert engine.expect(StepResult).stamp == Stamp(1, 3)
    assert isinstance(refusal, Failed)
    assert "older" in refusal.reason


def test_steps_that_wait_are_void_after_a_fence() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        stage.model.go.clear()
        engine.step(0, epoch=1)
        assert stage.model.within.wait(PATIENCE_SECONDS)
        engine.step(1, epoch=1)
        engine.stitch(epoch=2)  # answered while step 0 is still running
        stage.model.go.set()
        engine.step(0, epoch=2)
        results = [engine.expect(StepResult).stamp, engine.expect(StepResult).stamp]
    # The step that was running is answered under its old stamp, by which the engine knows it as void.
    assert results == [Stamp(1, 1), Stamp(1, 2)]
    assert [(step.stamp.epoch, step.step) for step in stage.model.steps] == [(1, 0), (2, 0)]


def test_a_fence_alone_leaves_the_instance_without_a_place() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        engine.fence(epoch=2)
        engine.step(0, epoch=2)
        engine.stitch(epoch=3)
        engine.step(5, epoch=3)
        assert engine.expect(StepResult).step == 5
    assert [step.step for step in stage.model.steps] == [5]


def test_the_requests_of_a_fenced_instance_are_forgotten_with_the_next_step() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        engine.step(0, epoch=1, request="lost")
        engine.expect(StepResult)
        engine.stitch(epoch=2)
        engine.step(0, epoch=2, request="fresh")
        engine.expect(StepResult)
    assert stage.model.steps[1].finished == ["0/lost"]
    assert stage.model.held == {"0/fresh"}


def test_a_request_that_comes_again_after_a_fence_is_finished_first() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        engine.step(0, epoch=1)
        engine.expect(StepResult)
        engine.stitch(epoch=2)
        engine.step(0, epoch=2)
        engine.expect(StepResult)
    assert stage.model.steps[1].finished == ["0/r"]
    assert [new.request for new in stage.model.steps[1].new] == ["0/r"]


def test_a_step_that_cannot_be_run_leaves_the_forgetting_to_the_next() -> None:
    with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        engine.step(0, epoch=1, request="lost")
        engine.expect(StepResult)
        engine.stitch(epoch=2)
        engine.step(0, epoch=2, block_ids=([999],))  # outside the home blocks
        assert "999" in engine.expect(object).reason  # type: ignore[attr-defined]
        engine.step(1, epoch=2, request="fresh")
        engine.expect(StepResult)
    assert stage.model.held == {"0/fresh"}


def test_hidden_states_of_an_old_stamp_are_never_used() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(late := Neighbour(stage.address, epoch=1)):
            late.send(0, value=11.0)
            engine.stitch(epoch=2)
            engine.step(0, epoch=2)
            with closing(now := Neighbour(stage.address, epoch=2)):
                now.send(0, value=22.0)
                engine.expect(StepResult)
    assert stage.model.inbound == [22.0]


def test_a_link_of_an_old_stamp_is_closed() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=2)
        with closing(late := Neighbour(stage.address, epoch=1)), pytest.raises(Exception, match="clos"):
            late.connection.receive()
        assert engine.heard_nothing


def test_a_fence_closes_the_links_that_it_makes_old_and_tells_nobody() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(link := Neighbour(stage.address, epoch=1)):
            link.send(0)
            engine.step(0, epoch=1)
            engine.expect(StepResult)
            engine.fence(epoch=2)
            with pytest.raises(Exception, match="clos"):
                link.connection.receive()
        engine.stitch(epoch=3)  # is answered next, so nothing else was said


def test_a_frame_that_contradicts_its_link_closes_the_link() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(link := Neighbour(stage.address, epoch=1)):
            link.send(0, stamp=Stamp(1, 9))
            with pytest.raises(Exception, match="clos"):
                link.connection.receive()
    assert not stage.model.steps


def test_a_link_may_be_faster_than_the_stitch_that_it_is_for() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(early := Neighbour(stage.address, epoch=2)):
            early.send(0, value=5.0)
            engine.stitch(epoch=2)
            engine.step(0, epoch=2)
            engine.expect(StepResult)
    assert stage.model.inbound == [5.0]


def test_a_broken_link_is_reported_with_the_place_of_the_neighbour() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(link := Neighbour(stage.address, epoch=1)):
            link.send(0)
            engine.step(0, epoch=1)
            engine.expect(StepResult)
        report = engine.expect(LinkLost)
    assert (report.stamp, report.stage) == (Stamp(1, 1), 0)


class TestTwoEnginesOfOneInstance:
    """One of them is an old incarnation, or cut off from the operator."""

    def test_the_new_term_takes_over_and_the_old_connection_ends(self) -> None:
        with Stage(stage=0) as stage, closing(old := Engine(stage.address), new := Engine(stage.address)):
            old.stitch(epoch=9, term=1)
            new.stitch(epoch=1, term=2)
            assert old.ended.wait(PATIENCE_SECONDS)
            new.step(0, epoch=1, term=2)
            assert new.expect(StepResult).stamp == Stamp(2, 1)

    def test_the_old_term_is_refused_when_it_comes_back(self) -> None:
        with Stage(stage=0) as stage, closing(new := Engine(stage.address), old := Engine(stage.address)):
            new.stitch(epoch=1, term=2)
            assert isinstance(old.ask_stitch(epoch=9, term=1), Failed)
            old.step(0, epoch=1, term=2)  # right stamp, wrong engine
            new.step(1, epoch=1, term=2)
            assert new.expect(StepResult).step == 1

    def test_the_end_of_the_old_connection_takes_nothing_from_the_new_engine(self) -> None:
        with Stage(stage=0) as stage, closing(old := Engine(stage.address), new := Engine(stage.address)):
            old.stitch(epoch=1, term=1)
            new.stitch(epoch=1, term=2)
            old.close()
            new.step(0, epoch=1, term=2)
            new.expect(StepResult)

    def test_the_welcome_tells_the_highest_stamp(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=4, term=7)
            with closing(another := Engine(stage.address)):
                assert another.welcome.stamp == Stamp(7, 4)

    def test_the_stamp_outlives_the_engine_that_gave_it(self) -> None:
        with Stage(stage=0) as stage:
            with closing(first := Engine(stage.address)):
                first.stitch(epoch=4, term=7)
            with closing(second := Engine(stage.address)):
                assert isinstance(second.ask_stitch(epoch=9, term=6), Failed)
                assert isinstance(second.ask_stitch(epoch=1, term=8), Stitched)
