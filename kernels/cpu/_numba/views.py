"""Views of rows, planes and lines of an array, and scratch memory for those whose elements are not adjacent."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .compile import inline, outline
from .internals import cgutils, make_array, raise_error, unowned
from .simd import LARGE, LINE

# Rows of at most this many bytes are prefetched while the row before is computed.
AHEAD = 1 << 14


# ---------------------------------------------------------------------------------------------- views
# These views have no reference count: making one is a few additions. The caller holds a reference to the array.
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
    """`size` elements from x[n, c, s] on, which the caller knows to be adjacent in memory."""
    result = types.Array(x.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = make_array(x)(context, builder, args[0])
        return _view(context, builder, x, array, args[1:4], args[4], None, result)

    return result(x, types.intp, types.intp, types.intp, types.intp), codegen


def _view(context: Any, builder: Any, x: Any, array: Any, start: Any, size: Any, axis: int | None, result: Any) -> Any:
    """A 1-D view of the 3-D `array` from the index `start` on: along `axis`, or of adjacent elements where axis is None.

    None in `start` means that whole axis.
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
    return unowned(view)


@intrinsic
def borrowed(typingctx: Any, row: Any) -> Any:
    """The same 1-D array of adjacent elements without reference counting; the caller holds a reference."""
    result = types.Array(row.dtype, 1, "C")

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return unowned(make_array(result)(context, builder, args[0]))

    return result(row), codegen


@intrinsic
def workspace(typingctx: Any, size: Any, like: Any) -> Any:
    """Uninitialised memory for `size` elements of `like`'s dtype, aligned to a cache line; `release` frees it.

    np.empty would count references in the loop over rows, and each count is an atomic operation that waits for all stores
    before it.
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
        return unowned(view)

    return result(size, like), codegen


def _libc(builder: Any, name: str, result: Any, argument: Any) -> Any:
    function = ir.FunctionType(result, [argument.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), [argument])


def _before(builder: Any, start: Any, kind: Any) -> Any:
    """The address, one cache line before the memory, where the address of its malloc block is kept."""
    return builder.inttoptr(builder.sub(start, start.type(LINE)), kind.as_pointer())


@intrinsic
def release(typingctx: Any, scratch: Any) -> Any:
    """Frees the memory of a `workspace`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start = builder.ptrtoint(make_array(scratch)(context, builder, args[0]).data, ir.IntType(64))
        _libc(builder, "free", ir.VoidType(), builder.load(_before(builder, start, ir.IntType(8).as_pointer())))
        return context.get_dummy_value()

    return types.void(scratch), codegen


@inline
def row_scratch(x) -> np.ndarray:
    """Memory for one row x[n, :, s] where the elements of rows are not adjacent; of size 0 where they are."""
    return workspace(0 if x.strides[1] == x.itemsize else x.shape[1], x)


@outline
def copy(source, destination) -> None:
    for i in range(source.size):
        destination[i] = source[i]


@inline
def prefix(scratch, size) -> np.ndarray:
    """scratch[:size] without reference counting; its elements are adjacent."""
    return borrowed(scratch[:size])


@inline
def _is_adjacent(row) -> bool:
    return row.strides[0] == row.itemsize or row.size <= 1


@inline
def gather(row, scratch) -> np.ndarray:
    """`row` with adjacent elements: itself if they are, else copied to `scratch`."""
    if _is_adjacent(row):
        return borrowed(row)
    copy(row, scratch)
    return prefix(scratch, row.size)


@inline
def row_buffer(row, scratch) -> np.ndarray:
    """Buffer to write: `row` if its elements are adjacent, else `scratch`, which `scatter` copies back."""
    if _is_adjacent(row):
        return borrowed(row)
    return prefix(scratch, row.size)


@inline
def scatter(row, scratch) -> None:
    """Copies `scratch` to `row` where `row_buffer` gave scratch."""
    if not _is_adjacent(row):
        copy(scratch[: row.size], row)


@inline
def bypasses_cache(y) -> bool:
    """True where a result's rows y[n, :, s] should be written past the caches: it is large and its rows are adjacent."""
    return y.size * y.itemsize >= LARGE and y.strides[1] == y.itemsize


@inline
def prefetch_row(x, row, last, z_row) -> np.ndarray:
    """The row after `row`, to prefetch while it is computed; `z_row`, the row itself, where prefetching would not help."""
    if row + 1 < last and x.strides[1] == x.itemsize and x.shape[1] * x.itemsize <= AHEAD:
        return line_of(x, (row + 1) // x.shape[2], 0, (row + 1) % x.shape[2], x.shape[1])
    return z_row
