"""Sums at each position of the lines of `lines.py` and `tiles.py`.

Sums are float64, and so is what they are sums of, from where it is loaded. Several lines at once: a sum is read and written
once for all of them. Float64 data leaves no digits to spare: there the memory has a second half, for what the roundings left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import literal_unroll, types

from .._numba.compile import inline, overload
from .._numba.simd import Lanes, load_lanes, load_lanes_like, store_lanes
from .activation import passed_lanes
from .statistics import two_sum


# ---------------------------------------------------------------------------------------------- memory and one addition
def sums_memory(x: Any, positions: Any) -> Any:
    """Memory for a sum at each position of a line of x."""


@overload(sums_memory)
def _choose_sums_memory(x, positions) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, positions: np.empty(2 * positions)
    return lambda x, positions: np.empty(positions)


def lanes_left_at(x: Any, sums: Any, p: Any, exist: Any) -> Any:
    """What the roundings of the sums at the positions p… left: a vector, or 0."""


@overload(lanes_left_at)
def _choose_lanes_left_at(x, sums, p, exist) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, sums, p, exist: load_lanes(sums, (sums.size >> 1) + p, exist, 0.0)
    return lambda x, sums, p, exist: 0.0


@inline
def _add_plainly(sums, p, exist, v) -> None:
    store_lanes(sums, p, exist, load_lanes(sums, p, exist, 0.0) + v)


@inline
def _add_exactly(sums, p, exist, vectors) -> None:
    left_from = (sums.size >> 1) + p
    total, left = load_lanes(sums, p, exist, 0.0), load_lanes(sums, left_from, exist, 0.0)
    for v in literal_unroll(vectors):
        total, low = two_sum(total, v)
        left = left + low
    store_lanes(sums, p, exist, total)
    store_lanes(sums, left_from, exist, left)


def _add(x: Any, sums: Any, p: Any, exist: Any, vectors: Any) -> None:
    """Adds the vectors, one of each line, to the sums of the positions p…; x is one of the lines."""


@overload(_add)
def _choose_add(x, sums, p, exist, vectors) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, sums, p, exist, vectors: _add_exactly(sums, p, exist, vectors)
    return {
        1: lambda x, sums, p, exist, vectors: _add_plainly(sums, p, exist, vectors[0]),
        2: lambda x, sums, p, exist, vectors: _add_plainly(sums, p, exist, vectors[0] + vectors[1]),
        4: lambda x, sums, p, exist, vectors: _add_plainly(
            sums, p, exist, (vectors[0] + vectors[1]) + (vectors[2] + vectors[3])
        ),
    }[len(vectors)]


# ---------------------------------------------------------------------------------------------- statistics
@inline
def add_deviations(p, exist, args) -> None:
    """Adds x - shift and its square to the sums of the positions p…."""
    x, shift, total, square = args
    d = load_lanes_like(x, p, exist, 0.0, total) - load_lanes(shift, p, exist, 0.0)
    _add(x, total, p, exist, (d,))
    _add(x, square, p, exist, (d * d,))


@inline
def add_four_deviations(p, exist, args) -> None:
    """As `add_deviations`, of four lines."""
    x0, x1, x2, x3, shift, total, square = args
    about = load_lanes(shift, p, exist, 0.0)
    d0, d1 = load_lanes_like(x0, p, exist, 0.0, total) - about, load_lanes_like(x1, p, exist, 0.0, total) - about
    d2, d3 = load_lanes_like(x2, p, exist, 0.0, total) - about, load_lanes_like(x3, p, exist, 0.0, total) - about
    _add(x0, total, p, exist, (d0, d1, d2, d3))
    _add(x0, square, p, exist, (d0 * d0, d1 * d1, d2 * d2, d3 * d3))


# ---------------------------------------------------------------------------------------------- gradients
@inline
def _from_one(x, p, exist, mean, rest, like) -> Lanes:
    return load_lanes_like(x, p, exist, 0.0, like) - load_lanes_like(mean, p, exist, 0.0, like)


@inline
def _from_two(x, p, exist, mean, rest, like) -> Lanes:
    return _from_one(x, p, exist, mean, rest, like) - load_lanes_like(rest, p, exist, 0.0, like)


def _from_mean(x: Any, p: Any, exist: Any, mean: Any, rest: Any, like: Any) -> Any:
    """(x - mean) - rest; `rest` counts unless float64 holds the mean of what has fewer digits: it is below 2^-53 of it."""
    return _from_two(x, p, exist, mean, rest, like)


@overload(_from_mean)
def _choose_from_mean(x, p, exist, mean, rest, like) -> Callable[..., Any]:
    if mean.dtype == types.float64 and x.dtype != types.float64:
        return lambda x, p, exist, mean, rest, like: _from_one(x, p, exist, mean, rest, like)
    return lambda x, p, exist, mean, rest, like: _from_two(x, p, exist, mean, rest, like)


@inline
def add_gradients(p, exist, args) -> None:
    """Adds dy and dy (x - mean) to the sums of the positions p…; dy counts where `result`, a ReLU's, lets it pass."""
    dy, x, result, mean, rest, total, product = args
    g = passed_lanes(load_lanes_like(dy, p, exist, 0.0, total), result, p, exist, total)
    _add(x, total, p, exist, (g,))
    _add(x, product, p, exist, (g * _from_mean(x, p, exist, mean, rest, total),))


@inline
def add_two_gradients(p, exist, args) -> None:
    """As `add_gradients`, of two lines."""
    dy0, dy1, x0, x1, result0, result1, mean, rest, total, product = args
    g0 = passed_lanes(load_lanes_like(dy0, p, exist, 0.0, total), result0, p, exist, total)
    g1 = passed_lanes(load_lanes_like(dy1, p, exist, 0.0, total), result1, p, exist, total)
    d0, d1 = _from_mean(x0, p, exist, mean, rest, total), _from_mean(x1, p, exist, mean, rest, total)
    _add(x0, total, p, exist, (g0, g1))
    _add(x0, product, p, exist, (g0 * d0, g1 * d1))
