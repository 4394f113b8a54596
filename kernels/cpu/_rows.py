"""What softmax and cross entropy do to one row of logits, all of it adjacent in memory.

A row is swept a few times while it is in the nearest cache: maximum, exponentials and their sum, result. Sums are taken
in the row's own precision over chunks, several lanes at a time, and the chunks are added in float64.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba.compile import inline
from ._numba.elements import store
from ._numba.exp import exp
from ._numba.simd import Lanes, larger, largest_of, load_lanes, prefetch, store_lanes, sum_of, unequal, width, write, zeros_like
from ._numba.views import workspace

# Elements whose sum is taken at once, in the row's own precision.
CHUNK = 512


@inline
def row_max(z) -> float:
    """The maximum of a row. A NaN in it may be passed over: the sum of exponentials is NaN then."""
    i, size, count = 0, z.size, width(z)
    a = load_lanes(z, 0, min(size, count), -math.inf)
    b = a
    while i + 2 * count <= size:
        a = larger(a, load_lanes(z, i, width(z), 0.0))
        b = larger(b, load_lanes(z, i + count, width(z), 0.0))
        i += 2 * count
    while i < size:
        a = larger(a, load_lanes(z, i, min(count, size - i), -math.inf))
        i += count
    return largest_of(larger(a, b))


# Sums minus 1, for shift = max z, whose exponential is that 1: where p -> 1 the rest would lose its digits beside it, so
# that a small sum is taken again without it.
SMALL = 2.0


@inline
def exps_workspace(V, acc) -> np.ndarray:
    """For the exponentials of a row: the last vector is written and read whole."""
    return workspace(V + width(acc), acc)


@inline
def exp_and_sum_minus_1(z, shift, e, ahead) -> float:
    """e = exp(z - shift), shift = max z, in `exps_workspace`; returns sum e - 1. Meanwhile fetches the row `ahead`."""
    total = sum_of_row(z, _kept, (z, shift, e), ahead)
    return total - 1.0 if not total < SMALL else small_sum_exp_minus_1(z, _stored, (e,))


@inline
def sum_of_row(z, lanes, args, ahead) -> float:
    """The sum of lanes(i, exist, args), vectors of z's kind, over a row as long as z. Meanwhile fetches the row `ahead`."""
    total, size, count = 0.0, z.size, width(z)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(z, i, 0, 0.0))
        while i + count <= last:
            prefetch(ahead, i)
            a = a + lanes(i, width(z), args)
            i += count
        if i < last:
            a = a + lanes(i, last - i, args)
        total += np.float64(sum_of(a))
    return total


@inline
def sums_of_row(z, lanes, args, ahead) -> tuple[float, float]:
    """As `sum_of_row`, two sums of the pairs that `lanes` gives."""
    total, other, size, count = 0.0, 0.0, z.size, width(z)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(z, i, 0, 0.0))
        b = a
        while i + count <= last:
            prefetch(ahead, i)
            pair = lanes(i, width(z), args)
            a, b = a + pair[0], b + pair[1]
            i += count
        if i < last:
            pair = lanes(i, last - i, args)
            a, b = a + pair[0], b + pair[1]
        total, other = total + np.float64(sum_of(a)), other + np.float64(sum_of(b))
    return total, other


@inline
def sum_exp_minus_1_of_logits(z, shift, ahead) -> float:
    """sum exp(z - max z) - 1, as `exp_and_sum_minus_1` has it. Meanwhile fetches the row `ahead`."""
    total = sum_of_row(z, _computed, (z, shift), ahead)
    return total - 1.0 if not total < SMALL else small_sum_exp_minus_1(z, _computed, (z, shift))


@inline
def _kept(i, exist, args) -> Lanes:
    z, shift, e = args
    x = exp(load_lanes(z, i, exist, -math.inf) - shift)
    store_lanes(e, i, width(z), x)
    return x


@inline
def _stored(i, exist, args) -> Lanes:
    return load_lanes(args[0], i, width(args[0]), 0.0)


@inline
def _computed(i, exist, args) -> Lanes:
    return exp(load_lanes(args[0], i, exist, -math.inf) - args[1])


@inline
def small_sum_exp_minus_1(z, lanes, args) -> float:
    """sum e - 1 without the exponentials that are 1, e = lanes(i, exist, args)."""
    rest, others, size, count = 0.0, 0.0, z.size, width(z)
    for first in range(0, size, CHUNK):
        i, last = first, min(first + CHUNK, size)
        a = zeros_like(load_lanes(z, i, 0, 0.0))
        b = a
        while i + count <= last:
            x = lanes(i, width(z), args)
            other = unequal(x, 1.0)  # a factor, which lets NaN pass
            a, b = a + x * other, b + other
            i += count
        if i < last:
            x = lanes(i, last - i, args)
            other = unequal(x, 1.0)
            a, b = a + x * other, b + other
        rest, others = rest + np.float64(sum_of(a)), others + np.float64(sum_of(b))
    return rest + ((-(-size // count) * count - 1) - others)  # lanes that do not exist are 0, and counted


# ---------------------------------------------------------------------------------------------- results
@inline
def _divided(i, exist, args) -> Lanes:
    e, high, low = args
    x = load_lanes(e, i, width(e), 0.0)
    return x * high + x * low


@inline
def divide_into(e, total, out, around) -> None:
    """out = e / total with one rounding to speak of."""
    high = e.dtype.type(1.0 / total)
    low = e.dtype.type(1.0 / total - np.float64(high))
    write(out, around, _divided, (e, high, low))


@inline
def fill(out, value) -> None:
    for i in range(out.size):
        store(out, i, value)
