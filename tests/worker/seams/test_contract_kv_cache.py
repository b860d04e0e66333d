"""vLLM plans a KV cache of exactly home and pool blocks, and everything that a runner reads of the plan is in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from resilientllm_worker.seams.kv_cache import plan_home_and_pool
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
HOME, POOL = 48, 20


@pytest.fixture(autouse=True)
def layout(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the worker has it when its engine has agreed one."""
    monkeypatch.setattr(vllm_config.cache_config, "kv_cache_layout", "LBHNC")


def attention(**changes: Any) -> FullAttentionSpec:
    settings = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**settings | changes)


def plan(config: Any, specs: dict[str, KVCacheSpec] | None = None, groups: list[list[str]] | None = None) -> Any:
    found = specs if specs is not None else dict.fromkeys(LAYERS, attention())
    return plan_home_and_pool(config, found, groups or [LAYERS], "LBHNC", HOME, POOL)


def test_it_has_home_and_pool_blocks_whatever_override_the_engine_has(vllm_config: Any) -> None:
    before = vllm_config.cache_config.num_gpu_blocks_override
    planned, block_size = plan(vllm_config)
    assert (planned.num_blocks, block_size) == (HOME + POOL, 16)
    assert vllm_config.cache_config.num_gpu_blocks_override == before is not None


def test_its_tensors_hold_all_layers(vllm_config: Any) -> None:
    planned, _ = plan(vllm_config)
    (group,) = planned.kv_cache_groups
    assert sorted(group.layer_names) == LAYERS
    assert sum(tensor.size for tensor in planned.kv_cache_tensors) % (HOME + POOL) == 0


def test_it_says_how_the_cache_is_laid_out_and_hashed(vllm_config: Any) -> None:
    planned, _ = plan(vllm_config)
    assert planned.kv_cache_layout == "LBHNC"
    assert planned.hash_block_size == 16
    assert planned.cache_hit_alignment_tokens


def test_layers_of_another_stage_are_refused(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match="are not this stage's"):
        plan(vllm_config, groups=[["model.layers.9.self_attn.attn"]])


def test_several_groups_are_refused_with_advice(vllm_config: Any) -> None:
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64)
    with pytest.raises(ValueError, match="one KV cache group"):
        plan(vllm_config, {LAYERS[0]: attention(), LAYERS[1]: window}, [LAYERS])


def test_a_refused_plan_leaves_the_config_alone(vllm_config: Any) -> None:
    before = vllm_config.cache_config.num_gpu_blocks_override
    with pytest.raises(ValueError, match="are not this stage's"):
        plan(vllm_config, groups=[["other"]])
    assert vllm_config.cache_config.num_gpu_blocks_override == before
