"""A model's weights as this package sees them: tensors by name, and their memory."""

from __future__ import annotations

from typing import Protocol

from resilientllm_worker.protocol.messages import TensorHeader
from resilientllm_worker.weights.runs import Run


class WeightMemory(Protocol):
    """`seams.weights.ModelWeights` is one. Any number of threads may use it; each takes a mover of its own."""

    @property
    def tensors(self) -> list[TensorHeader]:
        """Each once, in an order that only the model decides."""

    def mover(self) -> Mover:
        """For one transfer, which is for one thread."""


class Mover(Protocol):
    def read(self, run: Run) -> memoryview:
        """The content of ``run``, good until the next call of this mover."""

    def landing(self, nbytes: int) -> memoryview:
        """Memory to receive a run in; good until the next call but `write`."""

    def write(self, run: Run, content: memoryview) -> None:
        """Makes ``content`` that of ``run``. On return it is there, on a GPU too."""
