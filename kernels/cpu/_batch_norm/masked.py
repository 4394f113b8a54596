"""Batch normalisation of the positions that count, on the CPU: the loops where a mask is given, for every layout.

`on` (1, N, S) has a byte for each position, 1 where it counts, the same for all channels. Sums leave out the others, results
are 0 there, and nothing of x or dy reaches them, whatever it is.

    planes    S adjacent (NCHW); any other strides too, copied a piece at a time: each lane is chosen by its byte
    lines     C adjacent (channels-last): positions are whole rows, taken in runs of neighbours that count or do not

Sums, pieces and statistics are those of `planes.py` and `lines.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .._numba.compile import inline, kernel, reduction
from .._numba.elements import load
from .._numba.simd import Lanes, lanes_where, load_lanes, streamed, write
from .._numba.views import gather, line_of, plane_of, row_buffer, scatter
from . import lines
from .planes import (
    RUN,
    START,
    _fetch_next,
    _from_mean,
    _from_shift,
    _goes_around,
    _gradients_of_channels,
    _run_at,
    _scratch,
)
from .statistics import SHIFT_VALUES, add_to, better_shift, finish, shift_of, sums_of, two_sum, with_low


# ---------------------------------------------------------------------------------------------- one run of a plane
@reduction
def _fast_deviation_sums(x, on, shift) -> tuple[float, float]:
    total, square = 0.0, 0.0
    for i in range(x.size):
        d = _from_shift(x, i, shift)
        d = d if on[np.uintp(i)] != 0 else 0.0
        total += d
        square += d * d
    return total, square


@inline
def _exact_deviation_sums(x, on, shift) -> tuple[float, float]:
    """For float64, as in `planes.py`."""
    total, square, total_low, square_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        if on[np.uintp(i)] != 0:
            d = _from_shift(x, i, shift)
            total, low = two_sum(total, d)
            total_low += low
            square, low = two_sum(square, d * d)
            square_low += low
    return with_low(total, total_low), with_low(square, square_low)


@reduction
def _fast_gradient_sums(dy, x, on, mean, rest) -> tuple[float, float]:
    total, product = 0.0, 0.0
    for i in range(x.size):
        g = np.float64(load(dy, i))
        d = g * np.float64(_from_mean(x, i, mean, rest))
        total += g if on[np.uintp(i)] != 0 else 0.0
        product += d if on[np.uintp(i)] != 0 else 0.0
    return total, product


@inline
def _exact_gradient_sums(dy, x, on, mean, rest) -> tuple[float, float]:
    total, product, total_low, product_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        if on[np.uintp(i)] != 0:
            g = load(dy, i)
            total, low = two_sum(total, g)
            total_low += low
            product, low = two_sum(product, g * _from_mean(x, i, mean, rest))
            product_low += low
    return with_low(total, total_low), with_low(product, product_low)


def _deviation_sums(x: Any, on: Any, shift: Any) -> Any:
    """sum (x - shift) and sum (x - shift)^2 of what counts."""
    return _exact_deviation_sums(x, on, shift)


@overload(_deviation_sums)
def _choose_deviation_sums(x, on, shift) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, on, shift: _exact_deviation_sums(x, on, shift)
    return lambda x, on, shift: _fast_deviation_sums(x, on, shift)


def _gradient_sums(dy: Any, x: Any, on: Any, mean: Any, rest: Any) -> Any:
    """sum dy and sum dy (x - mean) of what counts."""
    return _exact_gradient_sums(dy, x, on, mean, rest)


@overload(_gradient_sums)
def _choose_gradient_sums(dy, x, on, mean, rest) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda dy, x, on, mean, rest: _exact_gradient_sums(dy, x, on, mean, rest)
    return lambda dy, x, on, mean, rest: _fast_gradient_sums(dy, x, on, mean, rest)


@inline
def _normalized(i, exist, args) -> Lanes:
    x, on, mean, rest, scale, beta = args
    return lanes_where(on, i, exist, ((load_lanes(x, i, exist, 0.0) - mean) - rest) * scale + beta)


@inline
def _applied(i, exist, args) -> Lanes:
    dy, x, on, mean, rest, scale, b, k = args
    g = load_lanes(dy, i, exist, 0.0) - b
    return lanes_where(on, i, exist, (g - ((load_lanes(x, i, exist, 0.0) - mean) - rest) * k) * scale)


@inline
def _scaled(i, exist, args) -> Lanes:
    dy, on, scale = args
    return lanes_where(on, i, exist, load_lanes(dy, i, exist, 0.0) * scale)


# ---------------------------------------------------------------------------------------------- values s0…s1-1 of a plane
@inline
def _add_deviations(x, on, n, c, s0, s1, shift, sums, j, scratch, ahead) -> None:
    """`ahead`: the next to be read is the next sample."""
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if ahead:
            _fetch_next(x, n, c, s, end)
        pair = _deviation_sums(gather(plane_of(x, n, c, s, end), scratch), line_of(on, 0, n, s, end - s), shift)
        add_to(sums, j, pair[0], pair[1])


@inline
def _add_gradients(dy, x, on, n, c, s0, s1, mean, sums, j, dy_scratch, x_scratch, ahead) -> None:
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if ahead:
            _fetch_next(x, n, c, s, end)
            _fetch_next(dy, n, c, s, end)
        dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
        pair = _gradient_sums(dy_run, x_run, line_of(on, 0, n, s, end - s), mean[0, c], mean[1, c])
        add_to(sums, j, pair[0], pair[1])


@inline
def _normalize(x, on, n, c, s0, s1, mean, scale, beta, y, around, x_scratch, y_scratch) -> None:
    step = RUN if x_scratch.size or y_scratch.size else max(s1 - s0, 1)
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        x_run, y_run = gather(plane_of(x, n, c, s, end), x_scratch), row_buffer(plane_of(y, n, c, s, end), y_scratch)
        write(y_run, around, _normalized, (x_run, line_of(on, 0, n, s, end - s), mean[0, c], mean[1, c], scale, beta))
        scatter(plane_of(y, n, c, s, end), y_scratch)


@inline
def _apply(dy, x, on, n, c, s0, s1, mean, scale, b, k, dx, around, dy_scratch, x_scratch, dx_scratch) -> None:
    step = RUN if dy_scratch.size or x_scratch.size or dx_scratch.size else max(s1 - s0, 1)
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
        dx_run = row_buffer(plane_of(dx, n, c, s, end), dx_scratch)
        of = (dy_run, x_run, line_of(on, 0, n, s, end - s), mean[0, c], mean[1, c], scale, b, k)
        write(dx_run, around, _applied, of)
        scatter(plane_of(dx, n, c, s, end), dx_scratch)


@inline
def _scale(dy, on, n, c, s0, s1, scale, dx, dy_scratch, dx_scratch) -> None:
    """dx = scale dy for a run that is in the nearest cache."""
    dy_run, dx_run = gather(plane_of(dy, n, c, s0, s1), dy_scratch), row_buffer(plane_of(dx, n, c, s0, s1), dx_scratch)
    write(dx_run, False, _scaled, (dy_run, line_of(on, 0, n, s0, s1 - s0), scale))
    scatter(plane_of(dx, n, c, s0, s1), dx_scratch)


# ---------------------------------------------------------------------------------------------- shift
@kernel
def first_positions(on) -> np.ndarray:
    """(n, s) of the first positions that count, SHIFT_VALUES at most: int64 (2, …)."""
    found, count = np.empty((2, SHIFT_VALUES), np.int64), 0
    for n in range(on.shape[1]):
        for s in range(on.shape[2]):
            if on[0, n, s] != 0:
                found[0, count], found[1, count] = n, s
                count += 1
                if count == SHIFT_VALUES:
                    return found
    return found[:, :count].copy()


@inline
def _first_mean(x, c, at) -> float:
    """The shift by the values of channel c at these positions."""
    total, size = 0.0, 0.0
    for i in range(at.shape[1]):
        value = np.float64(load(plane_of(x, at[0, i], c, at[1, i], at[1, i] + 1), 0))
        total += value
        size += abs(value)
    return shift_of(total, size, at.shape[1])


@kernel
def first_means(x, at, shift) -> None:
    for c in range(x.shape[1]):
        shift[c] = _first_mean(x, c, at)


# ---------------------------------------------------------------------------------------------- whole channels of planes
@inline
def _statistics(
    x, on, m, at, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch
) -> None:
    """As in `planes.py`, of m values a channel."""
    N, S = x.shape[0], x.shape[2]
    sums[:] = 0.0
    for c in range(c0, c1):
        shift[c - c0] = _first_mean(x, c, at)
    for n in range(N):
        for c in range(c0, c1):
            _add_deviations(x, on, n, c, START, S, shift[c - c0], sums, c - c0, x_scratch, True)
    for c in range(c0, c1):
        j = c - c0
        total, square = sums_of(sums, j)
        better = better_shift(shift[j], total, square, m)
        if better == better:
            shift[j] = better
            sums[:, :, j] = 0.0
            for n in range(N):
                _add_deviations(x, on, n, c, START, S, better, sums, j, x_scratch, True)
            total, square = sums_of(sums, j)
        finish(c, shift[j], total, square, m, eps, momentum, mean, var, rstd, running_mean, running_var)


@kernel
def forward(
    first, last, group, x, on, m, at, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum
) -> None:
    """Statistics and y of the blocks first…last-1 of `group` channels."""
    N, C, S = x.shape
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    shift, sums = np.empty(group), np.empty((2, 2, group))
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        _statistics(x, on, m, at, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch)
        for n in range(N):
            for c in range(c0, c1):
                _normalize(x, on, n, c, START, S, mean, rstd[c] * gamma[c], beta[c], y, around, x_scratch, y_scratch)
    streamed()


@kernel
def backward(first, last, group, dy, x, on, m, mean, rstd, gamma, dx, dgamma, dbeta) -> None:
    """dgamma, dbeta and dx of the blocks first…last-1 of `group` channels."""
    N, C, S = x.shape
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    sums, b, k = np.empty((2, 2, group)), np.empty(group, rstd.dtype), np.empty(group, rstd.dtype)
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        sums[:] = 0.0
        for n in range(N):
            for c in range(c0, c1):
                _add_gradients(dy, x, on, n, c, START, S, mean, sums, c - c0, dy_scratch, x_scratch, True)
        _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k)
        for n in range(N):
            for c in range(c0, c1):
                j, scale = c - c0, rstd[c] * gamma[c]
                _apply(dy, x, on, n, c, START, S, mean, scale, b[j], k[j], dx, around, dy_scratch, x_scratch, dx_scratch)
    streamed()


# ---------------------------------------------------------------------------------------------- planes, split
@kernel
def sums(first, last, x, on, shift, partial) -> None:
    """partial (blocks, 2, C): sum (x - shift) and sum (x - shift)^2 of every block."""
    C = x.shape[1]
    blocks, scratch, pieces = partial.shape[0], _scratch(x), np.empty((2, 2, C))
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _add_deviations(x, on, n, c, s, stop, shift[c], pieces, c, scratch, False)
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def gradient_sums(first, last, dy, x, on, mean, scale, dx, partial) -> None:
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block. dx, if it has values, = scale dy."""
    C = x.shape[1]
    blocks, dy_scratch, x_scratch, pieces = partial.shape[0], _scratch(dy), _scratch(x), np.empty((2, 2, C))
    dx_scratch = _scratch(dx)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            stop = min(stop, s + RUN)
            _add_gradients(dy, x, on, n, c, s, stop, mean, pieces, c, dy_scratch, x_scratch, False)
            if dx.size:
                _scale(dy, on, n, c, s, stop, scale[c], dx, dy_scratch, dx_scratch)
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def normalize(first, last, blocks, x, on, mean, scale, beta, y) -> None:
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _normalize(x, on, n, c, s, stop, mean, scale[c], beta[c], y, around, x_scratch, y_scratch)
            v += stop - s
    streamed()


