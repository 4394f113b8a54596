"""Triton's interpreter, made to round float32 -> bfloat16 as a GPU does.

The interpreter truncates that cast and spoils subnormal numbers, in both directions. `round_as_a_gpu` puts a cast in
its place that rounds to nearest, ties to even, and keeps subnormals. This is the one file that knows the interpreter's
inside.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

# NVIDIA's and PyTorch's casts give different NaNs; any quiet one is right.
_QUIET_NAN = np.uint16(0x7FC0)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits, uint16, of float32 values rounded to nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    # the carry out of the upper half moves to the next exponent, and from the largest number to infinity
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded.astype(np.uint16))


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16), exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_as_a_gpu() -> None:
    """Replace the interpreter's casts between float32 and bfloat16, for the rest of the process."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float
    if hasattr(original, "__wrapped__"):
        return
    toward_zero = interpreter._ir.ROUNDING_MODE.RTZ

    @functools.wraps(original)
    def convert(values: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        # the callers view the result as the target's NumPy dtype; these arrays already have its width
        if source == tl.float32 and target == tl.bfloat16 and rounding_mode != toward_zero:
            return float32_to_bfloat16(np.ascontiguousarray(values).view(np.float32)).reshape(values.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return bfloat16_to_float32(np.ascontiguousarray(values).view(np.uint16)).reshape(values.shape)
        return original(values, source, target, rounding_mode)

    interpreter._convert_float = convert
