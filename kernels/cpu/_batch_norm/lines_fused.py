"""Batch normalisation with a residual, a ReLU and its mask, where a channel's values are scattered (see `lines.py`).

The layout of x decides what a line is; the bits of a line are whole bytes of the mask, from this byte on:

    tiles    the small planes of `group` channels of a sample    after those of the tiles before, sample by sample
    rows     `rows` rows v // S, v % S of C channels             (v / rows) ceil(rows C / 8)

What has another layout is copied, a line at a time. A residual, a mask or a dresidual that is not given is empty.
"""

from __future__ import annotations

import numpy as np

from .._numba.compile import inline, kernel, outline
from .._numba.elements import load, store
from .._numba.simd import streamed
from .._numba.views import copy, line_of, prefix
from .lines import (
    MEAN,
    REST,
    SCALE,
    SHIFT_1,
    _add_gradients,
    _along,
    _apply,
    _fold,
    _goes_around,
    _means_of_rows,
    _normalization_of_rows,
    _of,
    _slopes_of_rows,
    parameters,
)
from .mask import bits_at, bytes_for, let_through, put_bits
from .tiles import (
    _gradients_of_tile,
    _means_of_tile,
    _normalization_of_tile,
    _scale_of_tile,
    _slopes_of_tile,
    _statistics,
    _tile_sums,
)


# ---------------------------------------------------------------------------------------------- a line of any layout
# A line begins at [n, c, s] and runs along C, then S, then N where it is of rows, along S, then C where it is of a tile.
@outline
def _next(a, n, c, s, of_rows):
    C, S = a.shape[1], a.shape[2]
    if of_rows:
        c += 1
        if c == C:
            c, s = 0, s + 1
            if s == S:
                s, n = 0, n + 1
    else:
        s += 1
        if s == S:
            s, c = 0, c + 1
    return n, c, s


@outline
def _copy_in(a, n, c, s, of_rows, line):
    for p in range(line.size):
        line[p] = a[n, c, s]
        n, c, s = _next(a, n, c, s, of_rows)


@outline
def _copy_out(line, a, n, c, s, of_rows):
    for p in range(line.size):
        a[n, c, s] = line[p]
        n, c, s = _next(a, n, c, s, of_rows)


@inline
def _scratch(a, size, rows):
    """Room for a line of `a`, empty where its elements are adjacent. rows: 0 for tiles."""
    N, C, S = a.shape
    if rows:
        adjacent = C == 1 or a.strides[1] == a.itemsize
        if rows > 1:
            adjacent = adjacent and (S == 1 or a.strides[2] == C * a.itemsize)
            adjacent = adjacent and (N == 1 or a.strides[0] == S * C * a.itemsize)
    else:
        adjacent = (S == 1 or a.strides[2] == a.itemsize) and (C == 1 or a.strides[1] == S * a.itemsize)
    return np.empty(0 if adjacent else size, a.dtype)


@inline
def _gather(a, n, c, s, size, of_rows, scratch):
    if scratch.size == 0:
        return line_of(a, n, c, s, size)
    line = prefix(scratch, size)
    _copy_in(a, n, c, s, of_rows, line)
    return line


@inline
def _place(a, n, c, s, size, scratch):
    return line_of(a, n, c, s, size) if scratch.size == 0 else prefix(scratch, size)


@inline
def _scatter(line, a, n, c, s, of_rows, scratch):
    if scratch.size:
        _copy_out(line, a, n, c, s, of_rows)


# ---------------------------------------------------------------------------------------------- one line
@inline
def _add_line(x, at, residual, y):
    for p in range(x.size):
        value = ((load(x, p) - at[0, MEAN, p]) - at[0, REST, p]) * at[0, SCALE, p] + at[0, SHIFT_1, p]
        store(y, p, value + load(residual, p))


@inline
def _add_relu_line(x, at, residual, y, zero, on):
    """NaN passes, as in PyTorch."""
    for p in range(x.size):
        value = ((load(x, p) - at[0, MEAN, p]) - at[0, REST, p]) * at[0, SCALE, p] + at[0, SHIFT_1, p]
        value += load(residual, p)
        passes = not value <= zero
        on[p] = passes
        store(y, p, value if passes else zero)


@inline
def _scale_line(dy, at, dx):
    for p in range(dy.size):
        store(dx, p, load(dy, p) * at[0, SCALE, p])


@inline
def _forward_scratch(x, residual, y, size, rows):
    """Room for lines that are not adjacent, zeros in the place of no residual, and a number for each bit."""
    zeros = _scratch(residual, size, rows) if residual.size else np.zeros(size, residual.dtype)
    return _scratch(x, size, rows), zeros, _scratch(y, size, rows), np.empty(8 * bytes_for(size), np.uint8)


@inline
def _backward_scratch(dy, x, dx, dresidual, size, rows):
    """Room for lines that are not adjacent, and for what passes of dy where it is not dresidual."""
    of_dresidual, passed = _scratch(dresidual, size, rows), np.empty(size, dresidual.dtype)
    return _scratch(dy, size, rows), _scratch(x, size, rows), _scratch(dx, size, rows), of_dresidual, passed


