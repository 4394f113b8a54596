"""Batch normalisation where the values of a channel lie in planes: runs along S, adjacent in memory (NCHW).

A run has one mean, scale and shift; its sums are taken several lanes at a time. Strides other than 1 along S are right too:
such a run is copied to be adjacent, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from .._numba.compile import inline, kernel, reduction
from .._numba.elements import load, store
from .._numba.simd import Lanes, fetch, load_lanes, streamed, write
from .._numba.views import gather, line_of, plane_of, prefix, row_buffer, scatter
from .activation import finished, let_through, put, run_beside, scratch_beside
from .statistics import add_to, better_shift, finish, first_mean, sums_of, two_sum, with_low

# Bytes of the smallest result that goes around the caches; as many are read. A MiB took 33 us through a last cache of
# 32 MiB where both lay in half of it, 130 to 150 us where they did not, and 60 to 100 us around it.
AROUND = 8 << 20
# Values whose sum is taken at once, and values copied at once.
RUN = 512
# 0 as a variable: Numba compiles a function once more for a literal.
START = np.int64(0)


# ---------------------------------------------------------------------------------------------- one run
@inline
def _from_shift(x, i, shift) -> float:
    return np.float64(load(x, i)) - shift


@inline
def _from_mean(x, i, mean, rest) -> float:
    return (load(x, i) - mean) - rest


@reduction
def _fast_deviation_sums(x, shift) -> tuple[float, float]:
    total, square = 0.0, 0.0
    for i in range(x.size):
        d = _from_shift(x, i, shift)
        total += d
        square += d * d
    return total, square


@inline
def _exact_deviation_sums(x, shift) -> tuple[float, float]:
    """For float64 itself, which leaves no digits to spare: the rounding of each addition is carried along."""
    total, square, total_low, square_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        d = _from_shift(x, i, shift)
        total, low = two_sum(total, d)
        total_low += low
        square, low = two_sum(square, d * d)
        square_low += low
    return with_low(total, total_low), with_low(square, square_low)


@reduction
def _fast_gradient_sums(dy, x, mean, rest) -> tuple[float, float]:
    total, product = 0.0, 0.0
    for i in range(x.size):
        g = np.float64(load(dy, i))
        total += g
        product += g * np.float64(_from_mean(x, i, mean, rest))
    return total, product


@inline
def _exact_gradient_sums(dy, x, mean, rest) -> tuple[float, float]:
    total, product, total_low, product_low = 0.0, 0.0, 0.0, 0.0
    for i in range(x.size):
        g = load(dy, i)
        total, low = two_sum(total, g)
        total_low += low
        product, low = two_sum(product, g * _from_mean(x, i, mean, rest))
        product_low += low
    return with_low(total, total_low), with_low(product, product_low)


def _deviation_sums(x: Any, shift: Any) -> Any:
    """sum (x - shift) and sum (x - shift)^2."""
    return _exact_deviation_sums(x, shift)


@overload(_deviation_sums)
def _choose_deviation_sums(x, shift) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda x, shift: _exact_deviation_sums(x, shift)
    return lambda x, shift: _fast_deviation_sums(x, shift)


def _gradient_sums(dy: Any, x: Any, mean: Any, rest: Any) -> Any:
    """sum dy and sum dy (x - mean)."""
    return _exact_gradient_sums(dy, x, mean, rest)


@overload(_gradient_sums)
def _choose_gradient_sums(dy, x, mean, rest) -> Callable[..., Any]:
    if x.dtype == types.float64:
        return lambda dy, x, mean, rest: _exact_gradient_sums(dy, x, mean, rest)
    return lambda dy, x, mean, rest: _fast_gradient_sums(dy, x, mean, rest)


@inline
def _y(x, mean, rest, scale, beta) -> Any:
    """y = (x - mean) scale + beta, scale = rstd gamma; the mean is mean + rest. Of numbers or of vectors of them."""
    return ((x - mean) - rest) * scale + beta


@inline
def _dx(dy, x, mean, rest, scale, b, k) -> Any:
    """dx = scale (dy - b - (x - mean) k), b = dbeta / m, k = rstd dgamma / m: docs/derivations.md, (2.3)."""
    return ((dy - b) - ((x - mean) - rest) * k) * scale


@inline
def _y_of_run(i, exist, args) -> Lanes:
    x, mean, rest, scale, beta, after = args
    return finished(_y(load_lanes(x, i, exist, 0.0), mean, rest, scale, beta), i, exist, after)


@inline
def _passed(i, exist, args) -> Lanes:
    dy, x, mean, rest, scale, beta, after = args
    v = _y(load_lanes(x, i, exist, 0.0), mean, rest, scale, beta)
    return let_through(load_lanes(dy, i, exist, 0.0), v, i, exist, after)


@inline
def _dx_of_run(i, exist, args) -> Lanes:
    dy, x, mean, rest, scale, b, k = args
    return _dx(load_lanes(dy, i, exist, 0.0), load_lanes(x, i, exist, 0.0), mean, rest, scale, b, k)


# ---------------------------------------------------------------------------------------------- values s0…s1-1 of a plane
@inline
def _scratch(x) -> np.ndarray:
    """Room for a run of `x` that is not adjacent in memory; empty where runs are adjacent."""
    return np.empty(0 if x.strides[2] == x.itemsize else RUN, x.dtype)


@inline
def _goes_around(y) -> bool:
    """True where the planes of a result are to be written around the caches."""
    return y.size * y.itemsize >= AROUND and y.strides[2] == y.itemsize


@inline
def _fetch_next(x, n, c, s, end) -> None:
    """Asks for the same values of the next sample."""
    if n + 1 < x.shape[0] and x.strides[2] == x.itemsize:
        fetch(line_of(x, n + 1, c, s, end - s))


@inline
def _add_deviations(x, n, c, s0, s1, shift, sums, j, scratch, ahead) -> None:
    """`ahead`: the next to be read is the next sample."""
    for s in range(s0, s1, RUN):
        if ahead:
            _fetch_next(x, n, c, s, min(s + RUN, s1))
        pair = _deviation_sums(gather(plane_of(x, n, c, s, min(s + RUN, s1)), scratch), shift)
        add_to(sums, j, pair[0], pair[1])


@inline
def _add_gradients(dy, x, n, c, s0, s1, mean, sums, j, dy_scratch, x_scratch, ahead, gate) -> None:
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if ahead:
            _fetch_next(x, n, c, s, end)
            _fetch_next(dy, n, c, s, end)
        dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
        pair = _gradient_sums(_through(dy_run, x_run, mean, n, c, s, end, gate), x_run, mean[0, c], mean[1, c])
        add_to(sums, j, pair[0], pair[1])


@inline
def _normalize(x, n, c, s0, s1, mean, scale, beta, y, around, x_scratch, y_scratch, behind) -> None:
    """behind: activation, residual and memory for a run of that."""
    kind, residual, r_scratch = behind
    step = _piece(r_scratch, RUN if x_scratch.size or y_scratch.size else max(s1 - s0, 1))
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        y_run, after = row_buffer(plane_of(y, n, c, s, end), y_scratch), (kind, run_beside(residual, n, c, s, end, r_scratch))
        x_run = gather(plane_of(x, n, c, s, end), x_scratch)
        write(y_run, around, _y_of_run, (x_run, mean[0, c], mean[1, c], scale, beta, after))
        scatter(plane_of(y, n, c, s, end), y_scratch)


@inline
def _apply(
    dy, x, n, c, s0, s1, mean, scale, b, k, dx, around, dy_scratch, x_scratch, dx_scratch, gate, dresidual
) -> None:  # fmt: skip
    step = _gated_piece(gate, RUN if dy_scratch.size or x_scratch.size or dx_scratch.size else max(s1 - s0, 1))
    for s in range(s0, s1, step):
        end = min(s + step, s1)
        dy_run, x_run = gather(plane_of(dy, n, c, s, end), dy_scratch), gather(plane_of(x, n, c, s, end), x_scratch)
        passed = _through(dy_run, x_run, mean, n, c, s, end, gate)
        put(passed, dresidual, n, c, s)
        dx_run = row_buffer(plane_of(dx, n, c, s, end), dx_scratch)
        write(dx_run, around, _dx_of_run, (passed, x_run, mean[0, c], mean[1, c], scale, b, k))
        scatter(plane_of(dx, n, c, s, end), dx_scratch)


@inline
def _scale(dy, x, n, c, s0, s1, mean, scale, dx, dy_scratch, x_scratch, dx_scratch, gate, dresidual) -> None:
    """dx = scale dy for a run that is in the nearest cache."""
    dy_run, dx_run = gather(plane_of(dy, n, c, s0, s1), dy_scratch), row_buffer(plane_of(dx, n, c, s0, s1), dx_scratch)
    passed = _through(dy_run, gather(plane_of(x, n, c, s0, s1), x_scratch), mean, n, c, s0, s1, gate)
    put(passed, dresidual, n, c, s0)
    for i in range(passed.size):
        store(dx_run, i, load(passed, i) * scale)
    scatter(plane_of(dx, n, c, s0, s1), dx_scratch)


# ---------------------------------------------------------------------------------------------- an activation behind it
def _piece(r_scratch: Any, size: Any) -> Any:
    """How many values of a run are done at once."""


@overload(_piece)
def _choose_piece(r_scratch, size) -> Callable[..., Any]:
    if r_scratch == types.none:
        return lambda r_scratch, size: size
    return lambda r_scratch, size: RUN if r_scratch.size else size


def _gated_piece(gate: Any, size: Any) -> Any:
    """The same where an activation lets through."""


@overload(_gated_piece)
def _choose_gated_piece(gate, size) -> Callable[..., Any]:
    return (lambda gate, size: size) if gate == types.none else (lambda gate, size: RUN)


def _gate(kind: Any, residual: Any, scale: Any, beta: Any) -> Any:
    """What `_through` needs: the activation, γ rstd and β, and memory; None without an activation."""


@overload(_gate)
def _choose_gate(kind, residual, scale, beta) -> Callable[..., Any]:
    if kind == types.none:
        return lambda kind, residual, scale, beta: None
    return lambda kind, residual, scale, beta: (
        kind, residual, scratch_beside(residual, RUN), np.empty(RUN, scale.dtype), scale, beta
    )  # fmt: skip


def _through(dy: Any, x: Any, mean: Any, n: Any, c: Any, s: Any, end: Any, gate: Any) -> Any:
    """What passes of a run `dy`: itself without an activation."""


@overload(_through)
def _choose_through(dy, x, mean, n, c, s, end, gate) -> Callable[..., Any]:
    if gate == types.none:
        return lambda dy, x, mean, n, c, s, end, gate: dy
    return lambda dy, x, mean, n, c, s, end, gate: _passed_run(dy, x, mean, n, c, s, end, gate)


@inline
def _passed_run(dy, x, mean, n, c, s, end, gate) -> np.ndarray:
    kind, residual, r_scratch, memory, scale, beta = gate
    row, after = prefix(memory, dy.size), (kind, run_beside(residual, n, c, s, end, r_scratch))
    write(row, False, _passed, (dy, x, mean[0, c], mean[1, c], scale[c], beta[c], after))
    return row


def _scale_of(kind: Any, rstd: Any, gamma: Any) -> Any:
    """γ rstd; None without an activation."""


@overload(_scale_of)
def _choose_scale_of(kind, rstd, gamma) -> Callable[..., Any]:
    return (lambda kind, rstd, gamma: None) if kind == types.none else (lambda kind, rstd, gamma: rstd * gamma)


# ---------------------------------------------------------------------------------------------- whole channels
@inline
def _statistics(x, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch) -> None:
    """Statistics of the channels c0…c1-1; shift (c1 - c0) and sums (2, 2, c1 - c0) hold them."""
    N, S = x.shape[0], x.shape[2]
    m = np.float64(N * S)
    sums[:] = 0.0
    for c in range(c0, c1):
        shift[c - c0] = first_mean(x, c)
    for n in range(N):
        for c in range(c0, c1):
            _add_deviations(x, n, c, START, S, shift[c - c0], sums, c - c0, x_scratch, True)
    for c in range(c0, c1):
        j = c - c0
        total, square = sums_of(sums, j)
        better = better_shift(shift[j], total, square, m)
        if better == better:
            shift[j] = better
            sums[:, :, j] = 0.0
            for n in range(N):
                _add_deviations(x, n, c, START, S, better, sums, j, x_scratch, True)
            total, square = sums_of(sums, j)
        finish(c, shift[j], total, square, m, eps, momentum, mean, var, rstd, running_mean, running_var)


@inline
def _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k) -> None:
    """dgamma and dbeta of the channels c0…c1-1 from their sums, and what dx needs of them in b and k."""
    of = rstd.dtype.type
    for c in range(c0, c1):
        j = c - c0
        total, product = sums_of(sums, j)
        product *= rstd[c]
        dbeta[c], dgamma[c] = of(total), of(product)
        b[j], k[j] = of(total / m), of(product * rstd[c] / m)


# A block is `group` channels, done from first to last while they are in cache.
@kernel
def forward(
    first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum, kind, residual
) -> None:  # fmt: skip
    """Statistics and y of the blocks first…last-1."""
    N, C, S = x.shape
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    shift, sums, behind = np.empty(group), np.empty((2, 2, group)), (kind, residual, scratch_beside(residual, RUN))
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        _statistics(x, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, x_scratch)
        for n in range(N):
            for c in range(c0, c1):
                _normalize(x, n, c, START, S, mean, rstd[c] * gamma[c], beta[c], y, around, x_scratch, y_scratch, behind)
    streamed()


@kernel
def backward(
    first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta, beta, kind, residual, dresidual
) -> None:  # fmt: skip
    """dgamma, dbeta and dx of the blocks first…last-1."""
    N, C, S = x.shape
    m = np.float64(N * S)
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    sums, b, k = np.empty((2, 2, group)), np.empty(group, rstd.dtype), np.empty(group, rstd.dtype)
    gate = _gate(kind, residual, _scale_of(kind, rstd, gamma), beta)
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        sums[:] = 0.0
        for n in range(N):
            for c in range(c0, c1):
                _add_gradients(dy, x, n, c, START, S, mean, sums, c - c0, dy_scratch, x_scratch, True, gate)
        _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k)
        for n in range(N):
            for c in range(c0, c1):
                j, scale = c - c0, rstd[c] * gamma[c]
                _apply(
                    dy, x, n, c, START, S, mean, scale, b[j], k[j], dx, around, dy_scratch, x_scratch, dx_scratch, gate,
                    dresidual,
                )  # fmt: skip
    streamed()


# ---------------------------------------------------------------------------------------------- split
# Block b is the values size b / blocks … size (b + 1) / blocks - 1 of all, in the order of n, c, s: one run in memory, mostly.
@inline
def _run_at(x, v, end) -> tuple[int, int, int, int]:
    """n, c, s and where s ends: the values v… of a plane, below `end`."""
    C, S = x.shape[1], x.shape[2]
    s = v % S
    return v // S // C, v // S % C, s, min(S, s + end - v)


@kernel
def sums(first, last, x, shift, partial) -> None:
    """partial (blocks, 2, C): sum (x - shift) and sum (x - shift)^2 of every block."""
    C = x.shape[1]
    blocks, scratch, pieces = partial.shape[0], _scratch(x), np.empty((2, 2, C))
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _add_deviations(x, n, c, s, stop, shift[c], pieces, c, scratch, False)
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def gradient_sums(first, last, dy, x, mean, scale, dx, partial, beta, kind, residual, dresidual) -> None:
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block. dx, if it has values, = scale dy."""
    C = x.shape[1]
    blocks, dy_scratch, x_scratch, pieces = partial.shape[0], _scratch(dy), _scratch(x), np.empty((2, 2, C))
    dx_scratch, gate = _scratch(dx), _gate(kind, residual, scale, beta)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        pieces[:] = 0.0
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            stop = min(stop, s + RUN)
            _add_gradients(dy, x, n, c, s, stop, mean, pieces, c, dy_scratch, x_scratch, False, gate)
            if dx.size:
                _scale(
                    dy, x, n, c, s, stop, mean, scale[c], dx, dy_scratch, x_scratch, dx_scratch, gate, dresidual
                )  # fmt: skip
            v += stop - s
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def normalize(first, last, blocks, x, mean, scale, beta, y, kind, residual) -> None:
    behind = kind, residual, scratch_beside(residual, RUN)
    x_scratch, y_scratch, around = _scratch(x), _scratch(y), _goes_around(y)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _normalize(x, n, c, s, stop, mean, scale[c], beta[c], y, around, x_scratch, y_scratch, behind)
            v += stop - s
    streamed()


@kernel
def apply(first, last, blocks, dy, x, mean, scale, b, k, dx, beta, kind, residual, dresidual) -> None:
    """dx = scale (dy - b - (x - mean) k)."""
    dy_scratch, x_scratch, dx_scratch, around = _scratch(dy), _scratch(x), _scratch(dx), _goes_around(dx)
    gate = _gate(kind, residual, scale, beta)
    for block in range(first, last):
        v, end = x.size * block // blocks, x.size * (block + 1) // blocks
        while v < end:
            n, c, s, stop = _run_at(x, v, end)
            _apply(
                dy, x, n, c, s, stop, mean, scale[c], b[c], k[c], dx, around, dy_scratch, x_scratch, dx_scratch, gate, dresidual
            )  # fmt: skip
            v += stop - s
    streamed()
