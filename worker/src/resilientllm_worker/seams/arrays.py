"""NumPy arrays on the wire: an allowed dtype, a shape, and exactly the memory that both imply."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from resilientllm_worker.protocol.messages import Array
from resilientllm_worker.seams.errors import Malformed, Unsupported

_DTYPES = {name: np.dtype(name) for name in ("int32", "int64", "float16", "float32", "float64")}


def encode_array(array: npt.NDArray[Any]) -> Array:
    """Copies ``array``. Raises `Unsupported` for a dtype that is not allowed."""
    if array.dtype.name not in _DTYPES:
        raise Unsupported(f"expected an array of one of {', '.join(_DTYPES)}, found {array.dtype}")
    return Array(array.dtype.name, array.shape, array.tobytes())


def decode_array(array: Array) -> npt.NDArray[Any]:
    """A writable array, since torch warns of others. Raises `Malformed`."""
    dtype = _DTYPES.get(array.dtype)
    if dtype is None:
        raise Malformed(f"expected an array of one of {', '.join(_DTYPES)}, found {array.dtype!r}")
    if any(side < 0 for side in array.shape) or math.prod(array.shape) * dtype.itemsize != len(array.data):
        raise Malformed(f"expected {array.dtype} of shape {array.shape}, found {len(array.data)} bytes")
    try:
        return np.frombuffer(bytearray(array.data), dtype).reshape(array.shape)
    except (ValueError, OverflowError) as error:  # a side is 0, the others are beyond all bounds
        raise Malformed(f"no array can have the shape {array.shape}: {error}") from error
