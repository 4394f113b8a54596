"""Batch normalisation by tiles: several small planes, or a few channels of channels-last rows, as lines of `lines.py`.

Formulas and arguments are those of `planes.py`; a call with a mask takes other loops (`channel_plan.py`).

A tile is `group` channels; its lines are x[n, c0:c1, :], position (c - c0) S + s. Block b is the samples N p / parts …
N (p + 1) / parts - 1 of a tile, p = b % parts; a channel that is done whole has one part. Whole tiles that one thread does in
turn are done as one of up to WIDE positions: what is done to a channel is the same, in the order of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, kernel, overload, reduction
from .._numba.elements import load
from .._numba.simd import streamed
from .._numba.views import line_of
from .activation import line_beside, put_line, result_of, scale_of
from .line_sums import add_deviations, add_four_deviations, add_gradients, add_two_gradients, sums_memory
from .lines import (
    MEAN,
    REST,
    SCALE,
    SHIFT_1,
    SHIFT_2,
    _along,
    _apply,
    _gate,
    _goes_around,
    _normalize,
    _of,
    _scale,
    _spread,
    _through,
    _went_through,
    _wide_means,
    parameters,
)
from .statistics import SHIFT_VALUES, better_shift, finish, shift_of, two_sum, with_low

# Positions of tiles done as one, and their bytes over all samples: rows of 1024 channels took 1.4 times as long by 128.
WIDE, STRIP_BYTES = 1024, 1 << 20


@inline
def _at_once(group, x) -> int:
    """How many tiles are done as one, STRIP_BYTES of them at most."""
    N, S = x.shape[0], x.shape[2]
    return max(1, min(WIDE // (group * S), STRIP_BYTES // (N * group * S * x.itemsize)))


@inline
def _block_of(block, parts, group, x) -> tuple[int, int, int, int]:
    """The samples n0…n1-1 and channels c0…c1-1 of a block."""
    N, tile, part = x.shape[0], block // parts, block % parts
    return N * part // parts, N * (part + 1) // parts, tile * group, min(tile * group + group, x.shape[1])


@inline
def _tile_deviations(x, n0, n1, c0, c1, shift, total, square) -> None:
    """total and square = sum (x - shift) and sum (x - shift)^2 of each position, over the samples n0…n1-1."""
    size, part = (c1 - c0) * x.shape[2], (n1 - n0) // 4
    total[:] = 0.0
    square[:] = 0.0
    for n in range(n0, n0 + part):
        x0, x1 = line_of(x, n, c0, 0, size), line_of(x, n + part, c0, 0, size)
        x2, x3 = line_of(x, n + 2 * part, c0, 0, size), line_of(x, n + 3 * part, c0, 0, size)
        _along(size, total, add_four_deviations, (x0, x1, x2, x3, shift, total, square))
    for n in range(n0 + 4 * part, n1):
        _along(size, total, add_deviations, (line_of(x, n, c0, 0, size), shift, total, square))


@inline
def _tile_gradients(dy, x, n0, n1, c0, c1, about, total, product, gate, residual, result) -> None:
    """total and product = sum dy and sum dy (x - mean) of each position, over the samples n0…n1-1; about: `_wide_means`."""
    size, part, mean, rest = (c1 - c0) * x.shape[2], (n1 - n0) // 2, _of(about, MEAN), _of(about, REST)
    total[:] = 0.0
    product[:] = 0.0
    for n in range(n0, n0 + part):
        dy0, dy1 = line_of(dy, n, c0, 0, size), line_of(dy, n + part, c0, 0, size)
        x0, x1 = line_of(x, n, c0, 0, size), line_of(x, n + part, c0, 0, size)
        dy0 = _through(dy0, x0, gate, n, 0, line_beside(residual, n, c0, 0, size))
        dy1 = _through(dy1, x1, gate, n + part, 1, line_beside(residual, n + part, c0, 0, size))
        result0, result1 = line_beside(result, n, c0, 0, size), line_beside(result, n + part, c0, 0, size)
        _along(size, total, add_two_gradients, (dy0, dy1, x0, x1, result0, result1, mean, rest, total, product))
    for n in range(n0 + 2 * part, n1):
        dy0, x0 = line_of(dy, n, c0, 0, size), line_of(x, n, c0, 0, size)
        dy0 = _through(dy0, x0, gate, n, 0, line_beside(residual, n, c0, 0, size))
        result0 = line_beside(result, n, c0, 0, size)
        _along(size, total, add_gradients, (dy0, x0, result0, mean, rest, total, product))


@reduction
def _fast_sums(first, second, start, S) -> tuple[float, float]:
    a, b = 0.0, 0.0
    for s in range(S):
        p = np.uintp(start + s)
        a += first[p]
        b += second[p]
    return a, b


@inline
def _exact_sums(first, second, start, S) -> tuple[float, float]:
    """Of `sums_memory` of float64: what the roundings left is in its second half."""
    a, b, a_low, b_low = 0.0, 0.0, 0.0, 0.0
    half = first.size // 2
    for s in range(start, start + S):
        a, low = two_sum(a, first[s])
        a_low += low + first[half + s]
        b, low = two_sum(b, second[s])
        b_low += low + second[half + s]
    return with_low(a, a_low), with_low(b, b_low)


def _position_sums(x: Any, first: Any, second: Any, start: Any, S: Any) -> Any:
    """The sums of first[start : start + S] and of second: exact where x is float64, whose digits they would lose."""
    return _exact_sums(first, second, start, S)


@overload(_position_sums)
def _choose_position_sums(x, first, second, start, S) -> Callable[..., Any]:
    sums = _exact_sums if x.dtype == types.float64 else _fast_sums
    return lambda x, first, second, start, S: sums(first, second, start, S)


@inline
def _tile_sums(x, first, second, c0, c1, sums) -> None:
    """sums (2, c1 - c0 or more) = the sums of the positions of each channel."""
    S = x.shape[2]
    for j in range(c1 - c0):
        sums[0, j], sums[1, j] = _position_sums(x, first, second, j * S, S)


@inline
def _tile_shifts(x, c0, c1, shift, total, size, sums) -> None:
    """As `first_mean`, of all channels of the tile."""
    S = x.shape[2]
    count = min(x.shape[0], -(-SHIFT_VALUES // S))
    total[:] = 0.0
    size[:] = 0.0
    for n in range(count):
        line = line_of(x, n, c0, 0, (c1 - c0) * S)
        for p in range(line.size):
            value = np.float64(load(line, p))
            total[p] += value
            size[p] += abs(value)
    _tile_sums(x, total, size, c0, c1, sums)
    for j in range(c1 - c0):
        shift[j] = shift_of(sums[0, j], sums[1, j], count * S)


@inline
def _statistics(x, c0, c1, shift, sums, at, total, square, mean, var, rstd, running_mean, running_var, eps, momentum) -> None:
    """Mean, var, rstd and running statistics of the channels c0…c1-1; shift, sums, at (1, 1, positions), total and square are
    memory, in float64."""
    N, S = x.shape[0], x.shape[2]
    m = np.float64(N * S)
    _tile_shifts(x, c0, c1, shift, total, square, sums)
    far = True
    for _ in range(2):
        if far:
            for j in range(c1 - c0):
                _spread(at, 0, j, S, shift[j])
            _tile_deviations(x, 0, N, c0, c1, _of(at, 0), total, square)
            _tile_sums(x, total, square, c0, c1, sums)
            far = False
            for j in range(c1 - c0):
                better = better_shift(shift[j], sums[0, j], sums[1, j], m)
                if better == better:
                    shift[j], far = better, True
    for c in range(c0, c1):
        j = c - c0
        about = at[0, 0, j * S]
        finish(c, about, sums[0, j], sums[1, j], m, eps, momentum, mean, var, rstd, running_mean, running_var)


@inline
def _means_of_tile(at, c0, c1, S, mean) -> None:
    for c in range(c0, c1):
        _spread(at, MEAN, c - c0, S, mean[0, c])
        _spread(at, REST, c - c0, S, mean[1, c])


@inline
def _scale_of_tile(at, c0, c1, S, rstd, gamma) -> None:
    for c in range(c0, c1):
        _spread(at, SCALE, c - c0, S, rstd[c] * gamma[c])


@inline
def _normalization_of_tile(at, c0, c1, S, mean, scale, beta) -> None:
    _means_of_tile(at, c0, c1, S, mean)
    for c in range(c0, c1):
        _spread(at, SCALE, c - c0, S, scale[c])
        _spread(at, SHIFT_1, c - c0, S, beta[c])


def _gate_of_tile(gate: Any, c0: Any, c1: Any, S: Any, mean: Any, scale: Any, beta: Any) -> None:
    """Fills the parameters of a gate."""


@overload(_gate_of_tile)
def _choose_gate_of_tile(gate, c0, c1, S, mean, scale, beta) -> Callable[..., Any]:
    if gate == types.none:
        return lambda gate, c0, c1, S, mean, scale, beta: None
    return lambda gate, c0, c1, S, mean, scale, beta: _normalization_of_tile(gate[1], c0, c1, S, mean, scale, beta)


@inline
def _slopes_of_tile(at, c0, c1, S, mean, scale, b, k) -> None:
    _normalization_of_tile(at, c0, c1, S, mean, scale, b)
    for c in range(c0, c1):
        _spread(at, SHIFT_2, c - c0, S, k[c])


@inline
def _gradients_of_tile(at, sums, c0, c1, S, m, rstd, dgamma, dbeta) -> None:
    """dgamma and dbeta of the tile's channels from their sums, and the parameters of dx that come of them."""
    of = rstd.dtype.type
    for c in range(c0, c1):
        db, dg = sums[0, c - c0], sums[1, c - c0] * rstd[c]
        dbeta[c], dgamma[c] = of(db), of(dg)
        _spread(at, SHIFT_1, c - c0, S, of(db / m))
        _spread(at, SHIFT_2, c - c0, S, of(dg * rstd[c] / m))


