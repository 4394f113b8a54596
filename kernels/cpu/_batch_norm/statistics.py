"""The statistics of a channel from sums that were taken in pieces.

Sums are of d = x - shift, in float64, where `shift` is the mean of a few first values of the channel, or 0 where they spread
around it. With m values

    mean = shift + sum d / m,    var = sum d^2 / m - (sum d / m)^2

and what that difference cancels is (mean - shift)^2 / var. Where this is large, which takes first values unlike the rest,
the sums are taken again about the mean just found. Pieces are added in order with the rounding of each addition carried
along, so that float64 input has the accuracy of float64 too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import exact, inline, kernel, overload
from .._numba.elements import fma, load
from .._numba.simd import Lanes, load_lanes, where_at_most, write
from .._numba.views import line_of, plane_of
from .positions import counts

# Values of a channel whose mean is the shift.
SHIFT_VALUES = 16
# (mean - shift)^2 / var above which the sums are taken again: the difference cancels at most 6 bits.
FAR_SHIFT = 64.0


# ---------------------------------------------------------------------------------------------- sums in pieces
@exact
def two_sum(a, b) -> tuple[float, float]:
    """a + b in two parts: the rounded sum, and what the rounding left (Knuth)."""
    high = a + b
    part = high - a
    return high, (a - (high - part)) + (b - part)


@exact
def with_low(total, low) -> float:
    """A sum and what its roundings left; an infinite sum has left NaN."""
    return total + low if math.isfinite(low) else total


@inline
def add_to(sums, j, first, second) -> None:
    """Add to the two sums of channel j. sums (2, 2, channels): the sums, and what their roundings left."""
    sums[0, 0, j], low = two_sum(sums[0, 0, j], first)
    sums[1, 0, j] += low
    sums[0, 1, j], low = two_sum(sums[0, 1, j], second)
    sums[1, 1, j] += low


@inline
def sums_of(sums, j) -> tuple[float, float]:
    """The two sums of channel j."""
    return with_low(sums[0, 0, j], sums[1, 0, j]), with_low(sums[0, 1, j], sums[1, 1, j])


@inline
def lanes_with_low(total, low) -> Lanes:
    """As `with_low`, of vectors: low 0 is NaN where `low` is not finite."""
    return where_at_most(low * 0.0, 0.0, total + low, total)


@inline
def _merged(c, exist, args) -> Lanes:
    """The sums over the blocks of the channels c…, of sum k."""
    partial, k = args
    C = partial.shape[2]
    total = load_lanes(line_of(partial, 0, k, 0, C), c, exist, 0.0)
    low = total - total
    for b in range(1, partial.shape[0]):
        total, left = two_sum(total, load_lanes(line_of(partial, b, k, 0, C), c, exist, 0.0))
        low = low + left
    return lanes_with_low(total, low)


@kernel
def merge(partial, sums) -> None:
    """sums (2, C) = the sum over the blocks of partial (blocks, 2, C), one at least, in order."""
    for k in range(2):
        write(sums[k], False, _merged, (partial, k))


# ---------------------------------------------------------------------------------------------- shift
@inline
def shift_of(total, size, count) -> float:
    """The mean of `count` values of this sum; 0 if they spread as far as that, or if it is no finite number."""
    mean = total / count
    return mean if math.isfinite(mean) and abs(total) > 0.7 * size else 0.0


@inline
def first_positions(x, on) -> np.ndarray:
    """(n, s) of the first positions that count, SHIFT_VALUES at most: int64 (2, …)."""
    found, count = np.empty((2, SHIFT_VALUES), np.int64), 0
    for n in range(x.shape[0]):
        for s in range(x.shape[2]):
            if counts(on, n, s):
                found[0, count], found[1, count] = n, s
                count += 1
                if count == SHIFT_VALUES:
                    return found
    return found[:, :count]


@inline
def first_mean(x, c, at) -> float:
    """The shift by the values of channel c at the positions `at`; 0 where there are none."""
    total, size = 0.0, 0.0
    for i in range(at.shape[1]):
        value = np.float64(load(plane_of(x, at[0, i], c, at[1, i], at[1, i] + 1), 0))
        total += value
        size += abs(value)
    return shift_of(total, size, at.shape[1])


@inline
def better_shift(shift, total, square, m) -> float:
    """The mean, if `shift` is too far from it for `finish`; else NaN."""
    of_m = 1.0 / m
    d = total * of_m
    return shift + d if d * d > FAR_SHIFT * (square * of_m - d * d) and math.isfinite(d) else math.nan


@kernel
def first_means(x, on, shift) -> None:
    """shift (C,) of all channels; reads SHIFT_VALUES values of each."""
    at = first_positions(x, on)
    for c in range(x.shape[1]):
        shift[c] = first_mean(x, c, at)


@kernel
def better_shifts(shift, sums, m) -> int:
    """Replace every shift that is too far from its channel's mean; True if there was one."""
    found = False
    for c in range(shift.size):
        better = better_shift(shift[c], sums[0, c], sums[1, c], m)
        if better == better:
            shift[c] = better
            found = True
    return found


