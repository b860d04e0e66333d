"""What is read of one cache and written to another is, layer by layer, the same block, in all of vLLM's layouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from resilientllm_worker.protocol.messages import KVGroup
from resilientllm_worker.seams.kv_blocks import KVBlocks
from resilientllm_worker.seams.kv_cache import plan_home_and_pool
from resilientllm_worker.seams.kv_cache_spec import encode_spec
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache, copy_kv_cache_blocks_inplace

from tests.worker.seams.vllm_source import source_of

LAYERS = [f"model.layers.{number}.self_attn.attn" for number in range(3)]
BLOCK_SIZE = 16
ROOM = 1 << 20


@pytest.fixture(params=[layout.name for layout in KVCacheLayout])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def caches_of(
    config: Any,
    layout: str,
    blocks: int,
    dtype: torch.dtype = torch.bfloat16,
    layers: Sequence[str] = LAYERS,
    kernel_block_size: int | None = None,
    heads: int = 2,
    spec: KVCacheSpec | None = None,
) -> list[torch.Tensor]:
    """As a runner has them, with random content."""
    spec = spec or FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=heads, head_size=32, dtype=dtype)
    with pytest.MonkeyPatch.context() as agreed:
        agreed.setattr(config.cache_config, "kv_cache_layout", layout)
        planned, _ = plan_home_and_pool(
            config, layers, [KVGroup(list(layers), encode_spec(spec))], layout, blocks - 5, 5
        )
    sizes = None if kernel_block_size is None else [kernel_block_size]
    views = allocate_kv_cache(planned, torch.device("cpu"), KVCacheLayout[layout], sizes)
    caches = [views[name] for name in layers]
    for cache in caches:
        cache.copy_(torch.randn(cache.shape))
    return caches


def block(cache: torch.Tensor, blocks: int, slot: int) -> torch.Tensor:
    return cache.unflatten(0, (blocks, -1))[slot]


def assert_moves(source: list[torch.Tensor], target: list[torch.Tensor], blocks: int, target_blocks: int) -> None:
    reader, writer = KVBlocks(source, blocks), KVBlocks(target, target_blocks)
    assert reader.layout == writer.layout
    before = [cache.clone() for cache in target]
    slots, new_slots = [7, 0, 11, 3], [2, 13, 1, 0]
    content = memoryview(bytearray(ROOM))
    reader.read(slots, content)
    writer.write(new_slots, content)
    for place, cache in enumerate(target):
        for slot in range(target_blocks):
            expected = (
                block(source[place], blocks, slots[new_slots.index(slot)])
                if slot in new_slots
                else block(before[place], target_blocks, slot)
            )
            assert torch.equal(block(cache, target_blocks, slot), expected)


def test_blocks_move_between_caches_of_another_number_of_blocks(vllm_config: Any, layout: str) -> None:
    assert_moves(caches_of(vllm_config, layout, 12), caches_of(vllm_config, layout, 14), 12, 14)


def test_so_do_blocks_of_latents(vllm_config: Any, layout: str) -> None:
    """As DeepSeek's models have them: one latent and one rotated key a token, and no heads."""
    spec = MLAAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=512 + 64, dtype=torch.bfloat16)
    source, target = (caches_of(vllm_config, layout, blocks, spec=spec) for blocks in (12, 14))
    assert KVBlocks(source, 12).block_bytes == len(LAYERS) * BLOCK_SIZE * (512 + 64) * 2
    assert_moves(source, target, 12, 14)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"], indirect=True)
def test_blocks_move_whole_where_a_kernel_splits_them(vllm_config: Any, layout: str) -> None:
    source, target = (caches_of(vllm_config, layout, blocks, kernel_block_size=BLOCK_SIZE // 4) for blocks in (12, 14))
    assert len(source[0]) == 4 * 12
    assert_moves(source, target, 12, 14)


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_moved_is_what_vllm_would_copy(vllm_config: Any, layout: str, heads: int) -> None:
    caches = caches_of(vllm_config, layout, 12, heads=heads)
    copied = caches_of(vllm_config, layout, 12, heads=heads)
    for ours, theirs in zip(caches, copied, strict=True):
        theirs.copy_(ours)
    copy_kv_cache_blocks_inplace(copied, 12, [(4, 9), (5, 2)])
    store = KVBlocks(caches, 12)
    content = memoryview(bytearray(ROOM))
    store.read([4, 5], content)
    store.write([9, 2], content)
    for ours, theirs in zip(caches, copied, strict=True):
        assert torch.equal(ours, theirs)


def test_all_layers_of_a_block_are_counted_once(vllm_config: Any, layout: str) -> None:
    caches = caches_of(vllm_config, layout, 12)
    expected = sum(cache[0].numel() * cache.element_size() for cache in caches)
    assert KVBlocks(caches, 12).block_bytes == expected
    sharing = KVBlocks([*caches, caches[0]], 12)
    assert (sharing.block_bytes, sharing.layout) == (expected, KVBlocks(caches, 12).layout)


def test_other_shapes_dtypes_and_orders_are_other_layouts(vllm_config: Any) -> None:
    found = {
        KVBlocks(caches, 12).layout
        for caches in (
            caches_of(vllm_config, "LBHNC", 12),
            caches_of(vllm_config, "LBNHC", 12),
            caches_of(vllm_config, "BLHNC", 12),
            caches_of(vllm_config, "LBHNC", 12, dtype=torch.float16),
            caches_of(vllm_config, "LBHNC", 12, layers=LAYERS[:2]),
            caches_of(vllm_config, "LBHNC", 12, heads=4),
        )
    }
    assert len(found) == 6


def test_slots_that_do_not_exist_and_memory_that_is_too_short_are_refused(vllm_config: Any) -> None:
    store = KVBlocks(caches_of(vllm_config, "LBHNC", 12), 12)
    content = memoryview(bytearray(2 * store.block_bytes))
    for slot in (-1, 12):
        with pytest.raises(IndexError, match="0 to 11"):
            store.read([slot], content)
        with pytest.raises(IndexError, match="0 to 11"):
            store.write([slot], content)
    with pytest.raises(ValueError, match="3 blocks"):
        store.read([1, 2, 3], content)
    store.read([], content)


def test_a_cache_that_is_no_multiple_of_the_blocks_is_refused(vllm_config: Any) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        KVBlocks(caches_of(vllm_config, "LBHNC", 12), 7)
    with pytest.raises(ValueError, match="one device"):
        KVBlocks([], 7)


@pytest.mark.parametrize(
    ("path", "method"),
    [("v1/worker/gpu_model_runner.py", "_update_states"), ("v1/worker/gpu/model_runner.py", "update_requests")],
)
def test_both_runners_still_name_their_caches_so(path: str, method: str) -> None:
    source = " ".join(source_of(path, "GPUModelRunner", method).split())
    assert "copy_kv_cache_blocks_inplace(self.kv_caches, self.kv_cache_config.num_blocks," in source, (
        "vLLM's runner copies blocks between other tensors now: look at seams/kv_blocks.py"
    )
