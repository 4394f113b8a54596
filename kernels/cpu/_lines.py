"""Batch normalisation where a channel's values are scattered: channels-last, and planes too small to be a loop of their own.

The data is taken as *lines* of adjacent elements in which the channels come in the same pattern: k rows of C channels
(channels-last), or the small planes of a few channels of one sample. Each position of the line has its own mean, scale and
sums, so that the inner loop runs along memory whatever the number of channels; the positions of a channel are added up
at the end.
"""

from __future__ import annotations

import numpy as np

from ._elements import line_of, load
from ._jit import inline, kernel
from ._lanes import LARGE, fetch, load_lanes, streamed, width, write
from ._moments import add_to, better_shift, finish, first_mean, sums_of

# ---------------------------------------------------------------------------------------------- one line
# Parameters of a position: at (1, rows, positions), three axes for `line_of`; its rows are named here.
MEAN, REST, SCALE, SHIFT_1, SHIFT_2 = range(5)


@inline
def parameters(positions, like):
    """For the parameters of a line; the last vector of them is read whole."""
    return np.empty((1, 5, positions + width(like)), like.dtype)


@inline
def _of(at, row):
    return line_of(at, 0, row, 0, at.shape[2])


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
def _add_gradients(dy, x, at, total, product):
    for p in range(x.size):
        g = np.float64(load(dy, p))
        total[p] += g
        product[p] += g * np.float64((load(x, p) - at[0, MEAN, p]) - at[0, REST, p])


@inline
def _add_two_gradients(dy0, dy1, x0, x1, at, total, product):
    for p in range(x0.size):
        g0, g1 = np.float64(load(dy0, p)), np.float64(load(dy1, p))
        d0 = np.float64((load(x0, p) - at[0, MEAN, p]) - at[0, REST, p])
        d1 = np.float64((load(x1, p) - at[0, MEAN, p]) - at[0, REST, p])
        total[p] += g0 + g1
        product[p] += g0 * d0 + g1 * d1


@inline
def _normalized(i, exist, args):
    x, mean, rest, scale, beta = args
    whole = width(mean)
    d = (load_lanes(x, i, exist, 0.0) - load_lanes(mean, i, whole, 0.0)) - load_lanes(rest, i, whole, 0.0)
    return d * load_lanes(scale, i, whole, 0.0) + load_lanes(beta, i, whole, 0.0)


@inline
def _normalize(x, at, y, around):
    """at[SHIFT_1] is beta."""
    write(y, around, _normalized, (x, _of(at, MEAN), _of(at, REST), _of(at, SCALE), _of(at, SHIFT_1)))


@inline
def _applied(i, exist, args):
    dy, x, mean, rest, scale, b, k = args
    whole = width(mean)
    d = (load_lanes(x, i, exist, 0.0) - load_lanes(mean, i, whole, 0.0)) - load_lanes(rest, i, whole, 0.0)
    g = load_lanes(dy, i, exist, 0.0) - load_lanes(b, i, whole, 0.0)
    return (g - d * load_lanes(k, i, whole, 0.0)) * load_lanes(scale, i, whole, 0.0)


@inline
def _apply(dy, x, at, dx, around):
    """at[SHIFT_1] is dbeta / m, at[SHIFT_2] is rstd dgamma / m."""
    of = (_of(at, MEAN), _of(at, REST), _of(at, SCALE), _of(at, SHIFT_1), _of(at, SHIFT_2))
    write(dx, around, _applied, (dy, x, *of))


@inline
def _goes_around(y):
    """True where the lines of a result are to be written around the caches."""
    return y.size * y.itemsize >= LARGE


# ---------------------------------------------------------------------------------------------- small planes, fused
# A tile is `group` channels; its lines are x[n, c0:c1, :], position (c - c0) S + s. A block of work is a tile.
@inline
def _tile_deviations(x, c0, c1, shift, total, square):
    N, S = x.shape[0], x.shape[2]
    size, n = (c1 - c0) * S, 0
    for p in range(size):
        total[p], square[p] = 0.0, 0.0
    while n + 4 <= N:
        for ahead in range(n + 4, min(n + 8, N)):
            fetch(line_of(x, ahead, c0, 0, size))
        x0, x1 = line_of(x, n, c0, 0, size), line_of(x, n + 1, c0, 0, size)
        x2, x3 = line_of(x, n + 2, c0, 0, size), line_of(x, n + 3, c0, 0, size)
        _add_four_deviations(x0, x1, x2, x3, shift, total, square)
        n += 4
    while n < N:
        _add_deviations(line_of(x, n, c0, 0, size), shift, total, square)
        n += 1