@inline
def _normalize_line(x, n, c, s, size, of_rows, at, residual, y, mask, byte, scratch):
    x_scratch, residual_scratch, y_scratch, on = scratch
    x_line, y_line = _gather(x, n, c, s, size, of_rows, x_scratch), _place(y, n, c, s, size, y_scratch)
    if residual.size:
        rest = _gather(residual, n, c, s, size, of_rows, residual_scratch)
    else:
        rest = prefix(residual_scratch, size)
    if mask.size:
        _add_relu_line(x_line, at, rest, y_line, at.dtype.type(0), on)
        put_bits(on, size, bits_at(mask, byte, size))
    else:
        _add_line(x_line, at, rest, y_line)
    _scatter(y_line, y, n, c, s, of_rows, y_scratch)


@inline
def _passed(dy, n, c, s, size, of_rows, mask, byte, out, dy_scratch):
    """`out`: the line of dy as far as the mask lets it through."""
    line = _gather(dy, n, c, s, size, of_rows, dy_scratch)
    if mask.size:
        let_through(line, bits_at(mask, byte, size), out)
    else:
        copy(line, out)


@inline
def _add_gradients_line(dy, x, n, c, s, size, of_rows, mask, byte, at, total, product, scratch):
    dy_scratch, x_scratch, _, _, passed_scratch = scratch
    passed = prefix(passed_scratch, size)
    _passed(dy, n, c, s, size, of_rows, mask, byte, passed, dy_scratch)
    x_line = _gather(x, n, c, s, size, of_rows, x_scratch)
    _along(size, total, _add_gradients, (passed, x_line, _of(at, MEAN), _of(at, REST), total, product))


@inline
def _apply_line(dy, x, n, c, s, size, of_rows, mask, byte, at, trained, dx, dresidual, scratch):
    dy_scratch, x_scratch, dx_scratch, dresidual_scratch, passed_scratch = scratch
    if dresidual.size:
        passed = _place(dresidual, n, c, s, size, dresidual_scratch)
    else:
        passed = prefix(passed_scratch, size)
    _passed(dy, n, c, s, size, of_rows, mask, byte, passed, dy_scratch)
    dx_line = _place(dx, n, c, s, size, dx_scratch)
    if trained:
        _apply(passed, _gather(x, n, c, s, size, of_rows, x_scratch), at, dx_line, _goes_around(dx))
    else:
        _scale_line(passed, at, dx_line)
    _scatter(dx_line, dx, n, c, s, of_rows, dx_scratch)
    if dresidual.size:
        _scatter(passed, dresidual, n, c, s, of_rows, dresidual_scratch)


