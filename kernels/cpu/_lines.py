"""Batch normalisation where a channel's values are scattered: channels-last, and planes too small to be a loop of their own.

The data is taken as *lines* of adjacent elements in which the channels come in the same pattern: k rows of C channels
(channels-last), or the small planes of a few channels of one sample. Each position of the line has its own mean, scale and
sums, so that the inner loop runs along memory whatever the number of channels; the positions of a channel are added up
at the end.
"""

from __future__ import annotations

import numpy as np

from ._elements import line_of, load, store
from ._jit import inline, kernel
from ._moments import add_to, better_shift, finish, first_mean, sum_of


# ---------------------------------------------------------------------------------------------- lines
@inline
def _add_deviations(x, shift, total, square):
    for p in range(x.size):
        d = np.float64(load(x, p)) - shift[p]
        total[p] += d
        square[p] += d * d


@inline
def _add_four_deviations(x0, x1, x2, x3, shift, total, square):
    """Four lines at once, so that a sum is read and written once for four."""
    for p in range(x0.size):
        d0, d1 = np.float64(load(x0, p)) - shift[p], np.float64(load(x1, p)) - shift[p]
        d2, d3 = np.float64(load(x2, p)) - shift[p], np.float64(load(x3, p)) - shift[p]
        total[p] += (d0 + d1) + (d2 + d3)
        square[p] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@inline
def _add_gradients(dy, x, mean, rest, total, product):
    for p in range(x.size):
        g = np.float64(load(dy, p))
        total[p] += g
        product[p] += g * np.float64((load(x, p) - mean[p]) - rest[p])


@inline
def _add_two_gradients(dy0, dy1, x0, x1, mean, rest, total, product):
    for p in range(x0.size):
        g0, g1 = np.float64(load(dy0, p)), np.float64(load(dy1, p))
        d0, d1 = np.float64((load(x0, p) - mean[p]) - rest[p]), np.float64((load(x1, p) - mean[p]) - rest[p])
        total[p] += g0 + g1
        product[p] += g0 * d0 + g1 * d1


@inline
def _normalize(x, mean, rest, scale, beta, y):
    for p in range(x.size):
        store(y, p, ((load(x, p) - mean[p]) - rest[p]) * scale[p] + beta[p])


@inline
def _apply(dy, x, mean, rest, scale, b, k, dx):
    for p in range(x.size):
        store(dx, p, scale[p] * ((load(dy, p) - b[p]) - ((load(x, p) - mean[p]) - rest[p]) * k[p]))


# ---------------------------------------------------------------------------------------------- small planes, fused
# A tile is `group` channels; its lines are x[n, c0:c1, :], position (c - c0) S + s. A block of work is a tile.
@inline
def _spread(values, c0, c1, S, out):
    """out[(c - c0) S + s] = values[c]."""
    for c in range(c0, c1):
        for s in range(S):
            out[(c - c0) * S + s] = values[c]


@inline
def _tile_deviations(x, c0, c1, shift, total, square):
    N, S = x.shape[0], x.shape[2]
    P = (c1 - c0) * S
    total[:] = 0.0
    square[:] = 0.0
    shift, total, square = shift[:P], total[:P], square[:P]
    for n in range(0, N - 3, 4):
        x0, x1 = line_of(x, n, c0, 0, P), line_of(x, n + 1, c0, 0, P)
        x2, x3 = line_of(x, n + 2, c0, 0, P), line_of(x, n + 3, c0, 0, P)
        _add_four_deviations(x0, x1, x2, x3, shift, total, square)
    for n in range(N - N % 4, N):
        _add_deviations(line_of(x, n, c0, 0, P), shift, total, square)


@inline
def _tile_gradients(dy, x, c0, c1, mean, rest, total, product):
    N, S = x.shape[0], x.shape[2]
    P = (c1 - c0) * S
    total[:] = 0.0
    product[:] = 0.0
    mean, rest, total, product = mean[:P], rest[:P], total[:P], product[:P]
    for n in range(0, N - 1, 2):
        dy0, dy1 = line_of(dy, n, c0, 0, P), line_of(dy, n + 1, c0, 0, P)
        _add_two_gradients(dy0, dy1, line_of(x, n, c0, 0, P), line_of(x, n + 1, c0, 0, P), mean, rest, total, product)
    if N % 2:
        _add_gradients(line_of(dy, N - 1, c0, 0, P), line_of(x, N - 1, c0, 0, P), mean, rest, total, product)


