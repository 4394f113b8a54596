"""Sums of a run of values that share a mean, for the loops of `planes.py`; `line_sums.py` has those of lines.

Sums are float64. `on` has a byte a position, 1 where it counts, or is None; those of float64 values, which leave no digits to
spare, carry the rounding of each addition along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, overload, reduction
from .._numba.elements import load
from .activation import passed
from .positions import ALL, kept
from .statistics import two_sum, with_low


# ---------------------------------------------------------------------------------------------- statistics
@inline
def _from_shift(x, i, shift) -> float:
    return np.float64(load(x, i)) - shift


@reduction
def _fast_deviation_sums(x, on, shift) -> tuple[float, float]:
    total, square = 0.0, 0.0
    for i in range(x.size):
        d = kept(_from_shift(x, i, shift), on, i)
        total += d
        square += d * d
    return total, square


@inline
def _exact_deviation_sums(x, on, shift) -> tuple[float, float]:
    total, square, total_low, square_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        d = kept(_from_shift(x, i, shift), on, i)
        total, low = two_sum(total, d)
        total_low += low
        square, low = two_sum(square, d * d)
        square_low += low
    return with_low(total, total_low), with_low(square, square_low)


def deviation_sums_of_run(x: Any, on: Any, share: Any, shift: Any) -> Any:
    """sum (x - shift) and sum (x - shift)^2 of what counts, a `share` of the run."""
    return _exact_deviation_sums(x, on, shift)


@overload(deviation_sums_of_run)
def _choose_deviation_sums(x, on, share, shift) -> Callable[..., Any]:
    sums = _exact_deviation_sums if x.dtype == types.float64 else _fast_deviation_sums
    return lambda x, on, share, shift: sums(x, None, shift) if share == ALL else sums(x, on, shift)


# ---------------------------------------------------------------------------------------------- gradients
@inline
def _from_mean(x, i, mean, rest) -> float:
    return (load(x, i) - mean) - rest


@reduction
def _fast_gradient_sums(dy, x, on, mean, rest, result) -> tuple[float, float]:
    total, product = 0.0, 0.0
    for i in range(x.size):
        g = np.float64(kept(passed(load(dy, i), result, i), on, i))
        total += g
        product += g * np.float64(kept(_from_mean(x, i, mean, rest), on, i))
    return total, product


@inline
def _exact_gradient_sums(dy, x, on, mean, rest, result) -> tuple[float, float]:
    total, product, total_low, product_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        g = kept(passed(load(dy, i), result, i), on, i)
        total, low = two_sum(total, g)
        total_low += low
        product, low = two_sum(product, g * kept(_from_mean(x, i, mean, rest), on, i))
        product_low += low
    return with_low(total, total_low), with_low(product, product_low)


def gradient_sums_of_run(dy: Any, x: Any, on: Any, share: Any, mean: Any, rest: Any, result: Any) -> Any:
    """sum dy and sum dy (x - mean) of what counts, a `share` of the run, and what `result`, a ReLU's, lets pass."""
    return _exact_gradient_sums(dy, x, on, mean, rest, result)


@overload(gradient_sums_of_run)
def _choose_gradient_sums(dy, x, on, share, mean, rest, result) -> Callable[..., Any]:
    sums = _exact_gradient_sums if x.dtype == types.float64 else _fast_gradient_sums
    return lambda dy, x, on, share, mean, rest, result: (
        sums(dy, x, None, mean, rest, result) if share == ALL else sums(dy, x, on, mean, rest, result)
    )
