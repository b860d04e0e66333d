"""Seam: vLLM's planning of the KV cache, for a tensor that is larger than what the engine schedules on.

The engine plans with home blocks only, so its scheduler never hands out a pool block. Each stage allocates home and
pool as one tensor: strides depend on the number of blocks in some layouts, so the larger config is planned anew and
not patched (vllm/v1/core/kv_cache_utils.py, ``get_kv_cache_config_from_groups``).

Which layers share a block table follows from the layers of all stages, so a stage takes the groups from its engine.
All groups draw their blocks from one pool (vllm/v1/core/kv_cache_coordinator.py), so a block is of one group at a time
and its id alone says which block it is; the null block stands for those that a sliding window has left behind.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from resilientllm_worker.protocol.messages import KVGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def plan_home_and_pool(
    config: VllmConfig,
    layers: Collection[str],
    groups: Sequence[KVGroup],
    layout: str,
    home_blocks: int,
    pool_blocks: int,
) -> tuple[Any, int]:
    """The ``KVCacheConfig`` of one rank's ``layers`` with ``home_blocks + pool_blocks`` blocks, and tokens per block.

    Raises:
        ValueError: the groups are not those of ``layers``, or a step's blocks could not be translated for them.
    """
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        kv_cache_groups_tp_replicas,
        resolve_cache_hit_alignment_tokens,
        resolve_kv_cache_block_sizes,
    )

    planned = _planned(groups)
    block_size = _block_size(planned)
    named = sorted(name for group in groups for name in group.layers)
    if named != sorted(layers):
        raise ValueError(f"the engine's layers {named} are not this stage's {sorted(layers)}")
    override, config.cache_config.num_gpu_blocks_override = config.cache_config.num_gpu_blocks_override, None
    try:
        one = get_kv_cache_config_from_groups(config, planned, 1 << 50)
        bytes_per_block = sum(tensor.size for tensor in one.kv_cache_tensors[:1]) // one.num_blocks
        total = home_blocks + pool_blocks
        planned_config = get_kv_cache_config_from_groups(config, planned, total * bytes_per_block)
    finally:
        config.cache_config.num_gpu_blocks_override = override
    if planned_config.num_blocks != total:
        raise ValueError(f"planned {total} KV blocks, vLLM made {planned_config.num_blocks} of them")
    scheduler_block_size, hash_block_size = resolve_kv_cache_block_sizes(planned_config, config)
    planned_config.kv_cache_layout = layout
    planned_config.hash_block_size = hash_block_size
    planned_config.cache_hit_alignment_tokens = resolve_cache_hit_alignment_tokens(
        planned_config, config, scheduler_block_size, hash_block_size
    )
    parallel = config.parallel_config
    planned_config.kv_tp_replicas = kv_cache_groups_tp_replicas(
        planned, parallel.tensor_parallel_size, parallel.decode_context_parallel_size
    )
    return planned_config, block_size


def blocks_of_longest_request(config: VllmConfig, groups: Sequence[KVGroup]) -> int:
    """How many blocks of all groups a request may have at once, without the null block.

    Raises:
        ValueError: a group is no encoding of one.
    """
    specs = [group.kv_cache_spec for group in _planned(groups)]
    return sum(-(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) for spec in specs)


def _planned(groups: Sequence[KVGroup]) -> list[Any]:
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    from resilientllm_worker.seams.kv_cache_spec import decode_spec

    return [KVCacheGroupSpec(list(group.layers), decode_spec(group.spec)) for group in groups]


def _block_size(groups: Sequence[Any]) -> int:
    """Tokens per block of all groups."""
    from vllm.v1.kv_cache_interface import MambaSpec, iter_layer_specs

    if any(isinstance(spec, MambaSpec) for group in groups for spec in iter_layer_specs(group.kv_cache_spec)):
        raise ValueError(
            "models with state-space or linear-attention layers are not supported: their state is overwritten in "
            "place, and not kept in blocks of tokens"
        )
    sizes = {int(group.kv_cache_spec.block_size) for group in groups}
    if len(sizes) != 1:
        raise ValueError(
            f"KV cache groups with blocks of different sizes are not supported, this model's have {sorted(sizes)} "
            "tokens; try --disable-hybrid-kv-cache-manager"
        )
    return sizes.pop()
