"""A stage's needs of the KV cache reach the engine unchanged, and bytes make nothing else."""

import contextlib
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resilientllm_worker.seams.errors import Malformed, Unsupported
from resilientllm_worker.seams.kv_cache_spec import ALLOWED_SPECS, decode_spec, encode_spec
from vllm.v1 import kv_cache_interface as specs
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

HEADS: dict[str, Any] = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
FULL = specs.FullAttentionSpec(**HEADS)
EXAMPLES = [
    FULL,
    specs.FullAttentionSpec(
        **HEADS | {"dtype": torch.float8_e4m3fn},
        kv_quant_mode=specs.KVQuantMode.FP8_PER_TENSOR,
        head_size_v=32,
        sliding_window=128,
        non_causal=True,
        block_stride_alignment=MultipleOf(16),
        tokens_per_state=Fraction(1, 4),
        max_tp_shards=2,
    ),
    specs.MLAAttentionSpec(**HEADS, cache_dtype_str="fp8_ds_mla", alignment=576, model_version="deepseek_v4"),
    specs.MLAAttentionSpec(**HEADS, cache_role=specs.SparseCacheRole.INDEXER),
    specs.RSWASpec(**HEADS, rswa_window=64),
    specs.ChunkedLocalAttentionSpec(**HEADS, attention_chunk_size=256),
    specs.SlidingWindowSpec(**HEADS, sliding_window=128, extra_retained_tokens=1),
    specs.SlidingWindowMLASpec(**HEADS, sliding_window=128, alignment=100),
    specs.SinkFullAttentionSpec(**HEADS, sink_len=4),
    specs.MambaSpec(
        block_size=512,
        shapes=((3, 4), (5,)),
        dtypes=(torch.bfloat16, torch.float32),
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
        page_size_padded=4096,
    ),
    specs.UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"a": FULL, "b": specs.FullAttentionSpec(**HEADS)}),
]


def test_every_allowed_class_has_an_example() -> None:
    assert {type(example).__name__ for example in EXAMPLES} == set(ALLOWED_SPECS)


@pytest.mark.parametrize("spec", EXAMPLES, ids=lambda spec: type(spec).__name__)
def test_a_spec_arrives_equal_and_of_its_class(spec: specs.KVCacheSpec) -> None:
    found = decode_spec(encode_spec(spec))
    assert found == spec and type(found) is type(spec)
    assert found.page_size_bytes == spec.page_size_bytes
    assert encode_spec(found) == encode_spec(spec)


class TestEncoding:
    def test_refuses_specs_of_other_kinds(self) -> None:
        with pytest.raises(Unsupported, match="CrossAttentionSpec"):
            encode_spec(specs.CrossAttentionSpec(**HEADS))

    def test_refuses_a_class_that_only_has_an_allowed_name(self) -> None:
        impostor = type("FullAttentionSpec", (specs.FullAttentionSpec,), {})
        with pytest.raises(Unsupported, match="FullAttentionSpec"):
            encode_spec(impostor(**HEADS))

    def test_refuses_values_of_unknown_types(self) -> None:
        with pytest.raises(Unsupported, match="complex"):
            encode_spec(specs.FullAttentionSpec(**HEADS, sliding_window=1j))


def altered(**changes: Any) -> bytes:
    kind, name, fields = msgspec.msgpack.decode(encode_spec(FULL))
    return msgspec.msgpack.encode([kind, name, {**fields, **changes}])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not an encoded"),
        (b"\xc1", "not an encoded"),
        (b"\xa2\xff\xfe", "not an encoded"),
        (msgspec.msgpack.encode(1), "expected a KVCacheSpec, found a int"),
        (msgspec.msgpack.encode(["dtype", "torch.float32"]), "expected a KVCacheSpec, found a dtype"),
        (msgspec.msgpack.encode(["spec", "object", {}]), "unknown to the installed vLLM"),
        (msgspec.msgpack.encode(["spec", "KVCacheConfig", {}]), "unknown to the installed vLLM"),
        (altered(new_field=1), r"fields \['new_field'\] are on one side only"),
        (altered(dtype=["dtype", "torch.load"]), "torch.load"),
        (altered(kv_quant_mode=["enum", "KVQuantMode", "__class__"]), "__class__"),
        (altered(kv_quant_mode=["enum", "os", "x"]), "unknown to the installed vLLM"),
        (altered(tokens_per_state=["fraction", 1, 0]), "unknown to the installed vLLM"),
        (altered(block_stride_alignment=-1), "does not take"),
        (altered(head_size_v=None), r"changes \['head_size_v'\]"),
        (b"\x92\xa5tuple\x91" * 50 + b"\x01", "nested more than 8 deep"),
    ],
)
def test_other_bytes_are_malformed_for_a_reason(data: bytes, match: str) -> None:
    with pytest.raises(Malformed, match=match):
        decode_spec(data)


ENCODED = [encode_spec(example) for example in EXAMPLES]


@given(
    data=st.binary(max_size=60) | st.sampled_from(ENCODED),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_any_bytes_decode_or_are_malformed(data: bytes, edits: list[tuple[int, int]]) -> None:
    changed = bytearray(data)
    for place, value in edits:
        if place < len(changed):
            changed[place] = value
    with contextlib.suppress(Malformed):
        assert isinstance(decode_spec(bytes(changed)), specs.KVCacheSpec)
