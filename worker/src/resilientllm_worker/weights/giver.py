"""The giving end: sends this stage's weights to a twin that starts, beside the work and never in its way.

Weights do not change, so nothing has to be locked or waited for. The thread has low priority, and what it reads on a
GPU goes over a stream of its own.
"""

from __future__ import annotations

import logging
import time

from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, Weights, WeightsHello, WeightsWelcome
from resilientllm_worker.replication.priority import yield_to_serving
from resilientllm_worker.seams.launch import describe_difference
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.weights.memory import WeightMemory
from resilientllm_worker.weights.runs import checksum, runs

logger = logging.getLogger(__name__)


def give(connection: Connection, hello: WeightsHello, digest: str, memory: WeightMemory | None) -> None:
    """Answers ``hello``, and sends all of ``memory`` unless it has to refuse. None: this stage does not lend weights.

    Call it in a thread that does nothing else: it lowers the thread's priority.

    Raises:
        ConnectionClosed: the twin has gone.
    """
    yield_to_serving()
    refusal = _refusal(hello, digest, memory)
    if refusal or memory is None:
        logger.info("gives no weights to %s: %s", connection.peer, refusal)
        connection.send(WeightsWelcome(refusal, []))
        return
    started, sent = time.monotonic(), 0
    mover = memory.mover()
    connection.send(WeightsWelcome("", memory.tensors))
    for run in runs(memory.tensors):
        content = mover.read(run)
        connection.send(Weights(checksum(run, content), content.nbytes), [content])
        sent += content.nbytes
    logger.info("gave its weights to %s: %d bytes in %.2f s", connection.peer, sent, time.monotonic() - started)


def _refusal(hello: WeightsHello, digest: str, memory: WeightMemory | None) -> str:
    if hello.protocol != PROTOCOL_VERSION:
        return f"expected protocol {PROTOCOL_VERSION}, found {hello.protocol}"
    if memory is None:
        return "it does not lend its weights"
    if hello.digest != digest:
        return f"it is no copy of the same stage: {describe_difference(hello.digest, digest)}"
    return ""
