"""A twin whose weights are plain bytes, and one that starts and wants them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from resilientllm_worker.protocol.messages import PROTOCOL_VERSION, TensorHeader, WeightsHello
from resilientllm_worker.weights.runs import Run

DIGEST = '{"model": "tiny", "rank": 0}'
HELLO = WeightsHello(PROTOCOL_VERSION, 1, 0, DIGEST)


class ByteWeights:
    """A `WeightMemory`, and its own mover."""

    def __init__(self, sizes: Sequence[int], content_seed: int | None = None) -> None:
        """Zeros without ``content_seed``, as in a model that was just built."""
        self.tensors = [TensorHeader(f"layers.{place}", "uint8", (size,), size) for place, size in enumerate(sizes)]
        source = random.Random(content_seed)
        self.content = [bytearray(size if content_seed is None else source.randbytes(size)) for size in sizes]
        self.written: list[Run] = []

    def mover(self) -> ByteWeights:
        return self

    def read(self, run: Run) -> memoryview:
        return memoryview(self.content[run.tensor])[run.offset : run.offset + run.nbytes]

    def landing(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def write(self, run: Run, content: memoryview) -> None:
        self.read(run)[:] = content
        self.written.append(run)
