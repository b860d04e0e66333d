"""The vLLM worker of one rank: loads once, allocates once, runs steps. Knows nothing of tenants or networks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from resilientllm_worker.protocol.messages import KVGroup, Step, StepResult
from resilientllm_worker.seams import kv_cache, pipeline_group
from resilientllm_worker.seams.kv_blocks import KVBlocks
from resilientllm_worker.seams.kv_cache_spec import encode_spec
from resilientllm_worker.seams.model_output import encode_result
from resilientllm_worker.seams.pipeline_group import Binding, SendHandle
from resilientllm_worker.seams.runner import adapter_for
from resilientllm_worker.seams.scheduler_output import decode_step
from resilientllm_worker.stage.merge import Room

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

TENANTS = 2
"""Home and one guest."""


@dataclass(frozen=True)
class KVNeeds:
    """What this rank's layers ask of a KV cache."""

    specs: list[tuple[str, bytes]]
    layouts: list[str]
    available_bytes: int
    """For home and pool together."""
    tasks: list[str]


@dataclass(frozen=True)
class KVCache:
    """The one KV tensor: block ids below ``home_blocks`` are the home tenant's, the next ``pool_blocks`` a guest's."""

    layout: str
    home_blocks: int
    pool_blocks: int
    groups: tuple[KVGroup, ...]
    block_size: int
    """Tokens per block, of all groups."""
    language_model_seconds: float
    encoder_seconds: float


