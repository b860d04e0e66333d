"""Home and one guest are served side by side, each in its own blocks, and neither holds up the other."""

from resilientllm_worker.protocol.messages import Failed, StepFailed, StepResult, Stitched

from tests.worker.stage.builders import (
    GUEST,
    HOME,
    HOME_BLOCKS,
    OTHER_GUEST,
    PATIENCE_SECONDS,
    POOL_BLOCKS,
    Engine,
    Neighbour,
    Stage,
    closing,
)


def test_home_may_use_its_blocks_but_the_null_block_and_a_guest_the_whole_pool() -> None:
    with Stage() as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
        assert home.stitch(epoch=1).capacity_blocks == HOME_BLOCKS - 1
        assert guest.stitch(epoch=1).capacity_blocks == POOL_BLOCKS


def test_equal_names_of_two_tenants_stay_apart() -> None:
    with (
        Stage(stage=0) as stage,
        closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)),
    ):
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        home.step(0, epoch=1, block_ids=([1],))
        assert home.expect(StepResult).requests == ["r"]
        guest.step(0, epoch=1, block_ids=([1],))
        assert guest.expect(StepResult).requests == ["r"]
    mine, theirs = (step.new[0] for step in stage.model.steps)
    assert (mine.request, mine.block_ids) == ("0/r", ([1],))
    assert theirs.request == "1/r"
    assert HOME_BLOCKS <= theirs.block_ids[0][0] < HOME_BLOCKS + POOL_BLOCKS


def test_a_tenant_that_waits_for_hidden_states_does_not_hold_up_the_other() -> None:
    with Stage() as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        home.step(0, epoch=1)  # its hidden states never come
        with closing(link := Neighbour(stage.address, epoch=1, instance=GUEST)):
            for number in range(3):
                guest.step(number, epoch=1)
                link.send(number, value=float(number))
                assert guest.expect(StepResult).step == number
    assert stage.model.inbound == [0.0, 1.0, 2.0]


def test_hidden_states_may_come_before_or_after_their_step() -> None:
    with Stage() as stage, closing(engine := Engine(stage.address)):
        engine.stitch(epoch=1)
        with closing(link := Neighbour(stage.address, epoch=1)):
            for number in range(3):
                link.send(number, value=float(number))
            for number in range(3):
                engine.step(number, epoch=1)
                engine.expect(StepResult)
            engine.step(3, epoch=1)
            link.send(3, value=3.0)
            engine.expect(StepResult)
    assert stage.model.inbound == [0.0, 1.0, 2.0, 3.0]


def test_two_tenants_whose_steps_may_not_be_merged_take_turns() -> None:
    with (
        Stage(stage=0, merges=False) as stage,
        closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)),
    ):
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        stage.model.go.clear()
        home.step(0, epoch=1)
        assert stage.model.within.wait(PATIENCE_SECONDS)
        for number in (1, 2):
            home.step(number, epoch=1)
        for number in range(3):
            guest.step(number, epoch=1)
        guest.ask_stitch(epoch=0)  # its answer says that the steps before it have been read
        home.ask_stitch(epoch=0)
        stage.model.go.set()
        for engine in (home, guest):
            for _ in range(3):
                engine.expect(StepResult)
    assert [step.new[0].request[0] for step in stage.model.steps] == ["0", "1", "0", "1", "0", "1"]


def test_fencing_one_tenant_leaves_the_other_alone() -> None:
    with (
        Stage(stage=0) as stage,
        closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)),
    ):
        home.stitch(epoch=1)
        guest.stitch(epoch=1)
        home.step(0, epoch=1, request="h")
        home.expect(StepResult)
        guest.fence(epoch=2)
        guest.ask_stitch(epoch=1)
        home.step(1, epoch=1, request="h2")
        home.expect(StepResult)
    assert {"0/h", "0/h2"} <= stage.model.held