@kernel
def apply(first, last, blocks, dy, x, on, mean, scale, b, k, dx) -> None:
    """dx = scale (dy - b - (x - mean) k)."""
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _apply(dy, x, on, n, c, s, stop, mean, scale[c], b[c], k[c], dx, around, dy_scratch, x_scratch, dx_scratch)
            v += stop - s
    streamed()


@kernel
def clear(first, last, blocks, on, y) -> None:
    """y = 0 where a position does not count."""
    zero = y.dtype.type(0)
    for block in range(first, last):
        v, end = y.size * block // blocks, y.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(y, v, end)
            row, chosen = plane_of(y, n, c, s, stop), line_of(on, 0, n, s, stop - s)
            for i in range(row.size):
                if chosen[np.uintp(i)] == 0:
                    row[np.uintp(i)] = zero
            v += stop - s


# ---------------------------------------------------------------------------------------------- rows of channels, split
# Row v is x[v // S, :, v % S]; block b is the rows m b / blocks … m (b + 1) / blocks - 1, as in `lines.py`.
@inline
def _run_of_rows(on, v, end) -> tuple[bool, int]:
    """(whether row v counts, the first row after it, below `end`, that does otherwise)."""
    flags = line_of(on, 0, 0, 0, on.size)
    first = flags[np.uintp(v)]
    while v < end and flags[np.uintp(v)] == first:
        v += 1
    return first != 0, v


