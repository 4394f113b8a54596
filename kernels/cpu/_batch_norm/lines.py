"""Batch normalisation where a channel's values are scattered: channels-last, and planes too small to be a loop of their own.

The data is taken as *lines* of adjacent elements in which the channels come in the same pattern: some rows of C channels
(channels-last, the kernels here), or the small planes of a few channels of one sample (`tiles.py`). Each position of a line has
its own mean, scale and sums, so that the inner loop runs along memory whatever the number of channels; the sums of a channel's
positions are added up at the end. Formulas and arguments are those of `planes.py`. With a mask a row counts or does not, so
that rows which do not are left out before there is a line of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import exact, inline, kernel, overload
from .._numba.simd import Lanes, load_lanes, streamed, width, write
from .._numba.views import line_of
from .activation import is_computed_again, line_beside, put_line, result_of
from .line_sums import add_deviations, add_four_deviations, add_gradients, add_two_gradients, lanes_left_at, sums_memory
from .planes import AROUND, MOST_KEPT, _at_position, _dx_of_run, _pass_run, _scaled_run, _y_of_run
from .positions import run_of_rows
from .statistics import lanes_with_low, two_sum

# ---------------------------------------------------------------------------------------------- one line
# Parameters of the positions of a line: `at` (1, 5, positions), three axes for `line_of`. The names of its rows:
MEAN, REST, SCALE, SHIFT_1, SHIFT_2 = range(5)


@inline
def parameters(positions, like) -> np.ndarray:
    """Memory for the parameters of a line; the last vector of each is read whole."""
    return np.empty((1, 5, positions + width(like)), like.dtype)


@inline
def _of(at, row) -> np.ndarray:
    """A row of parameters, without reference counting: the caller uses `at` after it, or in the same loop."""
    return line_of(at, 0, row, 0, at.shape[2])


@inline
def _along(size, like, lanes, args) -> None:
    """lanes(p, exist, args) for the positions of a line, vector by vector of `like`."""
    p, count = 0, width(like)
    while p + count <= size:
        lanes(p, width(like), args)
        p += count
    if p < size:
        lanes(p, size - p, args)


@inline
def _normalize(x, at, y, around, after) -> None:
    """A line of y; at[SHIFT_1] is beta, after = (activation, residual)."""
    write(y, around, _y_of_run, (x, None, _of(at, MEAN), _of(at, REST), _of(at, SCALE), _of(at, SHIFT_1), after))


@inline
def _normalized_by_known(i, exist, args) -> Lanes:
    """As `_y_of_run`, of a mean that has no second part."""
    x, mean, scale, beta = args
    return (load_lanes(x, i, exist, 0.0) - _at_position(mean, i)) * _at_position(scale, i) + _at_position(beta, i)


@inline
def normalize_known(x, at, y, of) -> None:
    """A line, by means that have no second part; y is one of `of`."""
    write(y, _goes_around(of), _normalized_by_known, (x, _of(at, MEAN), _of(at, SCALE), _of(at, SHIFT_1)))


@inline
def _apply(dy, x, result, at, dx, around) -> None:
    """A line of dx; at[SHIFT_1] is dbeta / m, at[SHIFT_2] is rstd dgamma / m."""
    of = (_of(at, MEAN), _of(at, REST), _of(at, SCALE), _of(at, SHIFT_1), _of(at, SHIFT_2))
    write(dx, around, _dx_of_run, (dy, x, None, result, *of))


# The gradient of an activation, of a line before it is summed. gate: the activation, parameters (at[SHIFT_1] is beta), memory
# for lines, and whether it keeps all lines of a tile (n) or two at a time (j); None without one, and for a ReLU.
def _gate(kind: Any, lines: Any, positions: Any, like: Any) -> Any:
    """The gate; the caller fills its parameters."""


@overload(_gate)
def _choose_gate(kind, lines, positions, like) -> Callable[..., Any]:
    if not is_computed_again(kind):
        return lambda kind, lines, positions, like: None
    return lambda kind, lines, positions, like: _new_gate(kind, lines, positions, like)


@inline
def _new_gate(kind, lines, positions, like) -> Any:
    keeps = lines > 2 and lines * positions * like.itemsize <= MOST_KEPT
    return kind, parameters(positions, like), np.empty((1, lines if keeps else 2, positions), like.dtype), keeps


def _through(dy: Any, x: Any, gate: Any, n: Any, j: Any, residual: Any) -> Any:
    """dy a'(p) of a line, in the gate's line n or j; `dy` itself without a gate."""


@overload(_through)
def _choose_through(dy, x, gate, n, j, residual) -> Callable[..., Any]:
    if gate == types.none:
        return lambda dy, x, gate, n, j, residual: dy
    return lambda dy, x, gate, n, j, residual: _passed_line(dy, x, gate, n if gate[3] else j, residual)


@inline
def _passed_line(dy, x, gate, j, residual) -> np.ndarray:
    kind, at, memory, _ = gate
    of = _of(at, MEAN), _of(at, REST), _of(at, SCALE), _of(at, SHIFT_1)
    return _pass_run(line_of(memory, 0, j, 0, dy.size), dy, x, *of, (kind, residual))


def _went_through(dy: Any, x: Any, gate: Any, n: Any, residual: Any) -> Any:
    """What `_through` gave of line n, where the gate keeps it."""


@overload(_went_through)
def _choose_went_through(dy, x, gate, n, residual) -> Callable[..., Any]:
    if gate == types.none:
        return lambda dy, x, gate, n, residual: dy
    return lambda dy, x, gate, n, residual: (
        line_of(gate[2], 0, n, 0, dy.size) if gate[3] else _passed_line(dy, x, gate, 0, residual)
    )


@inline
def _scale(dy, result, at, dx, around) -> None:
    """A line of dx = scale dy."""
    write(dx, around, _scaled_run, (dy, None, result, _of(at, SCALE)))


@inline
def _goes_around(y) -> bool:
    """True where the lines of a result are to be written past the caches."""
    return y.size * y.itemsize >= AROUND


@inline
def _spread(at, row, j, S, value) -> None:
    """`value` at the positions of the tile's channel j. (The index is unsigned: a signed one may count from the end.)"""
    for s in range(S):
        at[0, row, np.uintp(j * S + s)] = value


