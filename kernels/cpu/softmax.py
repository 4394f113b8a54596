"""Softmax along the middle axis of (N, V, S), on the CPU.

    forward     y_v  = exp(z_v - m) / sum_c exp(z_c - m),  m = max_c z_c      reads z, writes y             2 passes
    backward    dz_v = y_v (dy_v - sum_c dy_c y_c)                            reads dy and y, writes dz     3 passes

A pass is one read or one write of the whole tensor. A row is n, s: it is swept again only while it is in cache. Halves are
computed in float32 and rounded once. A row whose maximum is -inf is 0/0 = NaN.
"""

from __future__ import annotations

import math

import numpy as np

from ._elements import accumulate_dtype, gather, load, place, row_of, row_scratch, same_dtype, scatter, store
from ._jit import kernel, reduction
from ._rows import divide_into, exp_and_excess, row_max
from ._threads import run


@reduction
def _dot(a, b):
    total = 0.0
    for i in range(a.size):
        total += np.float64(load(a, i)) * np.float64(load(b, i))
    return total


@kernel
def _forward_rows(first, last, z, y, acc):
    V, S = z.shape[1], z.shape[2]
    z_scratch, y_scratch = row_scratch(z), row_scratch(y)
    exps = np.empty(V, acc.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row = gather(row_of(z, n, s), z_scratch)
        y_row = place(row_of(y, n, s), y_scratch)
        e = same_dtype(y_row, exps)
        excess = exp_and_excess(z_row, row_max(z_row), e)
        divide_into(e, 1.0 + excess, y_row)
        scatter(row_of(y, n, s), y_scratch)


@kernel
def _backward_rows(first, last, dy, y, dz, acc):
    V, S = y.shape[1], y.shape[2]
    dy_scratch, y_scratch = row_scratch(dy), row_scratch(y)
    dz_scratch = row_scratch(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        dy_row, y_row = gather(row_of(dy, n, s), dy_scratch), gather(row_of(y, n, s), y_scratch)
        total = _dot(dy_row, y_row)
        high = acc.dtype.type(total)
        low = acc.dtype.type(total - np.float64(high) if math.isfinite(total) else 0.0)
        dz_row = place(row_of(dz, n, s), dz_scratch)
        for v in range(V):
            store(dz_row, v, load(y_row, v) * ((load(dy_row, v) - high) - low))
        scatter(row_of(dz, n, s), dz_scratch)


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
