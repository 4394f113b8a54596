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
from numba.extending import intrinsic, overload

from . import _half
from ._jit import inline, outline
from ._lanes import LARGE, LINE, Lanes, larger
from ._numba import cgutils, load_item, make_array, raise_error, store_item

BFLOAT16 = np.dtype(np.uint16)
FLOAT16 = np.dtype(np.int16)
# Rows of at most so many bytes are fetched while the row before them is computed.
AHEAD = 1 << 14
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
        value = load_item(context, builder, row, pointer)
        if row.dtype == types.uint16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if row.dtype == types.int16:
            return _half.to_float(context, builder, value)
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
            result = builder.bitcast(_half.from_float(context, builder, result), ir.IntType(16))
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


# ---------------------------------------------------------------------------------------------- views
# A view that these make borrows the memory of its array and counts no reference: making one is a few additions.
@intrinsic
def row_of(typingctx: Any, x: Any, n: Any, s: Any) -> Any:
    """x[n, :, s], indices in range."""
    result = types.Array(x.dtype, 1, "A")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(x)(context, builder, args[0])
        return _view(context, builder, x, array, (args[1], None, args[2]), None, 1, result)

    return result(x, types.intp, types.intp), codegen


@intrinsic
def plane_of(typingctx: Any, x: Any, n: Any, c: Any, first: Any, last: Any) -> Any:
    """x[n, c, first:last], indices in range."""
    result = types.Array(x.dtype, 1, "A")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(x)(context, builder, args[0])
        size = builder.sub(args[4], args[3])
        return _view(context, builder, x, array, (args[1], args[2], args[3]), size, 2, result)

    return result(x, types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def line_of(typingctx: Any, x: Any, n: Any, c: Any, s: Any, size: Any) -> Any:
    """`size` elements adjacent in memory from x[n, c, s] on; the caller knows that they are."""
    result = types.Array(x.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(x)(context, builder, args[0])
        return _view(context, builder, x, array, args[1:4], args[4], None, result)

    return result(x, types.intp, types.intp, types.intp, types.intp), codegen


def _view(context: Any, builder: Any, x: Any, array: Any, start: Any, size: Any, axis: int | None, result: Any) -> Any:
    """A 1-d view of the 3-d `array` from the index `start` on, along `axis`, or of adjacent elements for None.

    None within `start` stands for the whole of that axis.
    """
    shape, strides = (cgutils.unpack_tuple(builder, t, 3) for t in (array.shape, array.strides))
    address = builder.ptrtoint(array.data, strides[0].type)
    for k, index in enumerate(start):
        if index is None:
            size = shape[k]
        else:
            address = builder.add(address, builder.mul(index, strides[k]))
    view = make_array(result)(context, builder)
    view.data = builder.inttoptr(address, array.data.type)
    view.shape = cgutils.pack_array(builder, [size])
    view.strides = cgutils.pack_array(builder, [array.itemsize if axis is None else strides[axis]])
    view.itemsize = array.itemsize
    view.nitems = size
    view.meminfo = cgutils.get_null_value(view.meminfo.type)
    view.parent = cgutils.get_null_value(view.parent.type)
    return view._getvalue()


@intrinsic
def borrowed(typingctx: Any, row: Any) -> Any:
    """The same one-dimensional array of adjacent elements, as a view that counts no references; the caller holds one."""
    result = types.Array(row.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = make_array(result)(context, builder, args[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return result(row), codegen


@intrinsic
def room(typingctx: Any, size: Any, like: Any) -> Any:
    """`size` elements of `like`'s dtype, at the start of a line, to be given to `release` at the end.

    Not np.empty, whose references are counted: a count is an atomic operation, which waits for every store before it, and the
    loop over the rows would have some.
    """
    result = types.Array(like.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        view = make_array(result)(context, builder)
        elements = context.cast(builder, args[0], size, types.intp)
        itemsize = context.get_constant(types.intp, like.dtype.bitwidth // 8)
        nbytes = builder.add(builder.mul(elements, itemsize), context.get_constant(types.intp, 2 * LINE))
        block = _libc(builder, "malloc", ir.IntType(8).as_pointer(), nbytes)
        with cgutils.if_unlikely(builder, cgutils.is_null(builder, block)):
            raise_error(context, builder, MemoryError, "a kernel found no memory")
        address = builder.ptrtoint(block, nbytes.type)
        start = builder.and_(builder.add(address, nbytes.type(2 * LINE - 1)), nbytes.type(-LINE))
        builder.store(block, _before(builder, start, block.type))
        view.data = builder.inttoptr(start, view.data.type)
        view.shape = cgutils.pack_array(builder, [elements])
        view.strides = cgutils.pack_array(builder, [itemsize])
        view.itemsize, view.nitems = itemsize, elements
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return result(size, like), codegen


def _libc(builder: Any, name: str, result: Any, argument: Any) -> Any:
    function = ir.FunctionType(result, [argument.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [argument])


def _before(builder: Any, start: Any, kind: Any) -> Any:
    """Where the line before a room keeps the address of its block."""
    return builder.inttoptr(builder.sub(start, start.type(LINE)), kind.as_pointer())


@intrinsic
def release(typingctx: Any, scratch: Any) -> Any:
    """Gives the memory of a `room` back."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.ptrtoint(make_array(scratch)(context, builder, args[0]).data, ir.IntType(64))
        _libc(builder, "free", ir.VoidType(), builder.load(_before(builder, start, ir.IntType(8).as_pointer())))
        return context.get_dummy_value()

    return types.void(scratch), codegen


@inline
def row_scratch(x):
    """`room` for one row x[n, :, s] where rows are not adjacent in memory; empty where they are."""
    return room(0 if x.strides[1] == x.itemsize else x.shape[1], x)


@outline
def copy(source, destination):
    for i in range(source.size):
        destination[i] = source[i]


@inline
def prefix(scratch, size):
    """The first `size` elements of a one-dimensional array whose elements are adjacent."""
    return borrowed(scratch[:size])


@inline
def _is_adjacent(row):
    return row.strides[0] == row.itemsize or row.size <= 1


@inline
def gather(row, scratch):
    """`row` with adjacent elements: itself where that is so already, else a copy in `scratch`."""
    if _is_adjacent(row):
        return borrowed(row)
    copy(row, scratch)
    return prefix(scratch, row.size)


@inline
def place(row, scratch):
    """Where to write what shall stand in `row`: itself or `scratch`, which `scatter` then copies out."""
    if _is_adjacent(row):
        return borrowed(row)
    return prefix(scratch, row.size)


@inline
def scatter(row, scratch):
    if not _is_adjacent(row):
        copy(scratch[: row.size], row)


@inline
def goes_around(y):
    """True where the rows y[n, :, s] of a result are to be written around the caches."""
    return y.size * y.itemsize >= LARGE and y.strides[1] == y.itemsize


@inline
def row_ahead(x, row, last, z_row):
    """The row after `row`, below `last`, to fetch meanwhile: `z_row`, the row itself, where that would not help."""
    if row + 1 < last and x.strides[1] == x.itemsize and x.shape[1] * x.itemsize <= AHEAD:
        return line_of(x, (row + 1) // x.shape[2], 0, (row + 1) % x.shape[2], x.shape[1])
    return z_row


# ---------------------------------------------------------------------------------------------- exp
# exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2, ln 2 = HIGH + LOW where n * HIGH is exact. Adding MAGIC rounds to
# an integer and leaves n + bias in the last bits of the sum, from where a shift moves it to the exponent. The bias holds
# 2^64 (2^512) more than the exponent's own, taken off by a last product, so that a subnormal result is rounded once.
# exp(r) = 1 + r + r^2 P(r), P the minimax polynomial (relative error 3e-9 and 4e-18) in Estrin's order, for its short chain;
# r is rounded in the powers alone.
_LOWEST32, _LOWEST64 = np.float32(-104.0), np.float64(-746.0)
_MAGIC32, _MAGIC64 = np.float32(1.5 * 2.0**23 + 127 + 64), np.float64(1.5 * 2.0**52 + 1023 + 512)
_TINY32, _TINY64 = np.float32(2.0**-64), np.float64(2.0**-512)
_INV_LN2_32, _INV_LN2_64 = np.float32(1 / math.log(2)), np.float64(1 / math.log(2))
_LN2_HIGH32, _LN2_LOW32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
_LN2_HIGH64, _LN2_LOW64 = np.float64(6.93147180369123816490e-01), np.float64(1.90821492927058770002e-10)
_P32 = tuple(np.float32(c) for c in (0.49999994, 0.166665196, 0.0416683927, 0.00836876128, 0.00138144533))
_P64 = (
    0.5000000000000011,
    0.16666666666666408,
    0.041666666666529864,
    0.008333333333496614,
    0.0013888888943736286,
    0.00019841269502244094,
    2.48014929630654e-05,
    2.7557589972370936e-06,
    2.763030488402456e-07,
    2.499901333004126e-08,
)


@intrinsic
def _power(typingctx: Any, shifted: Any) -> Any:
    """2^(n + bias) from what has n + bias in its last bits: a number, or `Lanes` of them."""
    exponent = 52 if getattr(shifted, "dtype", shifted) == types.float64 else 23

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        integer: Any = ir.IntType(64 if exponent == 52 else 32)
        places: Any = exponent
        if isinstance(shifted, Lanes):
            integer, places = ir.VectorType(integer, shifted.count), [exponent] * shifted.count
        power = builder.shl(builder.bitcast(args[0], integer), ir.Constant(integer, places))
        return builder.bitcast(power, args[0].type)

    return shifted(shifted), codegen


@inline
def _exp32(x):
    x = larger(_LOWEST32, x)
    shifted = x * _INV_LN2_32 + _MAGIC32
    n = shifted - _MAGIC32
    high = x - n * _LN2_HIGH32
    r = high - n * _LN2_LOW32
    r2 = r * r
    p = (_P32[4] * r2 + (_P32[3] * r + _P32[2])) * r2 + (_P32[1] * r + _P32[0])
    scale = _power(shifted)
    return ((high + (p * r2 - n * _LN2_LOW32)) * scale + scale) * _TINY32


@inline
def _exp64(x):
    x = larger(_LOWEST64, x)
    shifted = x * _INV_LN2_64 + _MAGIC64
    n = shifted - _MAGIC64
    high = x - n * _LN2_HIGH64
    r = high - n * _LN2_LOW64
    r2 = r * r
    r4 = r2 * r2
    p0 = (_P64[3] * r + _P64[2]) * r2 + (_P64[1] * r + _P64[0])
    p4 = (_P64[7] * r + _P64[6]) * r2 + (_P64[5] * r + _P64[4])
    p = ((_P64[9] * r + _P64[8]) * r4 + p4) * r4 + p0
    scale = _power(shifted)
    return ((high + (p * r2 - n * _LN2_LOW64)) * scale + scale) * _TINY64


def exp(x: Any) -> Any:
    """e^x for x <= 1, to 1 ulp, subnormal results included; NaN gives NaN and -inf gives 0. A number, or `Lanes`."""
    return np.exp(x)


@overload(exp)
def _exp(x):
    if getattr(x, "dtype", x) == types.float64:
        return lambda x: _exp64(x)
    return lambda x: _exp32(x)