@inline
def _tile_sums(first, second, count, S, sums):
    """sums[:, i, j] = the sum over the positions of the tile's channel j."""
    sums[:] = 0.0
    for j in range(count):
        for p in range(j * S, (j + 1) * S):
            add_to(sums, 0, j, first[p])
            add_to(sums, 1, j, second[p])


@inline
def _any_far(c0, c1, shift, sums, m):
    """Replace the shifts of the tile's channels that are too far from the mean; True if there was one."""
    found = False
    for c in range(c0, c1):
        better = better_shift(shift[c], sum_of(sums, 0, c - c0), sum_of(sums, 1, c - c0), m)
        if better == better:
            shift[c] = better
            found = True
    return found


@kernel
def forward(first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum):
    """Statistics and y of the tiles first…last-1."""
    N, C, S = x.shape
    P, m, dtype = group * S, np.float64(N * S), var.dtype
    shift, sums, scale = np.empty(C), np.empty((2, 2, group)), np.empty(C, dtype)
    shift_at, total, square = np.empty(P), np.empty(P), np.empty(P)
    mean_at, rest_at, scale_at, beta_at = np.empty(P, dtype), np.empty(P, dtype), np.empty(P, dtype), np.empty(P, dtype)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        for c in range(c0, c1):
            shift[c] = first_mean(x, c)
        for _ in range(2):
            _spread(shift, c0, c1, S, shift_at)
            _tile_deviations(x, c0, c1, shift_at, total, square)
            _tile_sums(total, square, c1 - c0, S, sums)
            if not _any_far(c0, c1, shift, sums, m):
                break
        for c in range(c0, c1):
            d, d2 = sum_of(sums, 0, c - c0), sum_of(sums, 1, c - c0)
            finish(c, shift_at[(c - c0) * S], d, d2, m, eps, momentum, mean, var, rstd, running_mean, running_var)
            scale[c] = rstd[c] * gamma[c]
        _spread(mean[0], c0, c1, S, mean_at)
        _spread(mean[1], c0, c1, S, rest_at)
        _spread(scale, c0, c1, S, scale_at)
        _spread(beta, c0, c1, S, beta_at)
        size = (c1 - c0) * S
        for n in range(N):
            _normalize(line_of(x, n, c0, 0, size), mean_at, rest_at, scale_at, beta_at, line_of(y, n, c0, 0, size))


@kernel
def backward(first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta):
    """dgamma, dbeta and dx of the tiles first…last-1."""
    N, C, S = x.shape
    P, m, dtype, of = group * S, np.float64(N * S), rstd.dtype, rstd.dtype.type
    sums, scale, b, k = np.empty((2, 2, group)), np.empty(C, dtype), np.empty(C, dtype), np.empty(C, dtype)
    total, product, mean_at, rest_at = np.empty(P), np.empty(P), np.empty(P, dtype), np.empty(P, dtype)
    scale_at, b_at, k_at = np.empty(P, dtype), np.empty(P, dtype), np.empty(P, dtype)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _spread(mean[0], c0, c1, S, mean_at)
        _spread(mean[1], c0, c1, S, rest_at)
        _tile_gradients(dy, x, c0, c1, mean_at, rest_at, total, product)
        _tile_sums(total, product, c1 - c0, S, sums)
        for c in range(c0, c1):
            db, dg = sum_of(sums, 0, c - c0), sum_of(sums, 1, c - c0) * rstd[c]
            dbeta[c], dgamma[c] = of(db), of(dg)
            scale[c], b[c], k[c] = rstd[c] * gamma[c], of(db / m), of(dg * rstd[c] / m)
        _spread(scale, c0, c1, S, scale_at)
        _spread(b, c0, c1, S, b_at)
        _spread(k, c0, c1, S, k_at)
        size = (c1 - c0) * S
        for n in range(N):
            dy_line, x_line, dx_line = line_of(dy, n, c0, 0, size), line_of(x, n, c0, 0, size), line_of(dx, n, c0, 0, size)
            _apply(dy_line, x_line, mean_at, rest_at, scale_at, b_at, k_at, dx_line)


