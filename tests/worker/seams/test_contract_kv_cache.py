"""vLLM plans a KV cache of exactly home and pool blocks, and everything that a runner reads of the plan is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from resilientllm_worker.protocol.messages import KVGroup
from resilientllm_worker.seams.errors import Malformed
from resilientllm_worker.seams.kv_cache import blocks_of_longest_request, plan_home_and_pool
from resilientllm_worker.seams.kv_cache_spec import encode_spec
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.worker.seams.vllm_source import source_of

LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]
HOME, POOL = 96, 20
ROOM = 1 << 22
"""Bytes. The number of blocks does not follow from it: it is given."""


@pytest.fixture(autouse=True)
def layout(vllm_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the worker has it when its engine has agreed one."""
    monkeypatch.setattr(vllm_config.cache_config, "kv_cache_layout", "LBHNC")


def attention(**changes: Any) -> FullAttentionSpec:
    settings = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**settings | changes)


def window(**changes: Any) -> SlidingWindowSpec:
    settings = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32, "sliding_window": 64}
    return SlidingWindowSpec(**settings | changes)


def group(layers: Sequence[str] = LAYERS, spec: KVCacheSpec | None = None) -> KVGroup:
    return KVGroup(list(layers), encode_spec(spec or attention()))


def plan(config: Any, groups: list[KVGroup] | None = None) -> Any:
    return plan_home_and_pool(config, LAYERS, groups or [group()], "LBHNC", HOME, POOL)


def of_engine(config: Any, stages: list[dict[str, KVCacheSpec]], blocks: int) -> list[KVCacheConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.cache_config, "num_gpu_blocks_override", blocks)
        configs: list[KVCacheConfig] = get_kv_cache_configs(config, stages, [ROOM] * len(stages))
    return configs


def sent(planned: KVCacheConfig) -> list[KVGroup]:
    return [group(each.layer_names, each.kv_cache_spec) for each in planned.kv_cache_groups]


def layer(number: int) -> str:
    return f"model.layers.{number}.self_attn.attn"


def test_it_has_home_and_pool_blocks_whatever_override_the_engine_has(vllm_config: Any) -> None:
    before = vllm_config.cache_config.num_gpu_blocks_override
    planned, block_size = plan(vllm_config)
    assert (planned.num_blocks, block_size) == (HOME + POOL, 16)
    assert vllm_config.cache_config.num_gpu_blocks_override == before is not None


def test_its_tensors_hold_all_layers(vllm_config: Any) -> None:
    planned, _ = plan(vllm_config)
    (only,) = planned.kv_cache_groups
    assert sorted(only.layer_names) == LAYERS
    assert sum(tensor.size for tensor in planned.kv_cache_tensors) % (HOME + POOL) == 0


def test_it_says_how_the_cache_is_laid_out_and_hashed(vllm_config: Any) -> None:
    planned, _ = plan(vllm_config)
    assert planned.kv_cache_layout == "LBHNC"
    assert planned.hash_block_size == 16
    assert planned.cache_hit_alignment_tokens


@pytest.mark.parametrize(
    "stages",
    [
        [{layer(n): attention() for n in range(2)}, {layer(n): attention() for n in range(2, 5)}],
        [
            {layer(0): window(), layer(1): window(), layer(2): attention()},
            {layer(3): window(), layer(4): window(), layer(5): attention()},
        ],
        [{layer(0): window(), layer(1): window()}, {layer(2): window(), layer(3): attention()}],
        [{layer(0): attention()}, {layer(1): attention(num_kv_heads=4)}],
        [
            {layer(n): MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=96, dtype=torch.float32)}
            for n in range(2)
        ],
    ],
    ids=["one group", "every stage alike", "no full attention on the first stage", "two shapes", "MLA"],
)
def test_a_stage_plans_as_its_engine_does_and_only_with_more_blocks(
    vllm_config: Any, stages: list[dict[str, KVCacheSpec]]
) -> None:
    by_engine, larger = (of_engine(vllm_config, stages, blocks) for blocks in (HOME, HOME + POOL))
    for layers, asked, wanted in zip(stages, by_engine, larger, strict=True):
        planned, block_size = plan_home_and_pool(vllm_config, layers, sent(asked), "LBHNC", HOME, POOL)
        assert (planned.num_blocks, block_size) == (HOME + POOL, 16)
        assert planned.kv_cache_groups == asked.kv_cache_groups
        assert planned.kv_cache_tensors == wanted.kv_cache_tensors
        assert planned.kv_tp_replicas == wanted.kv_tp_replicas


def test_the_longest_request_has_blocks_of_every_group(vllm_config: Any) -> None:
    longest = -(-vllm_config.model_config.max_model_len // 16)
    assert blocks_of_longest_request(vllm_config, [group()]) == longest
    both = [group(LAYERS[:1]), group(LAYERS[1:], window())]
    in_flight = vllm_config.max_in_flight_tokens
    assert blocks_of_longest_request(vllm_config, both) == longest + -(-(64 - 1 + in_flight) // 16) + 1


def test_all_groups_draw_from_one_pool() -> None:
    """A block id without its group says which block it is: `tenancy/translate.py` relies on it."""
    source = source_of("v1/core/kv_cache_coordinator.py", "KVCacheCoordinator", "__init__")
    assert source.count("self.block_pool = BlockPool(") == 1
    assert "block_pool=self.block_pool" in source


def test_layers_of_another_stage_are_refused(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match="are not this stage's"):
        plan(vllm_config, [group([layer(9)])])


def test_a_layer_in_two_groups_is_refused(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match="are not this stage's"):
        plan(vllm_config, [group(), group(LAYERS[1:], window())])


def test_groups_with_blocks_of_different_sizes_are_refused_with_advice(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match=r"\[16, 32\] tokens; try --disable-hybrid"):
        plan(vllm_config, [group(LAYERS[:1]), group(LAYERS[1:], window(block_size=32))])


@pytest.mark.parametrize("within", ["alone", "in a group of several"])
def test_state_space_layers_are_refused(vllm_config: Any, within: str) -> None:
    state: KVCacheSpec = MambaSpec(
        block_size=16, shapes=((3, 4),), dtypes=(torch.float32,), mamba_type=MambaAttentionBackendEnum.GDN_ATTN
    )
    if within != "alone":
        state = UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={LAYERS[1]: state})
    with pytest.raises(ValueError, match="state-space"):
        plan(vllm_config, [group(LAYERS[:1]), group(LAYERS[1:], state)])


def test_what_is_no_encoding_of_a_group_is_refused(vllm_config: Any) -> None:
    with pytest.raises(Malformed):
        blocks_of_longest_request(vllm_config, [KVGroup(LAYERS, b"spec")])


def test_a_refused_plan_leaves_the_config_alone(vllm_config: Any) -> None:
    before = vllm_config.cache_config.num_gpu_blocks_override
    with pytest.raises(ValueError, match="are not this stage's"):
        plan(vllm_config, [group(["other"])])
    assert vllm_config.cache_config.num_gpu_blocks_override == before
