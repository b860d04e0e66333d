"""What engines, strangers and time do to a stage's connections, and what the stage makes of it."""

import socket
from unittest.mock import Mock

import pytest
import torch
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    DescribeKV,
    Failed,
    KVDescription,
    LinkHello,
    LinkLost,
    StageFailing,
    Stamp,
    StepFailed,
    StepResult,
    Stitched,
)
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.stage.activations import describe
from resilientllm_worker.transport.address import parse_address
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.errors import ConnectionClosed, ConnectionFailed
from resilientllm_worker.transport.listener import Listener

from tests.worker.stage.builders import (
    GUEST,
    PATIENCE_SECONDS,
    TOKEN,
    Engine,
    Neighbour,
    Stage,
    a_step,
    closing,
)
from tests.worker.transport.builders import a_frame

UNUSED_ADDRESS = "127.0.0.1:1"


class TestHeartbeats:
    def test_they_come_without_being_asked_and_count_steps(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address, heartbeat=0.01)):
            engine.stitch(epoch=1)
            assert engine.heartbeats.get(timeout=PATIENCE_SECONDS).steps_done == 0
            engine.step(0, epoch=1)
            engine.expect(StepResult)
            while engine.heartbeats.get(timeout=PATIENCE_SECONDS).steps_done != 1:
                """Those that were under way."""

    def test_they_tell_how_long_the_step_at_hand_has_been_running(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address, heartbeat=0.01)):
            engine.stitch(epoch=1)
            stage.model.go.clear()
            engine.step(0, epoch=1)
            assert stage.model.within.wait(PATIENCE_SECONDS)
            first = second = 0.0
            while not 0.0 < first < second:
                first, second = second, engine.heartbeats.get(timeout=PATIENCE_SECONDS).step_seconds
            stage.model.go.set()
            engine.expect(StepResult)
            while engine.heartbeats.get(timeout=PATIENCE_SECONDS).step_seconds:
                """Until it is idle again."""

    def test_they_tell_when_the_stage_has_its_kv(self) -> None:
        with (
            Stage(has_kv=False) as stage,
            closing(donated := Engine(stage.address, GUEST, heartbeat=0.01), own := Engine(stage.address)),
        ):
            assert not donated.heartbeats.get(timeout=PATIENCE_SECONDS).has_kv
            own.allocate()
            while not donated.heartbeats.get(timeout=PATIENCE_SECONDS).has_kv:
                """Those that were under way."""

    def test_an_interval_of_nothing_does_not_flood_the_engine(self) -> None:
        with Stage() as stage, closing(engine := Engine(stage.address, heartbeat=0.0)):
            first = engine.heartbeats.get(timeout=PATIENCE_SECONDS)
            assert engine.heartbeats.get(timeout=PATIENCE_SECONDS) == first


class TestAnEngineThatGoes:
    def test_leaves_no_requests_behind(self) -> None:
        with Stage(stage=0) as stage:
            with closing(engine := Engine(stage.address)):
                engine.stitch(epoch=1, term=1)
                engine.step(0, epoch=1, request="left")
                engine.expect(StepResult)
            with closing(engine := Engine(stage.address)):
                engine.stitch(epoch=1, term=2)
                engine.step(0, epoch=1, term=2, request="fresh")
                engine.expect(StepResult)
            assert stage.model.held == {"0/fresh"}

    def test_takes_its_links_with_it(self) -> None:
        with Stage() as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with closing(link := Neighbour(stage.address, epoch=1)):
                link.send(0)
                engine.step(0, epoch=1)
                engine.expect(StepResult)
                engine.close()
                with pytest.raises(ConnectionClosed):
                    link.connection.receive()

    def test_may_go_in_the_middle_of_a_step(self) -> None:
        with Stage(stage=0) as stage, closing(other := Engine(stage.address, GUEST)):
            other.stitch(epoch=1)
            with closing(engine := Engine(stage.address)):
                engine.stitch(epoch=1)
                stage.model.go.clear()
                engine.step(0, epoch=1)
                assert stage.model.within.wait(PATIENCE_SECONDS)
            stage.model.go.set()
            other.step(0, epoch=1)
            other.expect(StepResult)

    def test_with_other_settings_is_greeted_and_left(self) -> None:
        with Stage() as stage, closing(engine := Engine(stage.address, digest="{}")):
            assert engine.welcome.config_digest != "{}"
            assert engine.ended.wait(PATIENCE_SECONDS)