# ---------------------------------------------------------------------------------------------- channels-last, split
# Row v is x[v // S, :, v % S]; its C channels are adjacent. A line is `rows` rows, which are adjacent too if rows > 1; position
# j C + c. Block b is the rows m b / blocks … m (b + 1) / blocks - 1.
@inline
def _repeated(values, rows):
    """out[j C + c] = values[c], j < rows."""
    out = np.empty(rows * values.size, values.dtype)
    for j in range(rows):
        out[j * values.size : (j + 1) * values.size] = values
    return out


@inline
def _rows_of(x, v, size):
    S = x.shape[2]
    return line_of(x, v // S, 0, v % S, size)


@inline
def _fold(first, second, C, partial):
    """partial[i, c] = the sum over the positions of channel c."""
    pieces = np.empty((2, 2, 1))
    for c in range(C):
        pieces[:] = 0.0
        for p in range(c, first.size, C):
            add_to(pieces, 0, 0, first[p])
            add_to(pieces, 1, 0, second[p])
        partial[0, c], partial[1, c] = sum_of(pieces, 0, 0), sum_of(pieces, 1, 0)


@kernel
def sums(first, last, rows, x, shift, partial):
    """partial (blocks, 2, C): sum (x - shift) and sum (x - shift)^2 of every block."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    shift = _repeated(shift, rows)
    total, square = np.empty(P), np.empty(P)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        square[:] = 0.0
        while v + 4 * rows <= end:
            x0, x1 = _rows_of(x, v, P), _rows_of(x, v + rows, P)
            x2, x3 = _rows_of(x, v + 2 * rows, P), _rows_of(x, v + 3 * rows, P)
            _add_four_deviations(x0, x1, x2, x3, shift, total, square)
            v += 4 * rows
        while v < end:
            count = min(rows, end - v)
            _add_deviations(_rows_of(x, v, count * C), shift, total, square)
            v += count
        _fold(total, square, C, partial[block])


@kernel
def gradient_sums(first, last, rows, dy, x, mean, partial):
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    mean_at, rest_at = _repeated(mean[0], rows), _repeated(mean[1], rows)
    total, product = np.empty(P), np.empty(P)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        product[:] = 0.0
        while v + 2 * rows <= end:
            dy0, dy1 = _rows_of(dy, v, P), _rows_of(dy, v + rows, P)
            _add_two_gradients(dy0, dy1, _rows_of(x, v, P), _rows_of(x, v + rows, P), mean_at, rest_at, total, product)
            v += 2 * rows
        while v < end:
            count = min(rows, end - v)
            _add_gradients(_rows_of(dy, v, count * C), _rows_of(x, v, count * C), mean_at, rest_at, total, product)
            v += count
        _fold(total, product, C, partial[block])


@kernel
def normalize(first, last, blocks, rows, x, mean, scale, beta, y):
    N, C, S = x.shape
    m = N * S
    mean_at, rest_at = _repeated(mean[0], rows), _repeated(mean[1], rows)
    scale_at, beta_at = _repeated(scale, rows), _repeated(beta, rows)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            count = min(rows, end - v)
            _normalize(_rows_of(x, v, count * C), mean_at, rest_at, scale_at, beta_at, _rows_of(y, v, count * C))
            v += count


@kernel
def apply(first, last, blocks, rows, dy, x, mean, scale, b, k, dx):
    """dx = scale (dy - b - (x - mean) k)."""
    N, C, S = x.shape
    m = N * S
    mean_at, rest_at, scale_at = _repeated(mean[0], rows), _repeated(mean[1], rows), _repeated(scale, rows)
    b_at, k_at = _repeated(b, rows), _repeated(k, rows)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            size = min(rows, end - v) * C
            dy_line, x_line, dx_line = _rows_of(dy, v, size), _rows_of(x, v, size), _rows_of(dx, v, size)
            _apply(dy_line, x_line, mean_at, rest_at, scale_at, b_at, k_at, dx_line)
            v += min(rows, end - v)