# ---------------------------------------------------------------------------------------------- tiles
@inline
def _tile_byte(x, n, c, group):
    """Where the bits of the tile of channel c on begin."""
    C, S = x.shape[1], x.shape[2]
    of_tile = bytes_for(group * S)
    return n * (C // group * of_tile + bytes_for(C % group * S)) + c // group * of_tile


@inline
def _normalize_tile(x, c, size, group, at, residual, y, mask, scratch):
    for n in range(x.shape[0]):
        _normalize_line(x, n, c, 0, size, False, at, residual, y, mask, _tile_byte(x, n, c, group), scratch)


@inline
def _tile_gradients(dy, x, c, size, group, mask, at, total, product, sums, scratch):
    N, S = x.shape[0], x.shape[2]
    total[:] = 0.0
    product[:] = 0.0
    for n in range(N):
        byte = _tile_byte(x, n, c, group)
        _add_gradients_line(dy, x, n, c, 0, size, False, mask, byte, at, total, product, scratch)
    _tile_sums(x, total, product, c, c + size // S, sums)


@inline
def _apply_tile(dy, x, c, size, group, mask, at, trained, dx, dresidual, scratch):
    for n in range(x.shape[0]):
        byte = _tile_byte(x, n, c, group)
        _apply_line(dy, x, n, c, 0, size, False, mask, byte, at, trained, dx, dresidual, scratch)


@kernel
def tile_forward(
    first, last, group, x, gamma, beta, residual, y, mask, mean, var, rstd, running_mean, running_var, eps, momentum
):  # fmt: skip
    C, S = x.shape[1], x.shape[2]
    P = group * S
    shift, sums, scale, at = np.empty(group), np.empty((2, group)), np.empty_like(rstd), parameters(P, var)
    shift_at, total, square = np.empty((1, 1, P)), np.empty(P), np.empty(P)
    scratch = _forward_scratch(x, residual, y, P, 0)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _statistics(
            x, c0, c1, shift, sums, shift_at, total, square, mean, var, rstd, running_mean, running_var, eps, momentum
        )  # fmt: skip
        for c in range(c0, c1):
            scale[c] = rstd[c] * gamma[c]
        _normalization_of_tile(at, c0, c1, S, mean, scale, beta)
        _normalize_tile(x, c0, (c1 - c0) * S, group, at, residual, y, mask, scratch)


@kernel
def tile_normalize(first, last, group, x, mean, scale, beta, residual, y, mask):
    C, S = x.shape[1], x.shape[2]
    at = parameters(group * S, mean)
    scratch = _forward_scratch(x, residual, y, group * S, 0)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _normalization_of_tile(at, c0, c1, S, mean, scale, beta)
        _normalize_tile(x, c0, (c1 - c0) * S, group, at, residual, y, mask, scratch)


@kernel
def tile_backward(first, last, group, dy, x, mask, mean, rstd, gamma, dx, dresidual, dgamma, dbeta):
    N, C, S = x.shape
    P, m = group * S, np.float64(N * S)
    sums, at = np.empty((2, group)), parameters(P, rstd)
    total, product = np.empty(P), np.empty(P)
    scratch = _backward_scratch(dy, x, dx, dresidual, P, 0)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        size = (c1 - c0) * S
        _means_of_tile(at, c0, c1, S, mean)
        _tile_gradients(dy, x, c0, size, group, mask, at, total, product, sums, scratch)
        _scale_of_tile(at, c0, c1, S, rstd, gamma)
        _gradients_of_tile(at, sums, c0, c1, S, m, rstd, dgamma, dbeta)
        _apply_tile(dy, x, c0, size, group, mask, at, True, dx, dresidual, scratch)
    streamed()


@kernel
def tile_gradient_sums(first, last, group, dy, x, mask, mean, of_channel):
    """of_channel (2, C): sum dy and sum dy (x - mean), of the dy that passes."""
    C, S = x.shape[1], x.shape[2]
    P = group * S
    sums, at, total, product = np.empty((2, group)), parameters(P, mean), np.empty(P), np.empty(P)
    scratch = _backward_scratch(dy, x, x, dy, P, 0)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _means_of_tile(at, c0, c1, S, mean)
        _tile_gradients(dy, x, c0, (c1 - c0) * S, group, mask, at, total, product, sums, scratch)
        for c in range(c0, c1):
            of_channel[0, c], of_channel[1, c] = sums[0, c - c0], sums[1, c - c0]


@kernel
def tile_apply(first, last, group, dy, x, mask, mean, scale, b, k, trained, dx, dresidual):
    """dx = scale (dy - b - (x - mean) k), or scale dy, of the dy that passes."""
    C, S = x.shape[1], x.shape[2]
    at = parameters(group * S, mean)
    scratch = _backward_scratch(dy, x, dx, dresidual, group * S, 0)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _slopes_of_tile(at, c0, c1, S, mean, scale, b, k)
        _apply_tile(dy, x, c0, (c1 - c0) * S, group, mask, at, trained, dx, dresidual, scratch)
    streamed()


# ---------------------------------------------------------------------------------------------- rows
# Block b is lines b / blocks … (b + 1) / blocks of all; the last line may be shorter than `rows` rows.
@kernel
def rows_normalize(first, last, blocks, rows, x, mean, scale, beta, residual, y, mask):
    N, C, S = x.shape
    m, lines, at = N * S, -(-(N * S) // rows), parameters(rows * C, mean)
    _normalization_of_rows(at, mean, scale, beta)
    scratch = _forward_scratch(x, residual, y, rows * C, rows)
    for line in range(lines * first // blocks, lines * last // blocks):
        v, byte = line * rows, line * bytes_for(rows * C)
        size = min(rows, m - v) * C
        _normalize_line(x, v // S, 0, v % S, size, True, at, residual, y, mask, byte, scratch)


@kernel
def rows_gradient_sums(first, last, rows, dy, x, mask, mean, partial):
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block, of the dy that passes."""
    N, C, S = x.shape
    blocks, m, lines, P = partial.shape[0], N * S, -(-(N * S) // rows), rows * C
    at, total, product = parameters(P, mean), np.empty(P), np.empty(P)
    _means_of_rows(at, mean)
    scratch = _backward_scratch(dy, x, x, dy, P, rows)
    for block in range(first, last):
        total[:] = 0.0
        product[:] = 0.0
        for line in range(lines * block // blocks, lines * (block + 1) // blocks):
            v, byte = line * rows, line * bytes_for(P)
            size = min(rows, m - v) * C
            _add_gradients_line(dy, x, v // S, 0, v % S, size, True, mask, byte, at, total, product, scratch)
        _fold(total, product, C, partial[block])


@kernel
def rows_apply(first, last, blocks, rows, dy, x, mask, mean, scale, b, k, trained, dx, dresidual):
    """dx = scale (dy - b - (x - mean) k), or scale dy, of the dy that passes."""
    N, C, S = x.shape
    m, lines, at = N * S, -(-(N * S) // rows), parameters(rows * C, mean)
    _slopes_of_rows(at, mean, scale, b, k)
    scratch = _backward_scratch(dy, x, dx, dresidual, rows * C, rows)
    for line in range(lines * first // blocks, lines * last // blocks):
        v, byte = line * rows, line * bytes_for(rows * C)
        size = min(rows, m - v) * C
        _apply_line(dy, x, v // S, 0, v % S, size, True, mask, byte, at, trained, dx, dresidual, scratch)
    streamed()
