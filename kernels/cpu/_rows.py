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
    """Elements whose sum is taken at once, in the array's own precision."""
    return 512


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


@inline
def _exp_chunk(z, shift, e, first, last):
    for i in range(first, last):
        store(e, i, exp(load(z, i) - shift))


@reduction
def _exp_and_sum_chunk(z, shift, e, first, last):
    total = e.dtype.type(0)
    for i in range(first, last):
        value = exp(load(z, i) - shift)
        store(e, i, value)
        total += value
    return total


@reduction
def _sum_chunk(e, first, last):
    total = e.dtype.type(0)
    for i in range(first, last):
        total += load(e, i)
    return total


@reduction
def _exp_sum_chunk(z, shift, acc, first, last):
    total = acc.dtype.type(0)
    for i in range(first, last):
        total += exp(load(z, i) - shift)
    return total


@reduction
def _sum_apart(e, first, last):
    """(the sum of the values that are not 1, how many these are)"""
    of = e.dtype.type
    rest, others, one = of(0), of(0), of(1)
    for i in range(first, last):
        value = load(e, i)
        other = of(value != one)  # a factor: a choice between two values would not be vectorised where NaN has to pass
        rest += value * other
        others += other
    return rest, others


@reduction
def _exp_sum_apart(z, shift, acc, first, last):
    of = acc.dtype.type
    rest, others, one = of(0), of(0), of(1)
    for i in range(first, last):
        value = exp(load(z, i) - shift)
        other = of(value != one)
        rest += value * other
        others += other
    return rest, others


# Sums minus 1, for shift = max z, whose exponential is that 1: where p -> 1 the rest would lose its digits beside it, so
# that a small sum is taken again without it.
SMALL = 2.0


@inline
def exp_and_excess(z, shift, e):
    """e = exp(z - shift), shift = max z; returns sum e - 1."""
    total, rest, others, chunk = 0.0, 0.0, 0.0, chunk_of(e)
    if z.size < chunk:
        # LLVM vectorises a loop that reads and writes only where the two arrays lie some 256 bytes apart, and the order of
        # the additions goes with that: arrays that may be nearer are read and written first, and then summed
        _exp_chunk(z, shift, e, 0, z.size)
        total = np.float64(_sum_chunk(e, 0, z.size))
    else:
        for first in range(0, z.size, chunk):
            total += np.float64(_exp_and_sum_chunk(z, shift, e, first, min(first + chunk, z.size)))
    if not total < SMALL:
        return total - 1.0
    for first in range(0, z.size, chunk):
        sums = _sum_apart(e, first, min(first + chunk, z.size))
        rest, others = rest + np.float64(sums[0]), others + np.float64(sums[1])
    return rest + ((z.size - 1) - others)


@inline
def excess_of_logits(z, shift, acc):
    """sum exp(z - max z) - 1, in the dtype of the array `acc` within a chunk."""
    total, rest, others, chunk = 0.0, 0.0, 0.0, chunk_of(acc)
    for first in range(0, z.size, chunk):
        total += np.float64(_exp_sum_chunk(z, shift, acc, first, min(first + chunk, z.size)))
    if not total < SMALL:
        return total - 1.0
    for first in range(0, z.size, chunk):
        sums = _exp_sum_apart(z, shift, acc, first, min(first + chunk, z.size))
        rest, others = rest + np.float64(sums[0]), others + np.float64(sums[1])
    return rest + ((z.size - 1) - others)


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