@kernel
def forward(
    first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum, kind, residual
) -> None:  # fmt: skip
    """y = a((x - mean) rstd gamma + beta + residual), mean and var of each channel of the tiles first…last-1.

    Reads x twice, the second time from the caches, and the residual once; writes y, and mean (2, C), var, rstd and the running
    statistics of these channels.
    """
    N, C, S = x.shape
    step = min(_at_once(group, x), last - first)
    P = step * group * S
    shift, sums, scale, at = np.empty(step * group), np.empty((2, step * group)), np.empty_like(rstd), parameters(P, var)
    shift_at, total, square = np.empty((1, 1, P)), sums_memory(x, P), sums_memory(x, P)
    for tile in range(first, last, step):
        c0, c1 = tile * group, min(min(tile + step, last) * group, C)
        # 1. read x: the statistics of the tile's channels
        _statistics(
            x, c0, c1, shift, sums, shift_at, total, square, mean, var, rstd, running_mean, running_var, eps, momentum
        )  # fmt: skip
        # 2. the parameters of each position
        for c in range(c0, c1):
            scale[c] = rstd[c] * gamma[c]
        _normalization_of_tile(at, c0, c1, S, mean, scale, beta)
        # 3. read x again: y
        for n in range(N):
            size = (c1 - c0) * S
            after = kind, line_beside(residual, n, c0, 0, size)
            _normalize(line_of(x, n, c0, 0, size), at, line_of(y, n, c0, 0, size), _goes_around(y), after)
    streamed()


