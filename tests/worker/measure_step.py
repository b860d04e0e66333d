"""What a step of decoding requests costs outside the model: `python -m tests.worker.measure_step [requests]`."""

from __future__ import annotations

import statistics
import sys
import threading
import time
import timeit
from collections.abc import Callable

import msgspec
from resilientllm_worker.protocol.messages import Activation, Stamp, TensorHeader
from resilientllm_worker.seams.model_output import decode_result, encode_result
from resilientllm_worker.seams.scheduler_output import decode_step, encode_step
from resilientllm_worker.stage.merge import merged, share, spans
from resilientllm_worker.tenancy.home import HomeBlocks
from resilientllm_worker.tenancy.pool import Pool
from resilientllm_worker.tenancy.translate import from_runner, to_runner
from resilientllm_worker.transport.connection import Connection, dial
from resilientllm_worker.transport.frame import HEADER_BYTES, Limits, decode_message, encode_frame
from resilientllm_worker.transport.link import LinkSender
from resilientllm_worker.transport.listener import Listener
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

STAMP = Stamp(1, 1)
TOKEN = b"token"
HIDDEN_BYTES = 4096 * 2


def main(requests: int) -> None:
    ids = [f"chatcmpl-{number:032x}" for number in range(requests)]
    scheduled = SchedulerOutput.make_empty()
    blocks = [([number + 1],) if number % 16 == 0 else None for number in range(requests)]
    scheduled.scheduled_cached_reqs = CachedRequestData(
        ids, set(), [[1]] * requests, {}, blocks, [1000] * requests, [40] * requests
    )
    scheduled.num_scheduled_tokens = dict.fromkeys(ids, 1)
    sampled = ModelRunnerOutput(ids, {name: place for place, name in enumerate(ids)}, [[5]] * requests)
    step, result = encode_step(scheduled, None, STAMP, 1), encode_result(sampled, STAMP, 1)
    home, guest = HomeBlocks(10_000), Pool(10_000, 1000).tenant(1)
    guest.serve()
    limits = Limits()
    both = [to_runner(step, "0/", home, 16), to_runner(step, "1/", guest, 16)]
    order = [request for each in both for request, _ in each.num_scheduled_tokens]
    of_both = msgspec.structs.replace(result, requests=order, sampled_token_ids=[[5]] * 2 * requests)
    step_frame, result_frame = (encode_frame(message, (), limits)[0][HEADER_BYTES:] for message in (step, result))
    parts: list[tuple[str, Callable[[], object]]] = [
        ("encode step", lambda: encode_frame(encode_step(scheduled, None, STAMP, 1), (), limits)),
        ("decode step", lambda: decode_step(decode_message(step_frame))),  # type: ignore[arg-type]
        ("translate, home", lambda: to_runner(step, "0/", home, 16)),
        ("translate, guest", lambda: to_runner(step, "1/", guest, 16)),
        ("encode result", lambda: encode_frame(encode_result(sampled, STAMP, 1), (), limits)),
        ("decode result", lambda: decode_result(decode_message(result_frame))),  # type: ignore[arg-type]
        ("translate result", lambda: from_runner(result, "")),
        ("merge", lambda: merged(both)),
        ("spans of merged", lambda: spans(order, [order[:requests], order[requests:]], dict.fromkeys(order, 1))),
        ("share of merged", lambda: share(of_both, "0/", STAMP, 1)),
    ]
    for name, part in parts:
        print(f"{name:18} {min(timeit.repeat(part, number=1000, repeat=5)) * 1000:8.1f} us")
    for rows in (requests, 512, 4096):
        link(rows)


def link(rows: int) -> None:
    """Hidden states and residual of ``rows`` tokens over loopback."""
    size = rows * HIDDEN_BYTES
    arrived = threading.Semaphore(0)
    memory = [memoryview(bytearray(size)) for _ in range(2)]

    def serve(connection: Connection) -> None:
        while True:
            connection.receive_into(lambda _: memory)
            arrived.release()

    listener = Listener("127.0.0.1", 0, TOKEN, serve)
    sender = LinkSender(dial(listener.address, TOKEN, 5))
    header = Activation(STAMP, 1, [TensorHeader(name, "bfloat16", (rows, 4096), size) for name in "hr"])
    buffers = [bytearray(size), bytearray(size)]
    posting, arriving = [], []
    for _ in range(20):
        start = time.perf_counter()
        posted = sender.post(header, buffers)
        posting.append(time.perf_counter() - start)
        arrived.acquire()
        arriving.append(time.perf_counter() - start)
        posted.wait()
    print(
        f"link, {rows:5} tokens: post {statistics.median(posting) * 1e6:6.0f} us, "
        f"arrived {statistics.median(arriving) * 1e6:7.0f} us"
    )
    sender.close()
    listener.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