@exact
def _left(high, low) -> float:
    """What high + low loses, |high| >= |low|."""
    left = (high - (high + low)) + low
    return left if math.isfinite(left) else 0.0


@inline
def _wide_means(about, c0, c1, S, mean) -> None:
    """about (1, 2, positions): the mean of each position as one float64, and what that rounding left."""
    for c in range(c0, c1):
        high, low = np.float64(mean[0, c]), np.float64(mean[1, c])
        _spread(about, MEAN, c - c0, S, high + low)
        _spread(about, REST, c - c0, S, _left(high, low))


# ---------------------------------------------------------------------------------------------- channels-last, split
# Row v is x[v // S, :, v % S]; its C channels are adjacent. A line is `rows` rows, which are adjacent too if rows > 1;
# channel c of its row j is position j C + c. Block b is the rows N S b / blocks … N S (b + 1) / blocks - 1.
@inline
def _rows_of(x, v, size) -> np.ndarray:
    S = x.shape[2]
    return line_of(x, v // S, 0, v % S, size)


@inline
def _rows_beside(a, v, size, S) -> Any:
    return line_beside(a, v // S, 0, v % S, size)


@inline
def _repeat(at, row, values) -> None:
    """`values`, a number a channel, at the positions of every row of a line."""
    start, C = 0, values.size
    while start + C <= at.shape[2]:
        for c in range(C):
            at[0, row, np.uintp(start + c)] = values[c]
        start += C


@inline
def repeat_known(at, mean, scale, beta) -> None:
    """What `normalize_known` needs of a line of rows."""
    _repeat(at, MEAN, mean)
    _repeat(at, SCALE, scale)
    _repeat(at, SHIFT_1, beta)


@inline
def _means_of_rows(at, mean) -> None:
    _repeat(at, MEAN, mean[0])
    _repeat(at, REST, mean[1])


@inline
def _normalization_of_rows(at, mean, scale, beta) -> None:
    _means_of_rows(at, mean)
    _repeat(at, SCALE, scale)
    _repeat(at, SHIFT_1, beta)


def _gate_of_rows(gate: Any, mean: Any, scale: Any, beta: Any) -> None:
    """Fills the parameters of a gate."""


@overload(_gate_of_rows)
def _choose_gate_of_rows(gate, mean, scale, beta) -> Callable[..., Any]:
    if gate == types.none:
        return lambda gate, mean, scale, beta: None
    return lambda gate, mean, scale, beta: _normalization_of_rows(gate[1], mean, scale, beta)


@inline
def _slopes_of_rows(at, mean, scale, b, k) -> None:
    _normalization_of_rows(at, mean, scale, b)
    _repeat(at, SHIFT_2, k)


@inline
def _folded(c, exist, args) -> Lanes:
    """The sums of the channels c…: those of their positions, one in every row of a line."""
    x, sums, P = args
    total = load_lanes(sums, c, exist, 0.0)
    low = (total - total) + lanes_left_at(x, sums, c, exist)
    for p in range(c + x.shape[1], P, x.shape[1]):
        total, left = two_sum(total, load_lanes(sums, p, exist, 0.0))
        low = low + (left + lanes_left_at(x, sums, p, exist))
    return lanes_with_low(total, low)


@inline
def _fold(x, first, second, P, partial, block) -> None:
    """partial[block] = the two sums of each channel, of the P positions of a line."""
    C = x.shape[1]
    write(line_of(partial, block, 0, 0, C), False, _folded, (x, first, P))
    write(line_of(partial, block, 1, 0, C), False, _folded, (x, second, P))


def _clear_rows(y: Any, v: Any, stop: Any) -> None:
    """Rows v…stop-1 of y are 0; nothing where y is None."""


@overload(_clear_rows)
def _choose_clear_rows(y, v, stop) -> Callable[..., Any]:
    if y == types.none:
        return lambda y, v, stop: None
    return lambda y, v, stop: _clear(y, v, stop)


@inline
def _clear(y, v, stop) -> None:
    zero = y.dtype.type(0)
    for u in range(v, stop):
        row = _rows_of(y, u, y.shape[1])
        for c in range(row.size):
            row[np.uintp(c)] = zero


@kernel
def sums(first, last, rows, x, shift, partial, on) -> None:
    """partial (blocks, 2, C) = sum (x - shift) and sum (x - shift)^2 of every block and channel. Reads x once."""
    N, C, S = x.shape
    blocks, m, P = partial.shape[0], N * S, rows * C
    at, total, square = np.empty((1, 1, P)), sums_memory(x, P), sums_memory(x, P)
    _repeat(at, 0, shift)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        # 1. sums of each position, of four lines at a time
        total[:] = 0.0
        square[:] = 0.0
        while v < end:
            counted, stop = run_of_rows(on, v, end)
            part = (stop - v) // (4 * rows) * rows if counted else 0
            for u in range(v, v + part, rows):
                x0, x1 = _rows_of(x, u, P), _rows_of(x, u + part, P)
                x2, x3 = _rows_of(x, u + 2 * part, P), _rows_of(x, u + 3 * part, P)
                _along(P, total, add_four_deviations, (x0, x1, x2, x3, _of(at, 0), total, square))
            v += 4 * part
            while counted and v < stop:
                size = min(rows, stop - v) * C
                _along(size, total, add_deviations, (_rows_of(x, v, size), _of(at, 0), total, square))
                v += rows
            v = stop
        # 2. of each channel
        _fold(x, total, square, P, partial, block)


@kernel
def gradient_sums(
    first, last, rows, dy, x, mean, scale, dx, partial, beta, kind, residual, dresidual, on
) -> None:  # fmt: skip
    """partial (blocks, 2, C) = sum dy and sum dy (x - mean) of every block and channel. Reads dy and x once.

    dresidual = dy is written too; with an activation dy counts as dy a'(p). Where dx has values the statistics do not depend on
    x, and dx = scale dy is written, block by block.
    """
    N, C, S = x.shape
    blocks, m, P, scaled = partial.shape[0], N * S, rows * C, dx.size > 0
    about, total, product = np.empty((1, 2, P)), sums_memory(x, P), sums_memory(x, P)
    _wide_means(about, 0, C, 1, mean)
    for c in range(C, P):
        about[0, MEAN, np.uintp(c)], about[0, REST, np.uintp(c)] = (
            about[0, MEAN, np.uintp(c - C)],
            about[0, REST, np.uintp(c - C)],
        )
    at = parameters(P if scaled else 0, scale)
    if scaled:
        _repeat(at, SCALE, scale)
    gate, result = _gate(kind, 2, P, scale), result_of(kind, residual)
    _gate_of_rows(gate, mean, scale, beta)
    for block in range(first, last):
        start, end = m * block // blocks, m * (block + 1) // blocks
        v = start
        # 1. sums of each position, of two lines at a time, then of each channel
        total[:] = 0.0
        product[:] = 0.0
        while v < end:
            counted, stop = run_of_rows(on, v, end)
            if not counted:
                _clear_rows(dresidual, v, stop)
            part = (stop - v) // (2 * rows) * rows if counted else 0
            for u in range(v, v + part, rows):
                dy0, dy1, x0, x1 = _rows_of(dy, u, P), _rows_of(dy, u + part, P), _rows_of(x, u, P), _rows_of(x, u + part, P)
                dy0 = _through(dy0, x0, gate, 0, 0, _rows_beside(residual, u, P, S))
                dy1 = _through(dy1, x1, gate, 1, 1, _rows_beside(residual, u + part, P, S))
                result0, result1 = _rows_beside(result, u, P, S), _rows_beside(result, u + part, P, S)
                put_line(dy0, result0, dresidual, u // S, 0, u % S)
                put_line(dy1, result1, dresidual, (u + part) // S, 0, (u + part) % S)
                mean_at, rest_at = _of(about, MEAN), _of(about, REST)
                _along(P, total, add_two_gradients, (dy0, dy1, x0, x1, result0, result1, mean_at, rest_at, total, product))
            v += 2 * part
            while counted and v < stop:
                size = min(rows, stop - v) * C
                x0 = _rows_of(x, v, size)
                dy0 = _through(_rows_of(dy, v, size), x0, gate, 0, 0, _rows_beside(residual, v, size, S))
                mean_at, rest_at, result0 = _of(about, MEAN), _of(about, REST), _rows_beside(result, v, size, S)
                put_line(dy0, result0, dresidual, v // S, 0, v % S)
                _along(size, total, add_gradients, (dy0, x0, result0, mean_at, rest_at, total, product))
                v += rows
            v = stop
        _fold(x, total, product, P, partial, block)
        # 2. the block's dx, from what the caches hold
        v = start if scaled else end
        while v < end:
            counted, stop = run_of_rows(on, v, end)
            if not counted:
                _clear_rows(dx, v, stop)
            while counted and v < stop:
                size = min(rows, stop - v) * C
                passed = _through(_rows_of(dy, v, size), _rows_of(x, v, size), gate, 0, 0, _rows_beside(residual, v, size, S))
                _scale(passed, _rows_beside(result, v, size, S), at, _rows_of(dx, v, size), _goes_around(dx))
                v += rows
            v = stop
    streamed()


@kernel
def normalize(first, last, blocks, rows, x, mean, scale, beta, y, kind, residual, on) -> None:
    """y = a((x - mean) scale + beta + residual) of every block, scale = rstd gamma. Reads x and the residual, writes y."""
    N, C, S = x.shape
    m, at = N * S, parameters(rows * C, mean)
    _normalization_of_rows(at, mean, scale, beta)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            counted, stop = run_of_rows(on, v, end)
            if not counted:
                _clear_rows(y, v, stop)
            while counted and v < stop:
                size = min(rows, stop - v) * C
                after = kind, _rows_beside(residual, v, size, S)
                _normalize(_rows_of(x, v, size), at, _rows_of(y, v, size), _goes_around(y), after)
                v += rows
            v = stop
    streamed()


@kernel
def apply(
    first, last, blocks, rows, dy, x, mean, scale, b, k, dx, beta, kind, residual, dresidual, on
) -> None:  # fmt: skip
    """dx = scale (dy - b - (x - mean) k) of every block, b = dbeta / m, k = rstd dgamma / m.

    Reads dy and x (and the residual, where an activation needs it); writes dx and dresidual.
    """
    N, C, S = x.shape
    m, at = N * S, parameters(rows * C, mean)
    _slopes_of_rows(at, mean, scale, b, k)
    gate, result = _gate(kind, 2, rows * C, mean), result_of(kind, residual)
    _gate_of_rows(gate, mean, scale, beta)
    for block in range(first, last):
        v, end = m * block // blocks, m * (block + 1) // blocks
        while v < end:
            counted, stop = run_of_rows(on, v, end)
            if not counted:
                _clear_rows(dx, v, stop)
                _clear_rows(dresidual, v, stop)
            while counted and v < stop:
                size = min(rows, stop - v) * C
                x_line = _rows_of(x, v, size)
                passed = _through(_rows_of(dy, v, size), x_line, gate, 0, 0, _rows_beside(residual, v, size, S))
                result_line = _rows_beside(result, v, size, S)
                put_line(passed, result_line, dresidual, v // S, 0, v % S)
                _apply(passed, x_line, result_line, at, _rows_of(dx, v, size), _goes_around(dx))
                v += rows
            v = stop
    streamed()
