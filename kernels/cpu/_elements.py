"""One element at a time: how the kernels read and write float64, float32, bfloat16 and float16, and their exponential.

Numba knows neither bfloat16 nor float16 on the CPU, so arrays of these come as bits: bfloat16 as uint16, float16 as
int16. `load` gives float32 for both and for float32, and float64 for float64; `store` rounds to nearest even, once.
Everything here becomes a few packed instructions once LLVM has vectorised the loop around it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import load_item, make_array, store_item

from ._jit import inline

BFLOAT16 = np.dtype(np.uint16)
FLOAT16 = np.dtype(np.int16)
_FLOATING = (types.float32, types.float64, types.uint16, types.int16)


def accumulate_dtype(x: np.ndarray) -> np.dtype:
    """float64 for float64; float32 for float32 and for the bits of the halves."""
    return np.dtype(np.float64) if x.dtype == np.float64 else np.dtype(np.float32)


def to_accumulate(values: np.ndarray | None, size: int, dtype: np.dtype, default: float) -> np.ndarray:
    """A short vector in `dtype`, contiguous: `values` converted from any float dtype (bits too), or `default` for None."""
    if values is None:
        return np.full(size, default, dtype)
    if values.dtype == BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif values.dtype == FLOAT16:
        values = values.view(np.float16)
    return np.ascontiguousarray(values, dtype)


# ---------------------------------------------------------------------------------------------- bits
@intrinsic
def bits(typingctx: Any, x: Any) -> Any:
    """The bits of a float32 as an int32, of a float64 as an int64."""
    integer = {types.float32: types.int32, types.float64: types.int64}[x]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(integer))

    return integer(x), codegen


@intrinsic
def from_bits(typingctx: Any, i: Any) -> Any:
    """The inverse of `bits`."""
    floating = {types.int32: types.float32, types.int64: types.float64}[i]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(floating))

    return floating(i), codegen


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
        value = load_item(context, builder, row, pointer)
        if row.dtype == types.uint16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if row.dtype == types.int16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return result(row, i), codegen


@intrinsic
def store(typingctx: Any, row: Any, i: Any, value: Any) -> Any:
    """`row[i] = value`, 0 <= i < row.size, rounded to nearest even to the dtype that `row` stands for."""
    if not (isinstance(row, types.Array) and row.ndim == 1 and row.dtype in _FLOATING):
        return None
    computed = types.float64 if row.dtype == types.float64 else types.float32

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(row)(context, builder, args[0])
        index = context.cast(builder, args[1], i, types.intp)
        pointer = cgutils.get_item_pointer(context, builder, row, array, [index], wraparound=False)
        result = context.cast(builder, args[2], value, computed)
        if row.dtype == types.uint16:
            result = _round_to_bfloat16(builder, result)
        elif row.dtype == types.int16:
            result = builder.bitcast(builder.fptrunc(result, ir.HalfType()), ir.IntType(16))
        store_item(context, builder, row, result, pointer)
        return context.get_dummy_value()

    return types.void(row, i, value), codegen


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    """The upper half of the bits after adding just under half a unit, and the unit's own last bit; NaN stays NaN."""
    int32 = ir.IntType(32)
    word = builder.bitcast(value, int32)
    last = builder.and_(builder.lshr(word, ir.Constant(int32, 16)), ir.Constant(int32, 1))
    rounded = builder.add(builder.add(word, ir.Constant(int32, 0x7FFF)), last)
    is_nan = builder.fcmp_unordered("uno", value, value)
    rounded = builder.select(is_nan, ir.Constant(int32, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, ir.Constant(int32, 16)), ir.IntType(16))


