"""Seam: vLLM's pipeline-parallel group, with neighbours that can change between two steps.

vLLM asks ``parallel_state.get_pp_group()`` where in the pipeline it stands and moves hidden states through it. The
stock group is a communicator over all S×T processes: born with all of them, dead with any of them. `VirtualPipeline`
answers the same questions for a process whose ``torch.distributed`` world is its own T ranks, and moves tensors over
whatever links the step at hand was bound to.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

_SHM = "/dev/shm/"


class SendHandle(Protocol):
    """Work that reads a tensor's memory until `wait` returns."""

    def wait(self) -> None: ...


class Binding(NamedTuple):
    """The links of one step."""

    inbound: dict[str, torch.Tensor] | None
    """Hidden states of the previous stage, already here; None on the first stage."""
    send: Callable[[dict[str, torch.Tensor]], SendHandle] | None
    """Hands hidden states to the next stage; None on the last stage."""


class VirtualPipeline:
    """Stands in for ``GroupCoordinator`` as vLLM's ``_PP``. Stage ranks are the places in the pipeline."""

    def __init__(self, stage: int, stages: int, world_group: Any) -> None:
        self.rank = self.rank_in_group = stage
        self.world_size = stages
        self.ranks = list(range(stages))
        self.local_rank = world_group.local_rank
        self.device = world_group.device
        self.unique_name = "pp:virtual"
        # Only ever used over this stage's own ranks; nothing of vLLM's sends across stages through them.
        self.device_group = world_group.device_group
        self.cpu_group = world_group.cpu_group
        self.device_communicator = None
        self._binding: Binding | None = None

    @property
    def is_first_rank(self) -> bool:
        return self.rank == 0

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.world_size - 1

    @property
    def first_rank(self) -> int:
        return 0

    @property
    def last_rank(self) -> int:
        return self.world_size - 1

    @property
    def next_rank(self) -> int:
        return (self.rank + 1) % self.world_size

    @property
    def prev_rank(self) -> int:
        return (self.rank - 1) % self.world_size

    @contextlib.contextmanager
    def bound(self, binding: Binding) -> Iterator[None]:
        """Give the step that runs inside its links."""
        self._binding = binding
        try:
            yield
        finally:
            self._binding = None

    def irecv_tensor_dict(
        self, all_gather_group: Any = None, **_: Any
    ) -> tuple[dict[str, torch.Tensor], list[Any], list[Any]]:
        if self._binding is None or self._binding.inbound is None:
            raise RuntimeError("the model asked for hidden states, but this step was bound without any")
        return self._binding.inbound, [], []

    def isend_tensor_dict(
        self, tensors: dict[str, torch.Tensor], all_gather_group: Any = None, **_: Any
    ) -> list[SendHandle]:
        if self._binding is None or self._binding.send is None:
            raise RuntimeError("the model sent hidden states, but this step was bound without a next stage")
        handle = self._binding.send(tensors)
        # The caller drops the first handle (it is the stock group's metadata) and waits for the others.
        return [handle, handle]

    @contextlib.contextmanager
    def graph_capture(self, context: Any = None) -> Iterator[Any]:
        yield context

    def make_sibling_device_group(self, group_desc: str = "") -> Any:
        return self.device_group

    def broadcast_object(self, obj: Any = None, src: int = 0) -> Any:
        raise RuntimeError("nothing is broadcast across stages: every stage must come to the same object by itself")

    def barrier(self) -> None:
        """Stages never wait for each other."""

    def destroy(self) -> None:
        """Owns nothing: the links belong to the stage server, the process groups to the world."""


def install(
    stage: int, stages: int, tensor_parallel: int, rank: int, init_method: str, backend: str
) -> VirtualPipeline:
    """Make this process's ``torch.distributed`` world of ``tensor_parallel`` ranks, and a `VirtualPipeline` over it.

    Must run under ``set_current_vllm_config`` and before the worker's ``init_device``, which finds the groups made and
    only compares sizes (vllm/distributed/parallel_state.py, ``ensure_model_parallel_initialized``).
    """
    from vllm.distributed import parallel_state

    # The CPU worker names its shared-memory group by this, and sets it too late for the group made here
    # (vllm/v1/worker/cpu_worker.py, ``init_device``).
    name = Path(init_method.removeprefix("file://")).name
    os.environ["VLLM_DIST_IDENT"] = name
    parallel_state.init_distributed_environment(tensor_parallel, rank, init_method, rank, backend)
    parallel_state.initialize_model_parallel(tensor_parallel, 1, backend=backend)
    if tensor_parallel > 1 and rank == 0:
        _unlink_shared_memory(name)
    stock = parallel_state._PP
    if stock is not None:
        stock.destroy()
    group = VirtualPipeline(stage, stages, parallel_state.get_world_group())
    parallel_state._PP = group
    return group


def _unlink_shared_memory(name: str) -> None:
    """Take away the names of what all ranks have mapped by now, so that the kernel frees it when the last of them ends.

    Otherwise ranks that are killed leave it in memory for ever: vLLM's collectives on a CPU, named by us, and its
    message queue (``ShmRingBuffer``), named by Python, whose own tracker of such names is killed with them.
    """
    mapped = {line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if _SHM in line}
    for path in map(Path, mapped):
        if path.name.startswith("psm_"):
            memory = SharedMemory(path.name)
            memory.unlink()  # and the tracker forgets it
            memory.close()
        elif path.name.startswith(name):
            path.unlink()