@inline
def _tile_gradients(dy, x, c0, c1, at, total, product):
    N, S = x.shape[0], x.shape[2]
    size, n = (c1 - c0) * S, 0
    for p in range(size):
        total[p], product[p] = 0.0, 0.0
    while n + 2 <= N:
        for ahead in range(n + 2, min(n + 4, N)):
            fetch(line_of(x, ahead, c0, 0, size))
            fetch(line_of(dy, ahead, c0, 0, size))
        dy0, dy1 = line_of(dy, n, c0, 0, size), line_of(dy, n + 1, c0, 0, size)
        _add_two_gradients(dy0, dy1, line_of(x, n, c0, 0, size), line_of(x, n + 1, c0, 0, size), at, total, product)
        n += 2
    if n < N:
        _add_gradients(line_of(dy, n, c0, 0, size), line_of(x, n, c0, 0, size), at, total, product)


@inline
def _tile_sums(first, second, count, S, sums):
    """Add the positions of the tile's channels."""
    for j in range(count):
        sums[:, :, j] = 0.0
        for p in range(j * S, (j + 1) * S):
            add_to(sums, j, first[p], second[p])


@inline
def _statistics(x, c0, c1, shift, sums, shift_at, total, square, mean, var, rstd, running_mean, running_var, eps, momentum):
    """Statistics of the channels c0…c1-1 of a tile, and room for them."""
    S = x.shape[2]
    m = np.float64(x.shape[0] * S)
    for c in range(c0, c1):
        shift[c - c0] = first_mean(x, c)
    far = True
    for _ in range(2):
        if far:
            for p in range((c1 - c0) * S):
                shift_at[p] = shift[p // S]
            _tile_deviations(x, c0, c1, shift_at, total, square)
            _tile_sums(total, square, c1 - c0, S, sums)
            far = False
            for j in range(c1 - c0):
                d, d2 = sums_of(sums, j)
                better = better_shift(shift[j], d, d2, m)
                if better == better:
                    shift[j], far = better, True
    for c in range(c0, c1):
        d, d2 = sums_of(sums, c - c0)
        finish(c, shift_at[(c - c0) * S], d, d2, m, eps, momentum, mean, var, rstd, running_mean, running_var)


@inline
def _means_of_tile(at, c0, c1, S, mean):
    for p in range((c1 - c0) * S):
        c = c0 + p // S
        at[0, MEAN, p], at[0, REST, p] = mean[0, c], mean[1, c]


@inline
def _normalization_of_tile(at, c0, c1, S, mean, rstd, gamma, beta):
    _means_of_tile(at, c0, c1, S, mean)
    for p in range((c1 - c0) * S):
        c = c0 + p // S
        at[0, SCALE, p], at[0, SHIFT_1, p] = rstd[c] * gamma[c], beta[c]


@inline
def _gradients_of_tile(at, sums, c0, c1, S, m, rstd, gamma, dgamma, dbeta):
    """dgamma and dbeta of the tile's channels from their sums, and what dx needs of them."""
    of = rstd.dtype.type
    for c in range(c0, c1):
        db, dg = sums_of(sums, c - c0)
        dg *= rstd[c]
        dbeta[c], dgamma[c] = of(db), of(dg)
        for p in range((c - c0) * S, (c - c0 + 1) * S):
            at[0, SCALE, p], at[0, SHIFT_1, p], at[0, SHIFT_2, p] = rstd[c] * gamma[c], of(db / m), of(dg * rstd[c] / m)


@kernel
def forward(first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum):
    """Statistics and y of the tiles first…last-1."""
    N, C, S = x.shape
    P = group * S
    shift, sums, at = np.empty(group), np.empty((2, 2, group)), parameters(P, var)
    shift_at, total, square = np.empty(P), np.empty(P), np.empty(P)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        _statistics(
            x, c0, c1, shift, sums, shift_at, total, square, mean, var, rstd, running_mean, running_var, eps, momentum
        )  # fmt: skip
        _normalization_of_tile(at, c0, c1, S, mean, rstd, gamma, beta)
        for n in range(N):
            _normalize(line_of(x, n, c0, 0, (c1 - c0) * S), at, line_of(y, n, c0, 0, (c1 - c0) * S), _goes_around(y))
    streamed()


@kernel
def backward(first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta):
    """dgamma, dbeta and dx of the tiles first…last-1."""
    N, C, S = x.shape
    P, m = group * S, np.float64(N * S)
    sums, at = np.empty((2, 2, group)), parameters(P, rstd)
    total, product = np.empty(P), np.empty(P)
    for tile in range(first, last):
        c0, c1 = tile * group, min(tile * group + group, C)
        size = (c1 - c0) * S
        _means_of_tile(at, c0, c1, S, mean)
        _tile_gradients(dy, x, c0, c1, at, total, product)
        _tile_sums(total, product, c1 - c0, S, sums)
        _gradients_of_tile(at, sums, c0, c1, S, m, rstd, gamma, dgamma, dbeta)
        for n in range(N):
            _apply(line_of(dy, n, c0, 0, size), line_of(x, n, c0, 0, size), at, line_of(dx, n, c0, 0, size), _goes_around(dx))
    streamed()


# ---------------------------------------------------------------------------------------------- channels-last, split
# Row v is x[v // S, :, v % S]; its C channels are adjacent. A line is `rows` rows, which are adjacent too if rows > 1; position
# j C + c. Block b is the rows m b / blocks … m (b + 1) / blocks - 1.
@inline
def _rows_of(x, v, size):
    S = x.shape[2]
    return line_of(x, v // S, 0, v % S, size)


@inline
def _means_of_rows(at, C, mean):
    for p in range(at.shape[2]):
        at[0, MEAN, p], at[0, REST, p] = mean[0, p % C], mean[1, p % C]


@inline
def _normalization_of_rows(at, C, mean, scale, beta):
    _means_of_rows(at, C, mean)
    for p in range(at.shape[2]):
        at[0, SCALE, p], at[0, SHIFT_1, p] = scale[p % C], beta[p % C]


@inline
def _slopes_of_rows(at, C, mean, scale, b, k):
    _means_of_rows(at, C, mean)
    for p in range(at.shape[2]):
        c = p % C
        at[0, SCALE, p], at[0, SHIFT_1, p], at[0, SHIFT_2, p] = scale[c], b[c], k[c]


@inline
def _fold(first, second, C, partial):
    """partial[i, c] = the sum over the positions of channel c."""
    pieces = np.zeros((2, 2, C))
    for p in range(first.size):
        add_to(pieces, p % C, first[p], second[p])
    for c in range(C):
        partial[0, c], partial[1, c] = sums_of(pieces, c)


@kernel
def sums(first, last, rows, x, shift, partial):
    """partial (blocks, 2, C): sum (x - shift) and sum (x - shift)^2 of every block."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    shift_at, total, square = np.empty(P), np.empty(P), np.empty(P)
    for p in range(P):
        shift_at[p] = shift[p % C]
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        square[:] = 0.0
        while v + 4 * rows <= end:
            x0, x1 = _rows_of(x, v, P), _rows_of(x, v + rows, P)
            x2, x3 = _rows_of(x, v + 2 * rows, P), _rows_of(x, v + 3 * rows, P)
            _add_four_deviations(x0, x1, x2, x3, shift_at, total, square)
            v += 4 * rows
        while v < end:
            _add_deviations(_rows_of(x, v, min(rows, end - v) * C), shift_at, total, square)
            v += rows
        _fold(total, square, C, partial[block])


@kernel
def gradient_sums(first, last, rows, dy, x, mean, partial):
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    at, total, product = np.empty((1, 5, P), mean.dtype), np.empty(P), np.empty(P)
    _means_of_rows(at, C, mean)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        product[:] = 0.0
        while v + 2 * rows <= end:
            dy0, dy1 = _rows_of(dy, v, P), _rows_of(dy, v + rows, P)
            _add_two_gradients(dy0, dy1, _rows_of(x, v, P), _rows_of(x, v + rows, P), at, total, product)
            v += 2 * rows
        while v < end:
            size = min(rows, end - v) * C
            _add_gradients(_rows_of(dy, v, size), _rows_of(x, v, size), at, total, product)
            v += rows
        _fold(total, product, C, partial[block])


@kernel
def normalize(first, last, blocks, rows, x, mean, scale, beta, y):
    N, C, S = x.shape
    m, at = N * S, parameters(rows * C, mean)
    _normalization_of_rows(at, C, mean, scale, beta)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            size = min(rows, end - v) * C
            _normalize(_rows_of(x, v, size), at, _rows_of(y, v, size), _goes_around(y))
            v += rows
    streamed()


@kernel
def apply(first, last, blocks, rows, dy, x, mean, scale, b, k, dx):
    """dx = scale (dy - b - (x - mean) k)."""
    N, C, S = x.shape
    m, at = N * S, parameters(rows * C, mean)
    _slopes_of_rows(at, C, mean, scale, b, k)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            size = min(rows, end - v) * C
            _apply(_rows_of(dy, v, size), _rows_of(x, v, size), at, _rows_of(dx, v, size), _goes_around(dx))
            v += rows
    streamed()
