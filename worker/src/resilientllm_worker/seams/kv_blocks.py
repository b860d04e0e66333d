"""Seam: the content of KV blocks, between vLLM's cache tensors and plain host memory.

Relies on ``runner.kv_caches`` as vllm/v1/worker/utils.py, ``copy_kv_cache_blocks_inplace``, reads it: one tensor for
each layer, whose first dimension counts blocks, or several kernel blocks for each. Layers that share KV are one view.
In some layouts a block of all layers is one run of a storage that holds nothing else, and is moved as that.

A block is moved as its bytes in memory order, whatever order the tensor's dimensions are in; `KVBlocks.layout` tells
whether that means the same on another stage. It depends neither on the number of blocks nor on the device.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


class KVBlocks:
    """All layers' KV of this rank, block by block.

    Any number of threads may read and write at the same time; that nobody else uses the slots is the caller's business.
    On return everything has been moved, on a GPU too.
    """

    def __init__(self, caches: Sequence[torch.Tensor], num_blocks: int) -> None:
        """``caches`` is the runner's list, of ``num_blocks`` scheduler's blocks each.

        Raises:
            ValueError: there is no tensor, they are on several devices, or one has no whole number of kernel blocks.
        """
        devices = {cache.device for cache in caches}
        if len(devices) != 1:
            raise ValueError(f"expected KV cache tensors on one device, found {sorted(map(str, devices))}")
        (device,) = devices
        parts = list(_parts(caches, num_blocks))
        self._num_blocks = num_blocks
        self.block_bytes = sum(math.prod(part.rows.shape[1:]) for part in parts)
        """Of all layers of one block."""
        described = repr([part.description for part in parts])
        self.layout = f"{self.block_bytes}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"
        """Equal where one side's bytes of a block are the other's."""
        tensors = [part.rows for part in parts]
        self._mover: _HostMover | _DeviceMover = (
            _HostMover(tensors) if device.type == "cpu" else _DeviceMover(tensors, self.block_bytes)
        )

    def read(self, slots: Sequence[int], into: memoryview) -> None:
        """Copies the blocks in ``slots``, in this order, to the first ``len(slots) * block_bytes`` bytes of ``into``.

        Raises:
            IndexError: there is no such slot.
            ValueError: ``into`` is too short.
        """
        self._mover.read(self._checked(slots), self._matrix(into, len(slots)))

    def write(self, slots: Sequence[int], data: memoryview) -> None:
        """The inverse of `read`; every slot at most once. Raises what `read` raises."""
        self._mover.write(self._checked(slots), self._matrix(data, len(slots)))

    def _checked(self, slots: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """NumPy would take a negative slot from the end."""
        array = np.asarray(slots, np.int64)
        if len(array) and not 0 <= int(array.min()) <= int(array.max()) < self._num_blocks:
            raise IndexError(f"slots {array.min()} to {array.max()}: the cache has 0 to {self._num_blocks - 1}")
        return array

    def _matrix(self, memory: memoryview, blocks: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A row for each block."""
        count = blocks * self.block_bytes
        if memory.nbytes < count:
            raise ValueError(f"{blocks} blocks of {self.block_bytes} bytes are not {memory.nbytes} bytes")
        return np.frombuffer(memory, np.uint8, count).reshape(blocks, self.block_bytes)


@dataclass(frozen=True)
class _Part:
    """What one copy can move of every block."""

    rows: torch.Tensor
    """uint8, ``[num_blocks, …]``, the other dimensions in the order in which they lie in memory."""
    description: object


