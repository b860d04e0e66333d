"""vLLM's KVCacheSpec, as bytes without pickle.

Stages run the vLLM that their engine runs, so an encoding names a class and all its fields, and decoding wants exactly
those. Only what is listed here can come out of it: no byte string makes us call anything else.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from fractions import Fraction
from typing import Any

import msgspec
import torch
from vllm.v1 import kv_cache_interface
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheSpec, KVQuantMode, SparseCacheRole

from resilientllm_worker.seams.errors import Malformed, Unsupported

ALLOWED_SPECS: dict[str, type[Any]] = {
    name: getattr(kv_cache_interface, name)
    for name in (
        "ChunkedLocalAttentionSpec",
        "FullAttentionSpec",
        "MLAAttentionSpec",
        "MambaSpec",
        "RSWASpec",
        "SinkFullAttentionSpec",
        "SlidingWindowMLASpec",
        "SlidingWindowSpec",
        "UniformTypeKVCacheSpecs",
    )
}
"""Those of decoder-only models. Others hold state that is not in blocks of tokens, or an encoder's."""

_ENUMS: dict[str, type[Enum]] = {
    enum.__name__: enum for enum in (KVQuantMode, SparseCacheRole, MambaAttentionBackendEnum)
}
_DTYPES: dict[str, Any] = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_MAX_DEPTH = 8

_decoder = msgspec.msgpack.Decoder()


def encode_spec(spec: KVCacheSpec) -> bytes:
    """Raises `Unsupported`: the class, or the type of a field, is not one that we carry."""
    return msgspec.msgpack.encode(_encode(spec))


def decode_spec(data: bytes) -> KVCacheSpec:
    """The spec that was encoded, equal in every field.

    Raises:
        Malformed: ``data`` is no encoding of a spec, or of one that the installed vLLM knows otherwise.
    """
    try:
        spec = _decode(_decoder.decode(data), _MAX_DEPTH)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not an encoded KVCacheSpec: {error}") from error
    if not isinstance(spec, KVCacheSpec):
        raise Malformed(f"expected a KVCacheSpec, found a {type(spec).__name__}")
    return spec


def _encode(value: object) -> Any:
    """Plain values stand for themselves, all others for a list ``[kind, ...]``."""
    # bool and int subclasses such as IntEnum would pass as plain numbers, hence types and not isinstance.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return ["dtype", str(value)]
    if isinstance(value, Enum) and type(value).__name__ in _ENUMS:
        return ["enum", type(value).__name__, value.name]
    if type(value) is tuple:
        return ["tuple", [_encode(item) for item in value]]
    if type(value) is dict and all(type(key) is str for key in value):
        return ["dict", {key: _encode(item) for key, item in value.items()}]
    if type(value) is Fraction:
        return ["fraction", value.numerator, value.denominator]
    if isinstance(value, MultipleOf):
        return ["multiple", value.base]
    if ALLOWED_SPECS.get(type(value).__name__) is type(value):
        return ["spec", type(value).__name__, {name: _encode(getattr(value, name)) for name in _fields(type(value))}]
    raise Unsupported(f"a KV cache spec holds a {type(value).__module__}.{type(value).__qualname__}, unknown to us")


def _decode(value: Any, depth: int) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if depth == 0:
        raise Malformed(f"values are nested more than {_MAX_DEPTH} deep")
    match value:
        case ["dtype", str(name)] if name in _DTYPES:
            return _DTYPES[name]
        case ["enum", str(kind), str(name)] if kind in _ENUMS and name in _ENUMS[kind].__members__:
            return _ENUMS[kind][name]
        case ["tuple", list(items)]:
            return tuple(_decode(item, depth - 1) for item in items)
        case ["dict", dict(items)] if all(isinstance(key, str) for key in items):
            return {key: _decode(item, depth - 1) for key, item in items.items()}
        case ["fraction", int(numerator), int(denominator)] if denominator > 0:
            return Fraction(numerator, denominator)
        case ["multiple", int(base)]:
            return MultipleOf(base)
        case ["spec", str(name), dict(encoded)] if name in ALLOWED_SPECS:
            return _build(ALLOWED_SPECS[name], encoded, depth - 1)
    raise Malformed(f"unknown to the installed vLLM, or not to be sent: {str(value)[:200]}")


def _build(kind: type[Any], encoded: dict[Any, Any], depth: int) -> Any:
    expected = _fields(kind)
    if set(encoded) != set(expected):
        differing = sorted(str(name) for name in set(encoded) ^ set(expected))
        raise Malformed(f"{kind.__name__}: fields {differing} are on one side only; the vLLM versions differ")
    values = {name: _decode(encoded[name], depth) for name in expected}
    try:
        spec = kind(**values)
    except (TypeError, ValueError, AssertionError, AttributeError, ArithmeticError) as error:
        raise Malformed(f"{kind.__name__} does not take {str(values)[:200]}: {error}") from error
    if changed := [name for name in expected if getattr(spec, name) != values[name]]:
        raise Malformed(f"{kind.__name__}: the installed vLLM changes {changed} on construction")
    return spec


def _fields(kind: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]
