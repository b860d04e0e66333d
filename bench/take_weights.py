"""Takes a stage's weights again and again, in bursts, and keeps none: what does giving cost the stage that serves?

Says ``ready`` when it could begin, begins when a line comes in, and says of each burst when it was, on the monotonic
clock that all processes of a machine share, and how many bytes came. Its own flags come first, then those of a stage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TextIO

from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, Weights, WeightsHello, WeightsWelcome
from resilientllm_worker.seams.launch import make_config, make_parser, prepare
from resilientllm_worker.seams.weights import weights_digest
from resilientllm_worker.stage.background import run_nicely
from resilientllm_worker.transport.connection import dial
from resilientllm_worker.weights.runs import RUN_BYTES, checksum, runs

CONNECT_SECONDS = 5.0


def main() -> None:
    own = argparse.ArgumentParser()
    own.add_argument("--address", required=True)
    own.add_argument("--token-file", type=Path, required=True)
    own.add_argument("--stage", type=int, required=True)
    own.add_argument("--bursts", type=int, required=True)
    own.add_argument("--seconds", type=float, required=True, help="of a burst, and of the pause before each")
    mine, flags = own.parse_known_args()
    # vLLM logs to standard output, where only answers are wanted.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run_nicely(lambda: _bursts(mine, flags, answers))


def _bursts(mine: argparse.Namespace, flags: list[str], answers: TextIO) -> None:
    args = make_parser("take-weights", "").parse_args(flags)
    prepare(args)
    digest = weights_digest(make_config(args), mine.stage, 0)
    hello = WeightsHello(PROTOCOL_VERSION, mine.stage, 0, digest)
    token = mine.token_file.read_bytes().strip()
    print("ready", file=answers, flush=True)
    sys.stdin.readline()
    for _ in range(mine.bursts):
        time.sleep(mine.seconds)
        began, taken = time.monotonic(), 0
        while time.monotonic() < began + mine.seconds:
            taken += _take(mine.address, token, hello)
        print(json.dumps({"began": began, "ended": time.monotonic(), "bytes": taken}), file=answers, flush=True)
    time.sleep(mine.seconds)


def _take(address: str, token: bytes, hello: WeightsHello) -> int:
    connection = dial(address, token, CONNECT_SECONDS)
    connection.send(hello)
    welcome = connection.receive()
    assert isinstance(welcome, WeightsWelcome) and not welcome.refusal, welcome
    landing, taken = memoryview(bytearray(RUN_BYTES)), 0

    def allocate(header: Weights) -> memoryview:
        return landing[: header.body_bytes]

    for run in runs(welcome.tensors):
        assert connection.receive_weights(allocate).checksum == checksum(run, landing[: run.nbytes])
        taken += run.nbytes
    connection.close()
    return taken


if __name__ == "__main__":
    main()