class TestTheGuestsSeat:
    def test_it_is_refused_while_another_instance_has_it(self) -> None:
        with (
            Stage() as stage,
            closing(guest := Engine(stage.address, GUEST), other := Engine(stage.address, OTHER_GUEST)),
        ):
            guest.stitch(epoch=1)
            refusal = other.ask_stitch(epoch=1)
            assert isinstance(refusal, Failed)
            assert f"instance {GUEST}" in refusal.reason
            guest.stitch(epoch=2)  # the guest itself may come again

    def test_it_is_free_after_a_release(self) -> None:
        with (
            Stage() as stage,
            closing(guest := Engine(stage.address, GUEST), other := Engine(stage.address, OTHER_GUEST)),
        ):
            guest.stitch(epoch=1)
            guest.release(epoch=2)
            guest.ask_stitch(epoch=1)  # refused, but answered after the release
            other.stitch(epoch=1)

    def test_an_old_release_does_not_free_it(self) -> None:
        with (
            Stage() as stage,
            closing(guest := Engine(stage.address, GUEST), other := Engine(stage.address, OTHER_GUEST)),
        ):
            guest.stitch(epoch=2)
            guest.release(epoch=1)
            guest.ask_stitch(epoch=1)
            assert isinstance(other.ask_stitch(epoch=1), Failed)

    def test_it_is_free_when_the_guests_engine_goes(self) -> None:
        with Stage() as stage, closing(other := Engine(stage.address, OTHER_GUEST)):
            with closing(guest := Engine(stage.address, GUEST)):
                guest.stitch(epoch=1)
            epochs = iter(range(1, 1000))
            while isinstance(other.ask_stitch(epoch=next(epochs)), Failed):
                """The server notices the end of a connection in its own time."""

    def test_a_stage_without_a_pool_has_none(self) -> None:
        with (
            Stage(has_kv=False, pool_fraction=0.0) as stage,
            closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)),
        ):
            home.allocate()
            refusal = guest.ask_stitch(epoch=1)
        assert isinstance(refusal, Failed)
        assert "no pool blocks" in refusal.reason

    def test_a_guest_that_uses_more_than_its_seat_holds_is_told_so(self) -> None:
        with Stage(stage=0) as stage, closing(guest := Engine(stage.address, GUEST)):
            guest.stitch(epoch=1)
            guest.step(0, epoch=1, block_ids=(list(range(1, POOL_BLOCKS + 2)),))
            refusal = guest.expect(StepFailed)
        assert refusal.step == 0
        assert not stage.model.steps

    def test_a_guest_never_reads_a_block_that_it_did_not_write(self) -> None:
        with Stage(stage=0) as stage, closing(guest := Engine(stage.address, GUEST)):
            guest.stitch(epoch=1)
            guest.step(0, epoch=1, block_ids=([3, 4],), computed=4)
            assert "never written" in guest.expect(StepFailed).reason

    def test_a_guest_that_comes_again_finds_an_empty_pool(self) -> None:
        with Stage(stage=0) as stage, closing(guest := Engine(stage.address, GUEST)):
            guest.stitch(epoch=1)
            guest.step(0, epoch=1, block_ids=(list(range(1, POOL_BLOCKS + 1)),))
            guest.expect(StepResult)
            guest.stitch(epoch=2)
            guest.step(0, epoch=2, block_ids=(list(range(20, 20 + POOL_BLOCKS)),))
            guest.expect(StepResult)


class TestKV:
    def test_without_it_no_pipeline_can_be_stitched(self) -> None:
        with Stage(has_kv=False) as stage, closing(engine := Engine(stage.address)):
            refusal = engine.ask_stitch(epoch=1)
        assert isinstance(refusal, Failed)
        assert "no KV cache yet" in refusal.reason

    def test_only_the_own_engine_agrees_it(self) -> None:
        with Stage(has_kv=False) as stage, closing(guest := Engine(stage.address, GUEST)):
            assert isinstance(guest.allocate(), Failed)
        assert stage.model.kv is None

    def test_the_pool_holds_the_longest_request(self) -> None:
        with Stage(has_kv=False, pool_fraction=0.01) as stage, closing(engine := Engine(stage.address)):
            answer = engine.allocate()
        assert answer.pool_blocks >= stage.model.longest_request  # type: ignore[union-attr]

    def test_agreeing_the_same_again_keeps_what_is_there(self) -> None:
        with Stage(has_kv=False) as stage, closing(engine := Engine(stage.address)):
            first = engine.allocate()
            kept = stage.model.kv
            again = engine.allocate()
        assert first.home_blocks == again.home_blocks == HOME_BLOCKS  # type: ignore[union-attr]
        assert stage.model.kv is kept

    def test_agreeing_something_else_is_refused(self) -> None:
        with Stage() as stage, closing(engine := Engine(stage.address)):
            refusal = engine.allocate(home_blocks=HOME_BLOCKS + 1)
            assert isinstance(engine.ask_stitch(epoch=1), Stitched)
        assert isinstance(refusal, Failed)
        assert "another size" in refusal.reason


def test_a_welcome_says_who_the_stage_is() -> None:
    with Stage(stage=1) as stage, closing(engine := Engine(stage.address, GUEST)):
        welcome = engine.welcome
    assert (welcome.instance, welcome.stage, welcome.stages) == (HOME, 1, 2)
    assert (welcome.home_blocks, welcome.pool_blocks) == (HOME_BLOCKS, POOL_BLOCKS)


def test_two_incarnations_have_different_names() -> None:
    with Stage() as one, Stage() as another, closing(a := Engine(one.address), b := Engine(another.address)):
        assert a.welcome.boot != b.welcome.boot