class TestStepsThatFail:
    def test_a_step_that_makes_no_sense_is_refused_and_the_stage_serves_on(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            stage.model.error = Malformed("lists of other lengths")
            engine.step(0, epoch=1)
            refusal = engine.expect(StepFailed)
            stage.model.error = None
            engine.step(1, epoch=1)
            engine.expect(StepResult)
        assert (refusal.stamp, refusal.step, refusal.reason) == (Stamp(1, 1), 0, "lists of other lengths")

    def test_a_model_that_fails_ends_the_stage_which_tells_all_that_it_serves(self) -> None:
        with Stage(stage=0) as stage, closing(home := Engine(stage.address), guest := Engine(stage.address, GUEST)):
            home.stitch(epoch=1)
            guest.stitch(epoch=1)
            stage.model.error = RuntimeError("the device is lost")
            guest.step(0, epoch=1)
            assert "device is lost" in home.expect(StageFailing).reason
            assert "device is lost" in guest.expect(StageFailing).reason
            stage.wait_ended()

    def test_stopping_ends_the_runner(self) -> None:
        with Stage() as stage:
            stage.server.stop()
            stage.wait_ended()
            assert stage.failure is None


class TestLinksOnward:
    def test_hidden_states_go_to_the_next_stage_and_no_result_to_the_engine(self) -> None:
        with (
            Stage(stage=0) as first,
            Stage(stage=1) as last,
            closing(to_first := Engine(first.address), to_last := Engine(last.address)),
        ):
            to_last.stitch(epoch=1)
            to_first.stitch(epoch=1, following=last.address)
            for number in range(3):
                to_first.step(number, epoch=1)
                to_last.step(number, epoch=1)
                assert to_last.expect(StepResult).step == number
            assert to_first.heard_nothing
        assert last.model.inbound == [0.0, 1.0, 2.0]

    def test_a_next_stage_that_cannot_be_reached_is_named(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            answer = engine.ask_stitch(epoch=1, following=UNUSED_ADDRESS)
        assert isinstance(answer, Failed)
        assert answer.unreachable == 1
        assert UNUSED_ADDRESS in answer.reason

    def test_the_loss_of_the_next_stage_is_reported_at_once(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            links: list[Connection] = []
            following = Listener("127.0.0.1", 0, TOKEN, lambda link: _take(link, links))
            engine.stitch(epoch=1, following=following.address)
            following.close()
            report = engine.expect(LinkLost)
        assert (report.stamp, report.stage) == (Stamp(1, 1), 1)

    def test_a_link_that_breaks_within_the_stitch_is_reported_too(self) -> None:
        """Whoever takes the link closes it at once: before or after the answer, the engine hears of it."""
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            following = Listener("127.0.0.1", 0, TOKEN, lambda link: None)
            engine.begin_stitch(epoch=1, following=following.address)
            answers = {type(engine.expect(object)), type(engine.expect(object))}
            following.close()
        assert answers == {Stitched, LinkLost}

    def test_a_step_whose_link_is_gone_is_computed_all_the_same(self) -> None:
        """Its fate is the engine's decision; the runner must not stumble over it."""
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            links: list[Connection] = []
            following = Listener("127.0.0.1", 0, TOKEN, lambda link: _take(link, links))
            engine.stitch(epoch=1, following=following.address)
            following.close()
            engine.expect(LinkLost)
            engine.step(0, epoch=1)
            stage.model.ran.get(timeout=PATIENCE_SECONDS)
            engine.stitch(epoch=2)
            engine.step(0, epoch=2)
            engine.expect(StepResult)


class TestStrangers:
    """Each time one connection ends, and the stage serves on."""

    def serves_on(self, stage: Stage, engine: Engine) -> None:
        engine.step(0, epoch=1)
        engine.expect(StepResult)
        with closing(Engine(stage.address, GUEST)):
            """Newcomers are greeted, too."""

    def test_garbage_before_authentication(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with socket.create_connection(parse_address(stage.address)) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\nHost: stage\r\n\r\n" * 100)
                stranger.settimeout(PATIENCE_SECONDS)
                assert _ends(stranger)
            self.serves_on(stage, engine)

    def test_another_token(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with pytest.raises(ConnectionFailed):
                dial(stage.address, b"another token altogether", PATIENCE_SECONDS)
            self.serves_on(stage, engine)

    @pytest.mark.parametrize(
        "frame",
        [
            a_frame(b"", message_bytes=0xFFFFFFFF),
            a_frame(b"\x93abc", body_bytes=1 << 60),
            a_frame(b"\xc1\xc1\xc1\xc1"),
        ],
        ids=["oversized message", "oversized body", "not msgpack"],
    )
    def test_a_broken_frame_of_an_authenticated_peer(self, frame: bytes) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with closing(peer := dial(stage.address, TOKEN, PATIENCE_SECONDS)):
                peer.send_parts([memoryview(frame)])
                with pytest.raises(ConnectionClosed):
                    peer.receive()
            self.serves_on(stage, engine)

    def test_a_corrupt_command_ends_its_engine_and_is_counted(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address), other := Engine(stage.address, GUEST)):
            engine.stitch(epoch=1)
            frame = bytearray(b"".join(engine.connection.encode(a_step(0, epoch=1))))
            frame[-1] ^= 1
            engine.connection.send_parts([memoryview(frame)])
            assert engine.ended.wait(PATIENCE_SECONDS)
            stage.wait_counted("corruptFrames", 1)
            other.stitch(epoch=1)
            other.step(0, epoch=1)
            other.expect(StepResult)
        assert [step.new[0].request for step in stage.model.steps] == ["1/r"]

    def test_corrupt_hidden_states_are_never_used_and_the_link_is_reported(self) -> None:
        with Stage(stage=1) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with closing(link := Neighbour(stage.address, epoch=1)):
                engine.step(0, epoch=1)
                header, buffers = describe({"hidden": torch.tensor([1.0])}, Stamp(1, 1), 0)
                *parts, body = link.connection.encode(header, buffers)
                link.connection.send_parts([*parts, memoryview(bytes([body[0] ^ 1]) + bytes(body[1:]))])
                report = engine.expect(LinkLost)
            assert (report.stamp, report.stage) == (Stamp(1, 1), 0)
            assert "corrupt" in report.detail
        assert not stage.model.steps

    def test_a_message_that_is_no_hello(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with closing(peer := dial(stage.address, TOKEN, PATIENCE_SECONDS)):
                peer.send(DescribeKV(1))
                with pytest.raises(ConnectionClosed):
                    peer.receive()
            self.serves_on(stage, engine)

    def test_a_link_from_a_stage_that_is_not_the_previous_one(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address)):
            engine.stitch(epoch=1)
            with closing(peer := dial(stage.address, TOKEN, PATIENCE_SECONDS)):
                peer.send(LinkHello(PROTOCOL_VERSION, 0, 5, Stamp(1, 1), 0))
                with pytest.raises(ConnectionClosed):
                    peer.receive()
            self.serves_on(stage, engine)

    def test_a_message_that_only_stages_send(self) -> None:
        with Stage(stage=0) as stage, closing(engine := Engine(stage.address), rude := Engine(stage.address, GUEST)):
            engine.stitch(epoch=1)
            rude.connection.send(StageFailing("no"))
            assert rude.ended.wait(PATIENCE_SECONDS)
            self.serves_on(stage, engine)


def test_a_description_gives_home_its_share_of_the_memory() -> None:
    with Stage(pool_fraction=0.5) as stage, closing(engine := Engine(stage.address)):
        engine.connection.send(DescribeKV(1))
        answer = engine.expect(KVDescription)
    assert answer.available_bytes == [2000]  # of 3000, with half as much again for guests


def test_a_cache_that_cannot_be_described_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage(has_kv=False) as stage, closing(engine := Engine(stage.address)):
        monkeypatch.setattr(stage.model, "kv_needs_of_ranks", Mock(side_effect=Unsupported("a spec holds a ring")))
        engine.connection.send(DescribeKV(1))
        assert engine.expect(Failed).reason.endswith("a spec holds a ring")
        monkeypatch.undo()
        engine.connection.send(DescribeKV(2))
        engine.expect(KVDescription)


def _take(link: Connection, links: list[Connection]) -> None:
    """Serve a link until it ends."""
    links.append(link)
    assert isinstance(link.receive(), LinkHello)
    while True:
        link.receive_into(lambda header: [memoryview(bytearray(each.nbytes)) for each in header.tensors])


def _ends(stranger: socket.socket) -> bool:
    try:
        while stranger.recv(4096):
            """The listener's greeting."""
    except ConnectionResetError:
        pass
    return True
