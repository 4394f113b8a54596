"""Softmax along the middle axis of (N, V, S), on the CPU.

    forward     y_v  = exp(z_v - m) / sum_c exp(z_c - m),  m = max_c z_c      reads z, writes y             2 passes
    backward    dz_v = y_v (dy_v - sum_c dy_c y_c)                            reads dy and y, writes dz     3 passes

A pass is one read or one write of the whole tensor. A row is n, s: it is swept again only while it is in cache. Halves are
computed in float32 and rounded once. A row whose maximum is -inf is 0/0 = NaN.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba.compile import inline, kernel
from ._numba.elements import accumulate_dtype
from ._numba.simd import Lanes, load_lanes, prefetch, streamed, sum_of, wide, width, write, zeros_like
from ._numba.threads import Moves, moving, run
from ._numba.views import bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from ._rows import divide_into, exp_and_sum_minus_1, exps_workspace, row_max


@inline
def _dot(a, b) -> float:
    """sum a b in float64."""
    i, size, count = 0, a.size, width(a)
    total = zeros_like(wide(load_lanes(a, 0, 0, 0.0)))
    while i + count <= size:
        total = total + wide(load_lanes(a, i, width(a), 0.0)) * wide(load_lanes(b, i, width(b), 0.0))
        i += count
    if i < size:
        total = total + wide(load_lanes(a, i, size - i, 0.0)) * wide(load_lanes(b, i, size - i, 0.0))
    return sum_of(total)


@kernel
def _forward_rows(first, last, z, y, acc) -> None:
    """Rows first…last - 1: reads z, writes y = exp(z - m) / sum exp(z - m)."""
    V, S = z.shape[1], z.shape[2]
    z_scratch, y_scratch = row_scratch(z), row_scratch(y)
    exps, around = exps_workspace(V, acc), bypasses_cache(y)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row = gather(row_of(z, n, s), z_scratch)
        y_row = row_buffer(row_of(y, n, s), y_scratch)
        sum_exp_minus_1 = exp_and_sum_minus_1(z_row, row_max(z_row), exps, prefetch_row(z, row, last, z_row))
        divide_into(exps, 1.0 + sum_exp_minus_1, y_row, around)
        scatter(row_of(y, n, s), y_scratch)
    streamed()
    release(z_scratch)
    release(y_scratch)
    release(exps)


@inline
def _gradient(i, exist, args) -> Lanes:
    dy, y, high, low, dy_ahead, y_ahead = args
    prefetch(dy_ahead, i)
    prefetch(y_ahead, i)
    return load_lanes(y, i, exist, 0.0) * ((load_lanes(dy, i, exist, 0.0) - high) - low)


@kernel
def _backward_rows(first, last, dy, y, dz, acc) -> None:
    """Rows first…last - 1: reads dy and y, writes dz = y (dy - sum dy y)."""
    S = y.shape[2]
    dy_scratch, y_scratch = row_scratch(dy), row_scratch(y)
    dz_scratch, around = row_scratch(dz), bypasses_cache(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        dy_row, y_row = gather(row_of(dy, n, s), dy_scratch), gather(row_of(y, n, s), y_scratch)
        total = _dot(dy_row, y_row)
        high = acc.dtype.type(total)
        low = acc.dtype.type(total - np.float64(high) if math.isfinite(total) else 0.0)
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        following = prefetch_row(dy, row, last, dy_row), prefetch_row(y, row, last, y_row)
        write(dz_row, around, _gradient, (dy_row, y_row, high, low, *following))
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(y_scratch)
    release(dy_scratch)
    release(dz_scratch)


moving(Moves(("z",), ("y",)), _forward_rows)
moving(Moves(("dy", "y"), ("dz",)), _backward_rows)


def forward(z: np.ndarray, y: np.ndarray) -> None:
    """y = softmax(z) along axis 1. Both (N, V, S)."""
    assert y.shape == z.shape, (y.shape, z.shape)
    if z.size:
        run(_forward_rows, z.shape[0] * z.shape[2], 3 * z.nbytes, z, y, np.empty(0, accumulate_dtype(z)))


def backward(dy: np.ndarray, y: np.ndarray, dz: np.ndarray) -> None:
    """dz = y (dy - sum(dy y)) along axis 1. All (N, V, S)."""
    assert dy.shape == y.shape == dz.shape, (dy.shape, y.shape, dz.shape)
    if y.size:
        run(_backward_rows, y.shape[0] * y.shape[2], 3 * y.nbytes, dy, y, dz, np.empty(0, accumulate_dtype(y)))
