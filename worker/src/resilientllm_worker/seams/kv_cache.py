"""Seam: vLLM's planning of the KV cache, for a tensor that is larger than what the engine schedules on.

The engine plans with home blocks only, so its scheduler never hands out a pool block. Each stage allocates home and
pool as one tensor: strides depend on the number of blocks in some layouts, so the larger config is planned anew and
not patched (vllm/v1/core/kv_cache_utils.py, ``get_kv_cache_config_from_groups``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def plan_home_and_pool(
    config: VllmConfig,
    specs: Mapping[str, Any],
    groups: Collection[Collection[str]],
    layout: str,
    home_blocks: int,
    pool_blocks: int,
) -> tuple[Any, int]:
    """The ``KVCacheConfig`` of one rank with ``home_blocks + pool_blocks`` blocks, and tokens per block.

    Raises:
        ValueError: more than one KV cache group, whose blocks a guest's map cannot tell apart yet.
    """
    from vllm.v1.core.kv_cache_utils import (
        get_kv_cache_config_from_groups,
        get_kv_cache_groups,
        resolve_cache_hit_alignment_tokens,
        resolve_kv_cache_block_sizes,
    )

    planned = get_kv_cache_groups(config, dict(specs))
    if len(planned) != 1 or len(groups) != 1:
        raise ValueError(
            f"models with one KV cache group are supported, this one has {max(len(planned), len(groups))}; "
            "try --disable-hybrid-kv-cache-manager"
        )
    (group,) = planned
    (names,) = groups
    if set(group.layer_names) != set(names):
        raise ValueError(f"the engine's layers {sorted(names)} are not this stage's {sorted(group.layer_names)}")
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
    return planned_config, int(group.kv_cache_spec.block_size)
