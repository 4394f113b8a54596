"""What softmax and cross entropy do to one row of logits, all of it adjacent in memory.

A row is swept a few times while it is in the nearest cache: maximum, exponentials and their sum, result. Sums are taken
in the row's own precision over chunks, several lanes at a time, and the chunks are added in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from ._elements import bits, exp, from_bits, load, same_dtype, store
from ._jit import inline, reduction


@inline
def chunk_of(acc):
    """Elements whose sum is taken at once, fewer in float64: there the sum of the chunks has no digits to spare."""
    return 1024 if acc.itemsize == 4 else 256


def _ordered(x: Any) -> Any:
    """Integers in the order of the floats, its own inverse on bits; NaN with a clear sign bit lies above infinity."""
    return x


@overload(_ordered)
def _ordered_bits(i):
    if i == types.int64:
        return lambda i: i ^ ((i >> 63) & 0x7FFFFFFFFFFFFFFF)
    return lambda i: np.int32(i ^ ((i >> 31) & 0x7FFFFFFF))  # Numba would make it an int64


@inline
def row_max(z):
    """The maximum of a row, taken on integers so that it vectorises and keeps NaN."""
    top = _ordered(bits(load(z, 0)))
    for i in range(1, z.size):
        key = _ordered(bits(load(z, i)))
        top = key if key > top else top
    return from_bits(_ordered(top))


@reduction
def _exp_chunk(z, shift, e, first, last):
    total = e.dtype.type(0)
    for i in range(first, last):
        value = exp(load(z, i) - shift)
        store(e, i, value)
        total += value
    return total


@reduction
def _exp_total_chunk(z, shift, acc, first, last):
    total = acc.dtype.type(0)
    for i in range(first, last):
        total += exp(load(z, i) - shift)
    return total


@inline
def exp_sum(z, shift, e):
    """e = exp(z - shift), and the sum of it."""
    total, chunk = 0.0, chunk_of(e)
    for first in range(0, z.size, chunk):
        total += np.float64(_exp_chunk(z, shift, e, first, min(first + chunk, z.size)))
    return total


@inline
def exp_total(z, shift, acc):
    """The sum of exp(z - shift), in the dtype of the array `acc` within a chunk."""
    total, chunk = 0.0, chunk_of(acc)
    for first in range(0, z.size, chunk):
        total += np.float64(_exp_total_chunk(z, shift, acc, first, min(first + chunk, z.size)))
    return total


@inline
def scale_into(e, scale, out):
    """out = scale * e, where `e` came from `same_dtype(out, ...)`."""
    out = same_dtype(e, out)  # names one row once, so that LLVM need not ask whether two overlap
    for i in range(e.size):
        store(out, i, e[i] * scale)


@inline
def divide_into(e, total, out):
    """out = e / total with one rounding to speak of, where `e` came from `same_dtype(out, ...)`."""
    high = e.dtype.type(1.0 / total)
    low = e.dtype.type(1.0 / total - np.float64(high))
    out = same_dtype(e, out)
    for i in range(e.size):
        store(out, i, e[i] * high + e[i] * low)


@inline
def fill(out, value):
    for i in range(out.size):
        store(out, i, value)