# ---------------------------------------------------------------------------------------------- statistics
# A number in two parts, high + low, is held to about twice the digits of float64.
@exact
def _divide(a, m) -> tuple[float, float]:
    """a / m in two parts, the first perhaps an ulp off: the second has what it left. 1 / m is taken once for all channels."""
    of_m = 1.0 / m
    high = a * of_m
    return high, fma(-high, m, a) * of_m


@exact
def _reciprocal_root(high, low) -> float:
    """1 / sqrt(high + low): a Newton step on the rounded one, with its square in two parts."""
    root = 1.0 / math.sqrt(high)
    square = root * root
    left = fma(-high, square, 1.0) - high * fma(root, root, -square) - low * square
    return root + 0.5 * root * left if math.isfinite(left) else root


@exact
def _exactly(shift, total, square, m, eps) -> tuple[float, float, float, float]:
    """Mean, what its rounding left, var and rstd, each with one rounding in float64: for results that have all its digits."""
    d, d_low = _divide(total, m)
    mu, mu_low = two_sum(shift, d)
    square, square_low = _divide(square, m)
    d2 = d * d
    variance, low = two_sum(square, -d2)
    low += square_low - (fma(d, d, -d2) + 2.0 * d * d_low)
    if math.isfinite(low):
        variance, low = (variance, low) if variance + low > 0.0 else (0.0, 0.0)
    else:
        low = 0.0
    with_eps, eps_low = two_sum(variance, eps)
    return mu, mu_low + d_low, variance + low, _reciprocal_root(with_eps, eps_low + low)


@inline
def _plainly(shift, total, square, m, eps) -> tuple[float, float, float, float]:
    """As `_exactly`, by float64's operations: for results of fewer digits, in a fifth of the time."""
    of_m = 1.0 / m
    d = total * of_m
    variance = square * of_m - d * d
    variance = 0.0 if variance < 0.0 else variance
    return shift + d, 0.0, variance, 1.0 / math.sqrt(variance + eps)


def _of_sums(var: Any, shift: Any, total: Any, square: Any, m: Any, eps: Any) -> Any:
    """Mean, what its rounding left, var and rstd from the sums about `shift`, for results like `var`."""
    return _exactly(shift, total, square, m, eps)


@overload(_of_sums)
def _choose_of_sums(var, shift, total, square, m, eps) -> Callable[..., Any]:
    statistics = _exactly if var.dtype == types.float64 else _plainly
    return lambda var, shift, total, square, m, eps: statistics(shift, total, square, m, eps)


@inline
def finish(c, shift, total, square, m, eps, momentum, mean, var, rstd, running_mean, running_var) -> None:
    """The statistics of channel c from its sums about `shift`, rounded to their dtype."""
    of = var.dtype.type
    mu, mu_low, variance, rstd_of_c = _of_sums(var, shift, total, square, m, eps)
    mean[0, c] = of(mu)
    rest = (mu - np.float64(mean[0, c])) + mu_low
    mean[1, c] = of(rest) if math.isfinite(rest) else of(0)
    var[c], rstd[c] = of(variance), of(rstd_of_c)
    if running_mean.size:
        running_mean[c] = of((1.0 - momentum) * running_mean[c] + momentum * mu)
    if running_var.size:
        running_var[c] = of((1.0 - momentum) * running_var[c] + momentum * (variance * (m / max(m - 1.0, 1.0))))


@kernel
def finish_all(shift, sums, m, eps, momentum, mean, var, rstd, running_mean, running_var) -> None:
    """The statistics of all channels from sums (2, C) about shift (C,)."""
    for c in range(shift.size):
        finish(c, shift[c], sums[0, c], sums[1, c], m, eps, momentum, mean, var, rstd, running_mean, running_var)


@kernel
def finish_gradients(sums, rstd, dgamma, dbeta) -> None:
    """dbeta and dgamma from sum dy and sum dy (x - mean)."""
    of = rstd.dtype.type
    for c in range(rstd.size):
        dbeta[c] = of(sums[0, c])
        dgamma[c] = of(sums[1, c] * rstd[c])
