"""What a channel asks of the kernel."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from resilientllm_worker.engine.channel import peer_timeout_seconds
from resilientllm_worker.transport.connection import PEER_TIMEOUT_SECONDS


def test_a_lost_packet_counts_as_silence_from_when_it_was_sent() -> None:
    assert abs(peer_timeout_seconds(0.8) - 0.4) < 1e-9


@given(st.floats(0.02, 3600.0))
def test_the_kernel_never_waits_for_longer_than_the_engine_nor_for_ever(silence: float) -> None:
    assert (
        silence / 2 <= peer_timeout_seconds(silence) < silence or peer_timeout_seconds(silence) == PEER_TIMEOUT_SECONDS
    )