@kernel
def backward(
    first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta, beta, kind, residual, dresidual
) -> None:  # fmt: skip
    """dx = rstd gamma (dy - dbeta / m - x_hat dgamma / m) of the channels of the tiles first…last-1, dbeta = sum dy,
    dgamma = sum dy x_hat; with an activation dy counts as dy a'(p), which is dresidual too.

    Reads dy and x (and the residual, where an activation needs it) twice, then from the caches; writes the gradients.
    """
    N, C, S = x.shape
    m, step = np.float64(N * S), min(_at_once(group, x), last - first)
    P = step * group * S
    sums, at, total, product = np.empty((2, step * group)), parameters(P, rstd), sums_memory(x, P), sums_memory(x, P)
    about, gate, of_gate = np.empty((1, 2, P)), _gate(kind, N, P, rstd), scale_of(kind, rstd, gamma)
    result = result_of(kind, residual)
    for tile in range(first, last, step):
        c0, c1 = tile * group, min(min(tile + step, last) * group, C)
        size = (c1 - c0) * S
        # 1. the parameters of each position
        _means_of_tile(at, c0, c1, S, mean)
        _wide_means(about, c0, c1, S, mean)
        _scale_of_tile(at, c0, c1, S, rstd, gamma)
        _gate_of_tile(gate, c0, c1, S, mean, of_gate, beta)
        # 2. read dy and x: the sums, and dbeta and dgamma from them
        _tile_gradients(dy, x, 0, N, c0, c1, about, total, product, gate, residual, result)
        _tile_sums(x, total, product, c0, c1, sums)
        _gradients_of_tile(at, sums, c0, c1, S, m, rstd, dgamma, dbeta)
        # 3. read both again: dx
        for n in range(N):
            x_line, result_line = line_of(x, n, c0, 0, size), line_beside(result, n, c0, 0, size)
            passed = _went_through(line_of(dy, n, c0, 0, size), x_line, gate, n, line_beside(residual, n, c0, 0, size))
            put_line(passed, result_line, dresidual, n, c0, 0)
            _apply(passed, x_line, result_line, at, line_of(dx, n, c0, 0, size), _goes_around(dx))
    streamed()


@inline
def _keep_sums(sums, partial, part, c0, c1) -> None:
    """Element by element: to assign a slice Numba compiles what words the error of a wrong shape, 8 s in each process."""
    for k in range(2):
        for c in range(c0, c1):
            partial[part, k, c] = sums[k, c - c0]


