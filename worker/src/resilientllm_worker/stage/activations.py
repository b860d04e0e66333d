"""Hidden states between a tensor and its memory: what a link sends and what it receives into."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from resilientllm_worker.protocol.messages import Activation, Stamp, TensorHeader

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class BadActivation(Exception):
    """A header that describes no tensor of ours."""


def describe(tensors: Mapping[str, torch.Tensor], stamp: Stamp, step: int) -> tuple[Activation, list[memoryview]]:
    """Header and memory of ``tensors``, in order. The memory is the tensors' own if they lie in host memory."""
    headers: list[TensorHeader] = []
    buffers: list[memoryview] = []
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8)
        buffers.append(memoryview(flat.numpy()))
        headers.append(TensorHeader(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat.numel()))
    return Activation(stamp, step, headers), buffers


class Landing:
    """Fresh host memory for one `Activation`; `tensors` are views of it."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.tensors: dict[str, torch.Tensor] = {}

    def allocate(self, header: Activation) -> list[memoryview]:
        """Raises `BadActivation` if the header's figures contradict each other."""
        buffers: list[memoryview] = []
        for tensor in header.tensors:
            dtype = _DTYPES.get(tensor.dtype)
            if dtype is None:
                raise BadActivation(f"dtype {tensor.dtype!r} of {tensor.name!r}: expected one of {', '.join(_DTYPES)}")
            if any(side < 0 for side in tensor.shape) or math.prod(tensor.shape) * dtype.itemsize != tensor.nbytes:
                raise BadActivation(
                    f"{tensor.name!r}: shape {tensor.shape} of {tensor.dtype} is not {tensor.nbytes} bytes"
                )
            memory = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
            buffers.append(memoryview(memory.numpy()))
            self.tensors[tensor.name] = memory.view(dtype).view(tensor.shape)
        return buffers
