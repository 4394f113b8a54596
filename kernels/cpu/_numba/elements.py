"""Loads and stores of one element of float64, float32, bfloat16 and float16.

On the CPU Numba has neither bfloat16 nor float16, so arrays of these are passed as bits: bfloat16 as uint16, float16 as int16.
`load` gives float32 for both and for float32, and float64 for float64; `store` rounds once, to nearest even. LLVM vectorises
the loops around these functions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from . import half
from .internals import cgutils, load_item, make_array, store_item

BFLOAT16 = np.dtype(np.uint16)
FLOAT16 = np.dtype(np.int16)
_FLOATING = (types.float32, types.float64, types.uint16, types.int16)


def accumulate_dtype(x: np.ndarray) -> np.dtype:
    """The dtype of sums: float64 for float64, float32 for float32 and for the bits of half precision."""
    return np.dtype(np.float64) if x.dtype == np.float64 else np.dtype(np.float32)


def as_classes(target: np.ndarray) -> np.ndarray:
    """Class indices as the kernels take them."""
    return np.ascontiguousarray(target, np.int64)


def to_accumulate(values: np.ndarray | None, size: int, dtype: np.dtype, default: float) -> np.ndarray:
    """`values`, of any float dtype or its bits, as a contiguous vector of `dtype`; `size` times `default` for None."""
    if values is None:
        return np.full(size, default, dtype)
    if values.dtype == BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif values.dtype == FLOAT16:
        values = values.view(np.float16)
    return np.ascontiguousarray(values, dtype)


# ---------------------------------------------------------------------------------------------- bits
def _with_the_bits_of(kinds: dict[Any, Any]) -> Any:
    """The intrinsic that gives a number of another type with the same bits; kinds: the type for each type."""

    @intrinsic
    def reinterpreted(typingctx: Any, x: Any) -> Any:
        return kinds[x](x), lambda context, builder, signature, args: builder.bitcast(args[0], context.get_value_type(kinds[x]))

    return reinterpreted


bits = _with_the_bits_of({types.float32: types.int32, types.float64: types.int64})
from_bits = _with_the_bits_of({types.int32: types.float32, types.int64: types.float64})


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float64, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float64(types.float64, types.float64, types.float64), codegen


# ---------------------------------------------------------------------------------------------- load and store
@intrinsic
def load(typingctx: Any, row: Any, i: Any) -> Any:
    """`row[i]`, 0 <= i < row.size, as a float32 (bfloat16, float16 and float32) or a float64."""
    if not (isinstance(row, types.Array) and row.ndim == 1 and row.dtype in _FLOATING):
        return None
    result = types.float64 if row.dtype == types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(row)(context, builder, args[0])
        index = context.cast(builder, args[1], i, types.intp)
        pointer = cgutils.get_item_pointer(context, builder, row, array, [index], wraparound=False)
        return half.from_memory(context, builder, load_item(context, builder, row, pointer), row.dtype)

    return result(row, i), codegen


@intrinsic
def store(typingctx: Any, row: Any, i: Any, value: Any) -> Any:
    """`row[i] = value`, 0 <= i < row.size, rounded to nearest even to the dtype of `row`."""
    if not (isinstance(row, types.Array) and row.ndim == 1 and row.dtype in _FLOATING):
        return None
    computed = types.float64 if row.dtype == types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(row)(context, builder, args[0])
        index = context.cast(builder, args[1], i, types.intp)
        pointer = cgutils.get_item_pointer(context, builder, row, array, [index], wraparound=False)
        result = half.to_memory(context, builder, context.cast(builder, args[2], value, computed), row.dtype)
        if row.dtype == types.int16:
            result = builder.bitcast(result, ir.IntType(16))
        store_item(context, builder, row, result, pointer)
        return context.get_dummy_value()

    return types.void(row, i, value), codegen


@intrinsic
def atomic_min(typingctx: Any, array: Any, value: Any) -> Any:
    """array[0] = min(array[0], value), atomically: an int64 array that several threads share."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = make_array(array)(context, builder, args[0]).data
        builder.atomic_rmw("min", pointer, context.cast(builder, args[1], value, types.int64), "monotonic")
        return context.get_dummy_value()

    return types.void(array, value), codegen