@kernel
def sums(first, last, group, x, shift, partial) -> None:
    """partial (parts, 2, C) = sum (x - shift) and sum (x - shift)^2 of every block and channel. Reads x once."""
    S, P, parts = x.shape[2], group * x.shape[2], partial.shape[0]
    sums, at, total, square = np.empty((2, group)), np.empty((1, 1, P)), sums_memory(x, P), sums_memory(x, P)
    for block in range(first, last):
        n0, n1, c0, c1 = _block_of(block, parts, group, x)
        for c in range(c0, c1):
            _spread(at, 0, c - c0, S, shift[c])
        _tile_deviations(x, n0, n1, c0, c1, _of(at, 0), total, square)
        _tile_sums(x, total, square, c0, c1, sums)
        _keep_sums(sums, partial, block % parts, c0, c1)


@kernel
def gradient_sums(
    first, last, group, dy, x, mean, scale, dx, partial, beta, kind, residual, dresidual
) -> None:  # fmt: skip
    """partial (parts, 2, C) = sum dy and sum dy (x - mean) of every block and channel. Reads dy and x once.

    Where dx has values the statistics do not depend on x: dx = scale dy and dresidual = dy are written too, block by block.
    """
    S, P, parts, scaled = x.shape[2], group * x.shape[2], partial.shape[0], dx.size > 0
    sums, about, total, product = np.empty((2, group)), np.empty((1, 2, P)), sums_memory(x, P), sums_memory(x, P)
    at, gate, result = parameters(P if scaled else 0, scale), _gate(kind, x.shape[0], P, scale), result_of(kind, residual)
    for block in range(first, last):
        n0, n1, c0, c1 = _block_of(block, parts, group, x)
        size = (c1 - c0) * S
        _wide_means(about, c0, c1, S, mean)
        _gate_of_tile(gate, c0, c1, S, mean, scale, beta)
        _tile_gradients(dy, x, n0, n1, c0, c1, about, total, product, gate, residual, result)
        _tile_sums(x, total, product, c0, c1, sums)
        _keep_sums(sums, partial, block % parts, c0, c1)
        if scaled:
            for c in range(c0, c1):
                _spread(at, SCALE, c - c0, S, scale[c])
            for n in range(n0, n1):
                x_line, result_line = line_of(x, n, c0, 0, size), line_beside(result, n, c0, 0, size)
                passed = _went_through(line_of(dy, n, c0, 0, size), x_line, gate, n, line_beside(residual, n, c0, 0, size))
                put_line(passed, result_line, dresidual, n, c0, 0)
                _scale(passed, result_line, at, line_of(dx, n, c0, 0, size), _goes_around(dx))
    streamed()


@kernel
def normalize(first, last, group, parts, x, mean, scale, beta, y, kind, residual) -> None:
    """y = a((x - mean) scale + beta + residual) of every block, scale = rstd gamma. Reads x and the residual, writes y."""
    S, at = x.shape[2], parameters(group * x.shape[2], mean)
    for block in range(first, last):
        n0, n1, c0, c1 = _block_of(block, parts, group, x)
        size = (c1 - c0) * S
        _normalization_of_tile(at, c0, c1, S, mean, scale, beta)
        for n in range(n0, n1):
            after = kind, line_beside(residual, n, c0, 0, size)
            _normalize(line_of(x, n, c0, 0, size), at, line_of(y, n, c0, 0, size), _goes_around(y), after)
    streamed()


@kernel
def apply(
    first, last, group, parts, dy, x, mean, scale, b, k, dx, beta, kind, residual, dresidual
) -> None:  # fmt: skip
    """dx = scale (dy - b - (x - mean) k) of every block, b = dbeta / m, k = rstd dgamma / m.

    Reads dy and x (and the residual, where an activation needs it); writes dx and dresidual.
    """
    S, at, gate = x.shape[2], parameters(group * x.shape[2], mean), _gate(kind, 2, group * x.shape[2], mean)
    result = result_of(kind, residual)
    for block in range(first, last):
        n0, n1, c0, c1 = _block_of(block, parts, group, x)
        size = (c1 - c0) * S
        _slopes_of_tile(at, c0, c1, S, mean, scale, b, k)
        _gate_of_tile(gate, c0, c1, S, mean, scale, beta)
        for n in range(n0, n1):
            x_line = line_of(x, n, c0, 0, size)
            passed = _through(line_of(dy, n, c0, 0, size), x_line, gate, 0, 0, line_beside(residual, n, c0, 0, size))
            result_line = line_beside(result, n, c0, 0, size)
            put_line(passed, result_line, dresidual, n, c0, 0)
            _apply(passed, x_line, result_line, at, line_of(dx, n, c0, 0, size), _goes_around(dx))
    streamed()
