"""What checksums cost on commands and links: ``python -m bench.frame_checksums -o FILE``

Frames go over loopback TCP from one thread to another and are read as a stage reads them, with checksums and, in turns,
with a checksum that is always 0. The time is from the call that sends to the end of the one that receives, so it has
both ends' checksums. Hidden states are two bfloat16 tensors, as most models send; decode steps have a few rows, a
prefill has thousands.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any
from unittest.mock import patch

from resilientllm_cli.bench import machine
from resilientllm_worker.protocol.messages import Activation, CachedRequests, Message, Stamp, Step, TensorHeader
from resilientllm_worker.transport import frame
from resilientllm_worker.transport.connection import Connection
from resilientllm_worker.transport.frame import checksum

STAMP = Stamp(1, 1)
CASES = {
    "command, 8 requests decode": (8, None),
    "command, 256 requests decode": (256, None),
    "hidden states, 8 rows of 4096": (0, (8, 4096)),
    "hidden states, 256 rows of 8192": (0, (256, 8192)),
    "hidden states, prefill of 8192 rows of 8192": (0, (8192, 8192)),
}


def a_message(requests: int, shape: tuple[int, int] | None) -> tuple[Message, list[memoryview]]:
    if shape is None:
        ids = [f"cmpl-{number:032x}-0" for number in range(requests)]
        cached = CachedRequests(ids, [[5]] * requests, [None] * requests, [900] * requests, [40] * requests)
        return Step(STAMP, 1, [], cached, [(name, 1) for name in ids], [], [], [], [], None), []
    nbytes = 2 * shape[0] * shape[1]
    tensors = [TensorHeader(name, "bfloat16", shape, nbytes) for name in ("hidden_states", "residual")]
    return Activation(STAMP, 1, tensors), [memoryview(bytearray(nbytes)) for _ in tensors]


@contextmanager
def pair() -> Iterator[tuple[Connection, Connection]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    ends = Connection(near, "far"), Connection(far, "near")
    try:
        yield ends
    finally:
        for end in ends:
            end.close()


def trip_seconds(near: Connection, far: Connection, requests: int, shape: tuple[int, int] | None, runs: int) -> float:
    """The median of one message from end to end."""
    message, buffers = a_message(requests, shape)
    landing = [memoryview(bytearray(buffer.nbytes)) for buffer in buffers]
    arrived: SimpleQueue[float] = SimpleQueue()

    def read() -> None:
        for _ in range(runs):
            if isinstance(message, Activation):
                far.receive_into(lambda _: landing)
            else:
                far.receive()
            arrived.put(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    took = []
    for _ in range(runs):
        started = time.perf_counter()
        near.send(message, buffers)
        took.append(arrived.get() - started)
    reader.join()
    return median(took)


def measure(name: str, rounds: int) -> dict[str, Any]:
    requests, shape = CASES[name]
    nbytes = 0 if shape is None else 2 * 2 * shape[0] * shape[1]
    runs = 200 if nbytes < 1 << 20 else 40 if nbytes < 64 << 20 else 5
    both: dict[str, list[float]] = {"with": [], "without": []}
    with pair() as (near, far):
        for _ in range(rounds):
            both["with"].append(trip_seconds(near, far, requests, shape, runs))
            with patch.object(frame, "checksum", lambda parts: 0), patch.object(frame, "_short", lambda data: 0):
                both["without"].append(trip_seconds(near, far, requests, shape, runs))
    result: dict[str, Any] = {f"{mode}_us": round(1e6 * median(took), 1) for mode, took in both.items()}
    pairs = zip(both["with"], both["without"], strict=True)
    result["more_us"] = round(1e6 * median(mine - other for mine, other in pairs), 1)
    if shape is not None:
        _, buffers = a_message(requests, shape)
        started = time.perf_counter()
        for _ in range(runs):
            checksum(buffers)
        seconds = (time.perf_counter() - started) / runs
        result |= {"bytes": nbytes, "one_checksum_us": round(1e6 * seconds, 1)}
        result["one_checksum_gb_s"] = round(nbytes / seconds / 1e9, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of measurements for each case (default 15)")
    arguments = parser.parse_args()
    results = {}
    for name in CASES:
        results[name] = measure(name, arguments.rounds)
        print(f"{name}: {results[name]}", flush=True)
    result = {"frame_checksums": results, "machine": machine.describe(), "versions": machine.versions()}
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