@intrinsic
def atomic_min(typingctx: Any, array: Any, value: Any) -> Any:
    """array[0] = min(array[0], value) in one step, for an int64 array that several threads share."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = make_array(array)(context, builder, args[0]).data
        builder.atomic_rmw("min", pointer, context.cast(builder, args[1], value, types.int64), "monotonic")
        return context.get_dummy_value()

    return types.void(array, value), codegen


# ---------------------------------------------------------------------------------------------- rows
@intrinsic
def _as_contiguous(typingctx: Any, row: Any) -> Any:
    """The same one-dimensional array, typed as adjacent and writeable; it borrows the memory and counts no reference."""
    result = types.Array(row.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = make_array(result)(context, builder, args[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return result(row), codegen


@inline
def row_scratch(x):
    """Room for one row x[n, :, s] where rows are not adjacent in memory; empty where they are."""
    return np.empty(0 if x.strides[1] == x.itemsize else x.shape[1], x.dtype)


@inline
def gather(row, scratch):
    """`row` with adjacent elements: itself where that is so already, else a copy in `scratch`."""
    if row.strides[0] == row.itemsize or row.size <= 1:
        return _as_contiguous(row)
    for i in range(row.size):
        scratch[i] = row[i]
    return scratch[: row.size]


@inline
def place(row, scratch):
    """Where to write what shall stand in `row`: itself or `scratch`, which `scatter` then copies out."""
    if row.strides[0] == row.itemsize or row.size <= 1:
        return _as_contiguous(row)
    return scratch[: row.size]


@inline
def scatter(row, scratch):
    if not (row.strides[0] == row.itemsize or row.size <= 1):
        for i in range(row.size):
            row[i] = scratch[i]


def same_dtype(row, scratch):
    """`row` if it can hold intermediate results without rounding, that is if its dtype is `scratch`'s; else `scratch`."""
    return row if row.dtype == scratch.dtype else scratch


@overload(same_dtype, inline="always")
def _same_dtype(row, scratch):
    if row.dtype == scratch.dtype:
        return lambda row, scratch: row
    return lambda row, scratch: scratch


# ---------------------------------------------------------------------------------------------- exp
# exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2. Adding _MAGIC rounds to an integer and leaves n + bias in the
# last bits of the sum; 2^n is applied in two factors so that a subnormal result is rounded once. ln 2 = HIGH + LOW,
# where n * HIGH is exact.
_MAGIC32 = np.float32(1.5 * 2.0**23 + 191)
_MAGIC64 = np.float64(1.5 * 2.0**52 + 1535)
_INV_LN2_32, _INV_LN2_64 = np.float32(1 / math.log(2)), np.float64(1 / math.log(2))
_LN2_HIGH32, _LN2_LOW32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LN2_HIGH64, _LN2_LOW64 = np.float64(6.93147180369123816490e-01), np.float64(1.90821492927058770002e-10)
_LOWEST32, _LOWEST64 = np.float32(-104.0), np.float64(-746.0)
_TINY32, _TINY64 = np.float32(2.0**-64), np.float64(2.0**-512)
_ONE32, _ONE64 = np.float32(1), np.float64(1)


@inline
def _exp32(x):
    x = _LOWEST32 if x < _LOWEST32 else x
    shifted = x * _INV_LN2_32 + _MAGIC32
    n = shifted - _MAGIC32
    r = (x - n * _LN2_HIGH32) - n * _LN2_LOW32
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * (r * r) + r) + _ONE32
    scale = from_bits(np.int32(bits(shifted) << np.int32(23)))
    return (p * scale) * _TINY32


@inline
def _exp64(x):
    x = _LOWEST64 if x < _LOWEST64 else x
    shifted = x * _INV_LN2_64 + _MAGIC64
    n = shifted - _MAGIC64
    r = (x - n * _LN2_HIGH64) - n * _LN2_LOW64
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = (p * (r * r) + r) + _ONE64
    scale = from_bits(bits(shifted) << np.int64(52))
    return (p * scale) * _TINY64


def exp(x: Any) -> Any:
    """e^x for x <= 1, to 1 ulp, subnormal results included; NaN gives NaN and -inf gives 0."""
    return np.exp(x)


@overload(exp)
def _exp(x):
    if x == types.float64:
        return lambda x: _exp64(x)
    return lambda x: _exp32(x)