def _parts(caches: Sequence[torch.Tensor], num_blocks: int) -> Iterator[_Part]:
    seen: set[int] = set()
    whole: dict[int, list[object]] = {}
    for cache in caches:
        if cache.data_ptr() in seen:
            continue
        seen.add(cache.data_ptr())
        kernel_blocks, remainder = divmod(cache.shape[0], num_blocks)
        if remainder or not kernel_blocks:
            raise ValueError(f"{cache.shape[0]} kernel blocks are not a multiple of {num_blocks} blocks")
        blocks = cache.unflatten(0, (num_blocks, kernel_blocks))
        order = sorted(range(1, blocks.dim()), key=lambda axis: _span(blocks, axis), reverse=True)
        shape = [blocks.shape[axis] for axis in order]
        storage = cache.untyped_storage()
        stride_bytes = blocks.stride(0) * blocks.element_size()
        if storage.nbytes() == num_blocks * stride_bytes:
            if storage.data_ptr() not in whole:
                whole[storage.data_ptr()] = []
                run = torch.empty(0, dtype=torch.uint8, device=cache.device).set_(storage)
                yield _Part(run.view(num_blocks, -1), whole[storage.data_ptr()])
            offset = cache.data_ptr() - storage.data_ptr()
            steps = [blocks.stride(axis) for axis in order if blocks.shape[axis] > 1]
            whole[storage.data_ptr()].append((str(cache.dtype), order, shape, offset, steps))
        else:
            rows = blocks.permute(0, *order).view(torch.uint8)
            yield _Part(rows, (str(cache.dtype), order, shape))


def _span(blocks: torch.Tensor, axis: int) -> float:
    """For sorting. The stride of a dimension of size 1 says nothing, and may differ with the number of blocks."""
    return blocks.stride(axis) if blocks.shape[axis] > 1 else math.inf


class _HostMover:
    """By NumPy, which like torch lets go of the GIL, but starts no threads of its own beside those that serve."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = [part.numpy() for part in parts]
        self._columns = _columns(parts)

    def read(self, slots: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        for part, columns in zip(self._parts, self._columns, strict=True):
            rows[:, columns].reshape(len(slots), *part.shape[1:])[...] = part[slots]

    def write(self, slots: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        for part, columns in zip(self._parts, self._columns, strict=True):
            part[slots] = rows[:, columns].reshape(len(slots), *part.shape[1:])


class _DeviceMover:
    """On a stream of its own, so that it waits for no step and no step for it, and over pinned memory, once a call.

    What is read was written by steps that have ended, and what is written is used by steps that begin after `write` has
    returned; so the streams need no other order than that.
    """

    def __init__(self, parts: Sequence[torch.Tensor], block_bytes: int) -> None:
        self._parts = parts
        self._columns = _columns(parts)
        self._block_bytes = block_bytes
        self._device = parts[0].device
        self._stream = torch.cuda.Stream(self._device)
        self._lock = threading.Lock()
        """Guards the memory below, which only grows."""
        self._pinned = torch.empty(0, dtype=torch.uint8)
        self._staging = torch.empty(0, dtype=torch.uint8, device=self._device)

    def read(self, slots: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        with self._lock, torch.cuda.stream(self._stream):
            pinned, staging = self._memory(len(slots))
            index = torch.from_numpy(slots).to(self._device)
            for part, columns in zip(self._parts, self._columns, strict=True):
                staging[:, columns] = part.index_select(0, index).view(len(slots), -1)
            pinned.copy_(staging, non_blocking=True)
            self._stream.synchronize()
            np.copyto(rows, pinned.numpy())

    def write(self, slots: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        with self._lock, torch.cuda.stream(self._stream):
            pinned, staging = self._memory(len(slots))
            np.copyto(pinned.numpy(), rows)
            index = torch.from_numpy(slots).to(self._device)
            staging.copy_(pinned, non_blocking=True)
            for part, columns in zip(self._parts, self._columns, strict=True):
                part.index_copy_(0, index, staging[:, columns].reshape(len(slots), *part.shape[1:]))
            self._stream.synchronize()

    def _memory(self, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        count = blocks * self._block_bytes
        if count > self._pinned.numel():
            self._pinned = torch.empty(count, dtype=torch.uint8, pin_memory=True)
            self._staging = torch.empty(count, dtype=torch.uint8, device=self._device)
        shape = (blocks, self._block_bytes)
        return self._pinned[:count].view(shape), self._staging[:count].view(shape)


def _columns(parts: Sequence[torch.Tensor]) -> list[slice]:
    """Where each part lies among a block's bytes."""
    edges = [0]
    for part in parts:
        edges.append(edges[-1] + math.prod(part.shape[1:]))
    return [slice(start, end) for start, end in itertools.pairwise(edges)]