class Model:
    """Not thread-safe: after `load`, one thread at a time."""

    def __init__(self, config: VllmConfig, stage: int, rank: int) -> None:
        self._config = config
        self._stage = stage
        self._rank = rank
        self._adapter = adapter_for(config)
        self._pipeline: pipeline_group.VirtualPipeline
        self._wrapper: Any = None
        self._needs: KVNeeds | None = None
        self.kv: KVCache | None = None

    @property
    def stages(self) -> int:
        return int(self._config.parallel_config.pipeline_parallel_size)

    @property
    def tensor_parallel(self) -> int:
        return int(self._config.parallel_config.tensor_parallel_size)

    @property
    def is_last_stage(self) -> bool:
        return self._stage == self.stages - 1

    def load(self, init_method: str) -> None:
        """Make the rank's world, build the runner, load the weights. Needs no other stage."""
        from vllm.config import set_current_vllm_config
        from vllm.platforms import current_platform
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        config = self._config
        global_rank = self._stage * self.tensor_parallel + self._rank
        config.parallel_config.rank = global_rank  # vLLM reads from it which layers are ours
        # The runner keeps state of home's and guest's requests side by side.
        config.scheduler_config.max_num_seqs *= TENANTS
        self._adapter.before_construction(config)
        self._wrapper = wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=global_rank)
        wrapper.init_worker(
            [
                {
                    "vllm_config": config,
                    "local_rank": self._rank,
                    "rank": global_rank,
                    "distributed_init_method": init_method,
                    "is_driver_worker": self._rank == 0,
                    "shared_worker_lock": None,
                }
            ]
        )
        with set_current_vllm_config(config):
            self._pipeline = pipeline_group.install(
                self._stage, self.stages, self.tensor_parallel, self._rank, init_method, current_platform.dist_backend
            )
        wrapper.init_device()
        wrapper.load_model()
        current_platform.update_block_size_for_backend(config)

    def adopt_thread(self) -> None:
        """Call once in the thread that will run steps: the device belongs to a thread, and `load` had its own."""
        device = self._wrapper.worker.model_runner.device
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)

    def kv_needs(self) -> KVNeeds:
        """Profiles memory the first time; later answers are the recorded ones, since KV may be resident by then."""
        if self._needs is None:
            worker = self._wrapper.worker
            specs = worker.get_kv_cache_spec()
            with self._loopback():
                available = int(worker.determine_available_memory())
            self._needs = KVNeeds(
                specs=[(name, encode_spec(spec)) for name, spec in specs.items()],
                layouts=list(worker.get_supported_kv_cache_layouts()),
                available_bytes=available,
                tasks=list(worker.get_supported_tasks()),
            )
        return self._needs

    def kv_needs_of_ranks(self) -> list[KVNeeds]:
        """Of all ranks of the stage, in order."""
        return [self.kv_needs()]

    def blocks_of_longest_request(self, groups: Sequence[KVGroup]) -> int:
        """How many KV blocks a request may have at once. Raises `ValueError`: the groups are not what we can run."""
        return kv_cache.blocks_of_longest_request(self._config, groups)

    def allocate(self, layout: str, home_blocks: int, pool_blocks: int, groups: Sequence[KVGroup]) -> KVCache:
        """Allocate home and pool as one tensor and warm up. Once: the same figures again return what is there.

        Raises:
            ValueError: a cache of another shape is resident.
        """
        wanted = tuple(groups)
        if self.kv is not None:
            if (self.kv.layout, self.kv.home_blocks, self.kv.groups) != (layout, home_blocks, wanted):
                raise ValueError(
                    f"this stage's KV cache was agreed as {self.kv.home_blocks} home blocks in layout "
                    f"{self.kv.layout}, now asked for {home_blocks} in {layout}; "
                    "restart the stages of the instance after such a change"
                )
            return self.kv
        from vllm.utils.gc_utils import freeze_gc_heap

        self.kv_needs()
        self._wrapper.worker.set_kv_cache_layout(layout)
        config, block_size = kv_cache.plan_home_and_pool(
            self._config, list(self._wrapper.worker.get_kv_cache_spec()), wanted, layout, home_blocks, pool_blocks
        )
        self._wrapper.global_rank = 0  # it picks its own entry of the list by this
        self._wrapper.initialize_from_config([config])
        with self._loopback():
            times = self._wrapper.compile_or_warm_up_model()
        self._adapter.after_allocation(self._wrapper.worker.model_runner)
        freeze_gc_heap()  # a collection over all that is there by now would hold up every thread, heartbeats included
        self.kv = KVCache(
            layout=layout,
            home_blocks=home_blocks,
            pool_blocks=pool_blocks,
            groups=wanted,
            block_size=block_size,
            language_model_seconds=float(times.language_model),
            encoder_seconds=float(times.encoder),
        )
        return self.kv

    def block_store(self) -> KVBlocks | None:
        """Access to the content of the allocated KV cache; None where this process has only a part of it.

        None too for models of several groups, whose blocks nobody seals.
        """
        if self.kv is None or self.tensor_parallel > 1 or len(self.kv.groups) > 1:
            return None
        return KVBlocks(self._wrapper.worker.model_runner.kv_caches, self.kv.home_blocks + self.kv.pool_blocks)

    def run(
        self,
        step: Step,
        inbound: dict[str, torch.Tensor] | None,
        send: Callable[[dict[str, torch.Tensor]], SendHandle] | None,
    ) -> StepResult | None:
        """Execute and sample one step, which stay together: the runner has one slot for a step in between.

        ``step`` speaks of runner-wide request ids and of blocks of the one KV tensor. Returns the result on the last
        stage's first rank, None elsewhere.
        """
        from vllm.config import set_current_vllm_config
        from vllm.v1.outputs import AsyncModelRunnerOutput

        worker, runner = self._wrapper.worker, self._wrapper.worker.model_runner
        output, grammar = decode_step(step)
        output = self._adapter.prepare(runner, output)
        if inbound is not None and runner.device.type != "cpu":
            inbound = {name: tensor.to(runner.device) for name, tensor in inbound.items()}
        if self.tensor_parallel > 1 and self._stage > 0:
            inbound = self._shared(inbound, output.total_num_scheduled_tokens)
        if self._rank > 0 and not self.is_last_stage:
            send = _send_nowhere  # rank 0 sends for all: every rank has the whole hidden states
        with set_current_vllm_config(self._config), self._pipeline.bound(Binding(inbound, send)):
            result = worker.execute_model(output)
            if result is None:
                if self.is_last_stage:
                    self._adapter.before_sampling(runner)
                result = worker.sample_tokens(grammar)
        if isinstance(result, AsyncModelRunnerOutput):
            result = result.get_output()
        if not self.is_last_stage or self._rank != 0:
            return None
        return encode_result(result, step.stamp, step.step)

    def merging_room(self) -> Room | None:
        """What fits into one step of several tenants; None where each must have a step of its own."""
        from vllm.config import CUDAGraphMode

        # Graphs pad a batch, and a tenant's rows are followed by the other's where its next stage expects padding.
        if self._config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            return None
        if not self._adapter.knows_rows(self._wrapper.worker.model_runner):
            return None
        scheduler = self._config.scheduler_config
        return Room(tokens=scheduler.max_num_batched_tokens, requests=scheduler.max_num_seqs)

    def row_order(self, step: Step) -> list[str]:
        """The requests of ``step`` in the order that their rows of hidden states have."""
        return self._adapter.row_order(self._wrapper.worker.model_runner, dict(step.num_scheduled_tokens))

    def requests(self) -> Collection[str]:
        """Runner-wide ids of all requests that the runner holds state of."""
        return self._adapter.requests(self._wrapper.worker.model_runner)

    @contextlib.contextmanager
    def _loopback(self) -> Iterator[None]:
        """Links that lead nowhere, for profiling and warm-up: a stage boots without knowing any other.

        V2's warm-up runs real steps through the worker's own ``execute_model``, links included.
        """
        worker = self._wrapper.worker
        stock = worker.execute_model

        def execute(output: Any) -> Any:
            tokens = output.total_num_scheduled_tokens
            inbound = self._empty_activations(tokens) if self._stage > 0 and tokens else None
            with self._pipeline.bound(Binding(inbound, _send_nowhere)):
                return stock(output)

        worker.execute_model = execute
        try:
            yield
        finally:
            del worker.execute_model

    def _shared(self, inbound: dict[str, torch.Tensor] | None, tokens: int) -> dict[str, torch.Tensor]:
        """Rank 0's hidden states on every rank. Names and shapes follow from the model, so nothing describes them."""
        tensors = self._empty_activations(tokens) if inbound is None else inbound
        for name in sorted(tensors):
            torch.distributed.broadcast(tensors[name], src=0)
        return tensors

    def _empty_activations(self, tokens: int) -> dict[str, torch.Tensor]:
        runner = self._wrapper.worker.model_runner
        made = runner.get_model().make_empty_intermediate_tensors(
            batch_size=tokens, dtype=self._config.model_config.dtype, device=runner.device
        )
        return dict(made.tensors)


def _send_nowhere(tensors: dict[str, torch.Tensor]) -> SendHandle:
    return _Done()


class _Done:
    def wait(self) -> None:
        """Nothing was sent."""