@inline
def _no_rows(y, v, stop) -> None:
    """Rows v…stop-1 are 0."""
    zero = y.dtype.type(0)
    while v < stop:
        row = lines._rows_of(y, v, y.shape[1])
        for c in range(row.size):
            row[np.uintp(c)] = zero
        v += 1


@kernel
def row_sums(first, last, rows, x, on, shift, partial) -> None:
    """`sums` for channels-last."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    at, total, square = np.empty((1, 1, P)), np.empty(P), np.empty(P)
    lines._repeat(at, 0, shift)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        square[:] = 0.0
        while v < end:
            counts, stop = _run_of_rows(on, v, end)
            if not counts:
                v = stop
            while v + 4 * rows <= stop:
                x0, x1 = lines._rows_of(x, v, P), lines._rows_of(x, v + rows, P)
                x2, x3 = lines._rows_of(x, v + 2 * rows, P), lines._rows_of(x, v + 3 * rows, P)
                lines._along(P, total, lines._add_four_deviations, (x0, x1, x2, x3, lines._of(at, 0), total, square))
                v += 4 * rows
            while v < stop:
                size = min(rows, stop - v) * C
                lines._along(size, total, lines._add_deviations, (lines._rows_of(x, v, size), lines._of(at, 0), total, square))
                v += min(rows, stop - v)
        lines._fold(total, square, C, partial[block])


@kernel
def row_gradient_sums(first, last, rows, dy, x, on, mean, scale, dx, partial) -> None:
    """`gradient_sums` for channels-last."""
    N, C, S = x.shape
    blocks, m, P, scaled = partial.shape[0], N * S, rows * C, dx.size > 0
    about, total, product = np.empty((1, 2, P)), np.empty(P), np.empty(P)
    lines._wide_means(about, 0, C, 1, mean)
    for c in range(C, P):
        for row in range(2):
            about[0, row, np.uintp(c)] = about[0, row, np.uintp(c - C)]
    at = lines.parameters(P if scaled else 0, scale)
    if scaled:
        lines._repeat(at, lines.SCALE, scale)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        total[:] = 0.0
        product[:] = 0.0
        while v < end:
            counts, stop = _run_of_rows(on, v, end)
            if not counts:
                if scaled:
                    _no_rows(dx, v, stop)
                v = stop
            while v < stop:
                size = min(rows, stop - v) * C
                dy_line, x_line = lines._rows_of(dy, v, size), lines._rows_of(x, v, size)
                means = lines._of(about, lines.MEAN), lines._of(about, lines.REST)
                lines._along(size, total, lines._add_gradients, (dy_line, x_line, means[0], means[1], total, product))
                if scaled:
                    lines._scale(dy_line, at, lines._rows_of(dx, v, size), False)
                v += min(rows, stop - v)
        lines._fold(total, product, C, partial[block])


@kernel
def row_normalize(first, last, blocks, rows, x, on, mean, scale, beta, y) -> None:
    """`normalize` for channels-last."""
    N, C, S = x.shape
    m, at = N * S, lines.parameters(rows * C, mean)
    lines._normalization_of_rows(at, mean, scale, beta)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            counts, stop = _run_of_rows(on, v, end)
            if not counts:
                _no_rows(y, v, stop)
                v = stop
            while v < stop:
                size = min(rows, stop - v) * C
                lines._normalize(
                    lines._rows_of(x, v, size), at, lines._rows_of(y, v, size), lines._goes_around(y), (None, None)
                )
                v += min(rows, stop - v)
    streamed()


@kernel
def row_apply(first, last, blocks, rows, dy, x, on, mean, scale, b, k, dx) -> None:
    """`apply` for channels-last."""
    N, C, S = x.shape
    m, at = N * S, lines.parameters(rows * C, mean)
    lines._slopes_of_rows(at, mean, scale, b, k)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            counts, stop = _run_of_rows(on, v, end)
            if not counts:
                _no_rows(dx, v, stop)
                v = stop
            while v < stop:
                size = min(rows, stop - v) * C
                dy_line, x_line = lines._rows_of(dy, v, size), lines._rows_of(x, v, size)
                lines._apply(dy_line, x_line, at, lines._rows_of(dx, v, size), lines._goes_around(dx))
                v += min(rows, stop - v)
    streamed()


@kernel
def row_clear(first, last, blocks, on, y) -> None:
    """`clear` for channels-last."""
    m = y.shape[0] * y.shape[2]
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            counts, stop = _run_of_rows(on, v, end)
            if not counts:
                _no_rows(y, v, stop)
            v = stop
