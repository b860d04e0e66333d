"""A stage gets its twin's weights, all of them and as they are, or nothing that is wrong and a reason."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.protocol.messages import (
    Heartbeat,
    TensorHeader,
    Weights,
    WeightsHello,
    WeightsWelcome,
)
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.errors import ConnectionClosed
from resilientllm_worker.weights import runs as runs_module
from resilientllm_worker.weights.giver import give
from resilientllm_worker.weights.runs import Run, checksum, runs
from resilientllm_worker.weights.taker import NotTaken, Taken, take

from tests.worker.transport.builders import PATIENCE_SECONDS, TOKEN, InThread, listening
from tests.worker.weights.builders import DIGEST, HELLO, ByteWeights

SIZES = (40, 0, 1, 33)
RUN_BYTES = 16
UNUSED_ADDRESS = "127.0.0.1:1"
Serve = Callable[[Connection], None]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "RUN_BYTES", RUN_BYTES)


def giving(memory: ByteWeights | None, digest: str = DIGEST) -> Serve:
    def serve(connection: Connection) -> None:
        hello = connection.receive()
        assert isinstance(hello, WeightsHello)
        give(connection, hello, digest, memory)

    return serve


@contextlib.contextmanager
def twin(serve: Serve) -> Iterator[str]:
    with listening(serve) as listener:
        yield listener.address


def taken(*addresses: str, into: ByteWeights, hello: WeightsHello = HELLO, idle: float = PATIENCE_SECONDS) -> Taken:
    result: Taken = InThread(lambda: take(addresses, TOKEN, hello, into, idle)).result()
    return result


def reason(serve: Serve, into: ByteWeights | None = None, **changes: float) -> str:
    """Why the twin did not give."""
    with twin(serve) as address, pytest.raises(NotTaken) as refused:
        taken(address, into=into or ByteWeights(SIZES), **changes)  # type: ignore[arg-type]
    assert str(refused.value).startswith(f"{address}: ")
    return str(refused.value)


def first_runs(connection: Connection, source: ByteWeights, count: int) -> None:
    """A twin that keeps to the rules for so many runs."""
    connection.receive()
    connection.send(WeightsWelcome("", source.tensors))
    for run in list(runs(source.tensors))[:count]:
        connection.send(Weights(checksum(run, source.read(run)), run.nbytes), [source.read(run)])


@given(st.lists(st.integers(0, 70), max_size=6), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_all_bytes_of_all_tensors_arrive_however_they_are_cut(sizes: list[int], run_bytes: int) -> None:
    source, target = ByteWeights(sizes, content_seed=1), ByteWeights(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs_module, "RUN_BYTES", run_bytes)
        with twin(giving(source)) as address:
            result = taken(address, into=target)
    assert target.content == source.content
    assert (result.source, result.nbytes) == (address, sum(sizes))
    assert all(run.nbytes <= run_bytes for run in target.written)


def test_several_can_take_at_the_same_time() -> None:
    source, targets = ByteWeights(SIZES, content_seed=1), [ByteWeights(SIZES) for _ in range(4)]
    with twin(giving(source)) as address:
        for started in [InThread(partial(take, [address], TOKEN, HELLO, target)) for target in targets]:
            started.result()
    assert all(target.content == source.content for target in targets)


def test_a_twin_of_another_configuration_refuses_and_names_the_difference() -> None:
    assert "model: 'tiny' here, 'other' there" in reason(giving(ByteWeights(SIZES), '{"model": "other", "rank": 0}'))


def test_a_stage_that_does_not_lend_its_weights_says_so() -> None:
    assert "does not lend" in reason(giving(None))


def test_weights_of_another_protocol_are_not_given() -> None:
    with twin(giving(ByteWeights(SIZES))) as address, pytest.raises(NotTaken, match="protocol"):
        taken(address, into=ByteWeights(SIZES), hello=WeightsHello(99, 1, 0, DIGEST))


@pytest.mark.parametrize(
    "theirs",
    [(40, 0, 1, 34), (40, 0, 1), (40, 0, 1, 33, 5)],
    ids=["another shape", "too few", "too many"],
)
def test_weights_that_are_laid_out_in_another_way_are_not_taken(theirs: tuple[int, ...]) -> None:
    target = ByteWeights(SIZES)
    assert "laid out" in reason(giving(ByteWeights(theirs, content_seed=1)), target)
    assert target.written == []


def test_another_name_or_type_is_another_layout() -> None:
    for changed in (TensorHeader("norm", "uint8", (40,), 40), TensorHeader("layers.0", "int8", (40,), 40)):
        source = ByteWeights(SIZES, content_seed=1)
        source.tensors[0] = changed
        assert f"layers.0 uint8[40] here, {changed.name} {changed.dtype}[40] there" in reason(giving(source))


def test_a_run_that_arrives_corrupt_is_not_written() -> None:
    source, target = ByteWeights(SIZES, content_seed=1), ByteWeights(SIZES)

    def serve(connection: Connection) -> None:
        first_runs(connection, source, 1)
        content = source.read(Run(0, RUN_BYTES, RUN_BYTES))
        good = checksum(Run(0, RUN_BYTES, RUN_BYTES), content)
        connection.send(Weights(good, RUN_BYTES), [bytes([content[0] ^ 1]) + bytes(content[1:])])

    assert "layers.0 arrived corrupt at byte 16" in reason(serve, target)
    assert target.written == [Run(0, 0, RUN_BYTES)]


def test_good_content_in_the_wrong_place_is_corrupt() -> None:
    source = ByteWeights(SIZES, content_seed=1)

    def serve(connection: Connection) -> None:
        first_runs(connection, source, 0)
        second = Run(0, RUN_BYTES, RUN_BYTES)
        connection.send(Weights(checksum(second, source.read(second)), RUN_BYTES), [source.read(second)])

    assert "corrupt at byte 0" in reason(serve)


def test_a_run_of_another_size_is_not_taken() -> None:
    def serve(connection: Connection) -> None:
        first_runs(connection, ByteWeights(SIZES), 0)
        connection.send(Weights(0, RUN_BYTES + 1), [bytes(RUN_BYTES + 1)])

    assert "expected 16 bytes" in reason(serve)


@pytest.mark.parametrize(
    "answer", [WeightsWelcome("", []), Heartbeat(0, 0.0, False)], ids=lambda each: type(each).__name__
)
def test_a_peer_that_breaks_the_order_is_left(answer: WeightsWelcome | Heartbeat) -> None:
    def serve(connection: Connection) -> None:
        connection.receive()
        connection.send(answer)

    target = ByteWeights(SIZES)
    assert reason(serve, target)
    assert target.written == []


def test_a_twin_that_ends_in_the_middle_is_followed_by_the_next_one() -> None:
    source, target = ByteWeights(SIZES, content_seed=1), ByteWeights(SIZES)
    with twin(partial(first_runs, source=source, count=3)) as stops, twin(giving(source)) as goes_on:
        result = taken(stops, goes_on, into=target)
    assert result.source == goes_on
    assert target.content == source.content
    assert len(target.written) == 3 + len(list(runs(source.tensors)))


def test_a_twin_that_hangs_is_given_up() -> None:
    """Its host answers, so nothing breaks the connection but we."""

    def serve_nothing(connection: Connection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                connection.receive()

    def serve(connection: Connection) -> None:
        first_runs(connection, ByteWeights(SIZES, content_seed=1), 2)
        serve_nothing(connection)

    assert "sent nothing for 0.2 s after 32 bytes" in reason(serve, idle=0.2)
    assert "sent nothing for 0.2 s after 0 bytes" in reason(serve_nothing, idle=0.2)


def test_all_reasons_are_told_where_nobody_gives() -> None:
    target = ByteWeights(SIZES)
    with twin(giving(None)) as address, pytest.raises(NotTaken) as refused:
        taken(UNUSED_ADDRESS, address, "no address", into=target)
    assert [word in str(refused.value) for word in (UNUSED_ADDRESS, "does not lend", "no address")] == [True] * 3
    assert target.written == []


def test_a_twin_that_takes_and_goes_leaves_the_giver_as_it_was() -> None:
    source = ByteWeights(SIZES, content_seed=1)

    class Reading(ByteWeights):
        def read(self, run: Run) -> memoryview:
            gone.wait(PATIENCE_SECONDS)
            return super().read(run)

    gone = threading.Event()
    slow = Reading(SIZES, content_seed=1)
    with twin(giving(slow)) as address:
        with pytest.raises(NotTaken, match="sent nothing"):
            taken(address, into=ByteWeights(SIZES), idle=0.2)
        gone.set()
        target = ByteWeights(SIZES)
        taken(address, into=target)
    assert target.content == source.content
