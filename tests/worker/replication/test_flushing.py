"""Whoever asks is told when all that was sealed until then is kept, or cannot be."""

from __future__ import annotations

import threading

from resilientllm_worker.protocol.messages import Stamp

from tests.worker.replication.builders import Source, keeping, serving
from tests.worker.transport.builders import PATIENCE_SECONDS, eventually

FOR_EVER_SECONDS = 3600.0


def flush(source: Source) -> threading.Event:
    done = threading.Event()
    source.replicator.flush(done.set)
    return done


def test_what_would_linger_is_sent_at_once() -> None:
    with serving(linger_seconds=FOR_EVER_SECONDS, batch_blocks=64) as source, keeping() as keeper:
        source.redirect(keeper)
        source.compute(*range(1, 30))
        assert flush(source).wait(PATIENCE_SECONDS)
        assert keeper.contents().keys() == source.numbers


def test_nobody_is_told_before_the_keeper_has_it() -> None:
    with serving(linger_seconds=FOR_EVER_SECONDS) as source, keeping() as keeper:
        keeper.cache.write_gate.close()
        source.redirect(keeper)
        source.compute(1, 2)
        done = flush(source)
        keeper.cache.write_gate.await_someone()
        assert not done.is_set()
        keeper.cache.write_gate.open()
        assert done.wait(PATIENCE_SECONDS)
        assert source.is_kept_by(keeper)


def test_nothing_to_send_is_told_at_once() -> None:
    with serving() as source, keeping() as keeper:
        assert flush(source).is_set(), "there is nobody to send to"
        source.redirect(keeper)
        source.compute(1)
        assert eventually(lambda: source.is_kept_by(keeper))
        assert flush(source).is_set()


def test_what_was_sealed_before_there_was_a_keeper_counts() -> None:
    with serving(linger_seconds=FOR_EVER_SECONDS) as source, keeping() as keeper:
        source.compute(1, 2)
        source.redirect(keeper)
        assert flush(source).wait(PATIENCE_SECONDS)
        assert source.is_kept_by(keeper)


def test_what_is_refused_is_not_waited_for() -> None:
    with serving(linger_seconds=FOR_EVER_SECONDS) as source, keeping(capacity=2) as keeper:
        source.redirect(keeper)
        source.compute(1, 2, 3)
        assert flush(source).wait(PATIENCE_SECONDS)
        assert len(keeper.contents()) == 2


def test_nobody_waits_for_a_keeper_that_was_given_up() -> None:
    with serving(linger_seconds=FOR_EVER_SECONDS) as source, keeping() as first, keeping() as second:
        first.cache.write_gate.close()
        source.redirect(first)
        source.compute(1, 2)
        done = flush(source)
        first.cache.write_gate.await_someone()
        source.redirect(second, Stamp(3, 8))
        assert done.wait(PATIENCE_SECONDS)
        last = flush(source)
        source.replicator.close()
        assert last.wait(PATIENCE_SECONDS)
