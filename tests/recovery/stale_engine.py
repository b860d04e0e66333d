"""An engine that was replaced, or cut off: it knows token and stamps, and commands stages as if they were its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from resilientllm_api.plan import Limits
from resilientllm_worker.protocol.messages import (
    PROTOCOL_VERSION,
    EngineHello,
    Failed,
    Fence,
    Forget,
    Release,
    ReplicateTo,
    Seal,
    Sealed,
    StageWelcome,
    Stamp,
    Stitch,
    Stitched,
)
from resilientllm_worker.transport.connection import Connection, dial

from tests.worker.stage.builders import a_step

DIAL_SECONDS = 10.0
BEAT_SECONDS = 60.0
STEP = 10**6
"""Later than all that were queued, so that only who sends it is wrong."""
BLOCKS = (1).to_bytes(4, "little")


def command(address: str, token: str, instance: int) -> list[str]:
    """Orders of every kind to a stage, as an older engine, of an older topology, and with the very stamp in force.

    Returns why it would not take the place, each time.
    """
    digest = _greet(address, token, instance, "").config_digest
    refusals = []
    with closing(dial(address, token.encode(), DIAL_SECONDS)) as connection:
        stamp = _hello(connection, instance, digest).stamp
        for old in _not_newer(stamp):
            connection.send(Fence(old))
            connection.send(a_step(STEP, old.epoch, old.term, zero_block_ids=[1]))
            connection.send(Sealed(old, [Seal(1, 1, 0, 0, 1, b"key")], [1]))
            connection.send(Forget(old, BLOCKS))
            connection.send(ReplicateTo(old, None))
            connection.send(Release(old))
            refusals.append(_stitch(connection, old))
    return refusals


def _not_newer(stamp: Stamp) -> Iterator[Stamp]:
    yield Stamp(stamp.term - 1, stamp.epoch + 100)
    yield Stamp(stamp.term, max(stamp.epoch - 1, 0))
    yield stamp


def _greet(address: str, token: str, instance: int, digest: str) -> StageWelcome:
    with closing(dial(address, token.encode(), DIAL_SECONDS)) as connection:
        return _hello(connection, instance, digest)


def _hello(connection: Connection, instance: int, digest: str) -> StageWelcome:
    connection.send(EngineHello(PROTOCOL_VERSION, instance, digest, BEAT_SECONDS, Limits().step_floor_seconds))
    welcome = connection.receive()
    assert isinstance(welcome, StageWelcome)
    return welcome


def _stitch(connection: Connection, stamp: Stamp) -> str:
    connection.send(Stitch(1, stamp, None))
    while not isinstance(answer := connection.receive(), Failed):
        assert not isinstance(answer, Stitched), "it obeys"
    return answer.reason
