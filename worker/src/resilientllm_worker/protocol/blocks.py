"""Lists of KV blocks as they go over the wire: packed integers, since there may be one for every block of a cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from resilientllm_worker.transport.errors import ProtocolError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BLOCK = np.dtype("<i4")
_NUMBER = np.dtype("<i8")


def pack_blocks(blocks: Iterable[int] | NDArray[np.int32]) -> bytes:
    if isinstance(blocks, np.ndarray):
        return blocks.astype(_BLOCK).tobytes()
    return np.fromiter(blocks, _BLOCK).tobytes()


def pack_numbers(numbers: Iterable[int]) -> bytes:
    return np.fromiter(numbers, _NUMBER).tobytes()


def unpack_blocks(data: bytes) -> NDArray[np.int32]:
    """Raises `ProtocolError` if ``data`` is no whole number of blocks."""
    return _unpack(data, _BLOCK)


def unpack_numbers(data: bytes) -> NDArray[np.int64]:
    """Raises `ProtocolError` if ``data`` is no whole number of seal numbers."""
    return _unpack(data, _NUMBER)


def _unpack(data: bytes, dtype: np.dtype[np.signedinteger]) -> NDArray[np.signedinteger]:
    try:
        return np.frombuffer(data, dtype)
    except ValueError as error:
        raise ProtocolError(f"{len(data)} bytes are not whole {dtype.itemsize}-byte integers") from error
