"""Batch normalisation with a residual, a ReLU and its mask, where the values of a channel lie in planes.

A plane is gone through in pieces of `RUN` values, whose bits are whole bytes of the mask: those of x[n, c, s:] begin at byte
(n C + c) ceil(S / 8) + s / 8. What the mask lets through of a piece of dy stands in scratch, or in dresidual, for the loops of
`planes.py`. A residual, a mask or a dresidual that is not given is empty.
"""

from __future__ import annotations

import numpy as np

from .._numba.compile import inline, kernel
from .._numba.elements import load, store
from .._numba.simd import streamed
from .._numba.views import copy, gather, place, plane_of, prefix, scatter
from .mask import bits_at, bytes_for, let_through, put_bits
from .planes import RUN, START, _apply_run, _goes_around, _gradient_sums, _gradients_of_channels, _scratch, _statistics
from .statistics import add_to, sums_of


# ---------------------------------------------------------------------------------------------- one piece
@inline
def _add_run(x, mean, rest, scale, beta, residual, y):
    for i in range(x.size):
        store(y, i, (((load(x, i) - mean) - rest) * scale + beta) + load(residual, i))


@inline
def _add_relu_run(x, mean, rest, scale, beta, residual, y, zero, on):
    """NaN passes, as in PyTorch."""
    for i in range(x.size):
        value = (((load(x, i) - mean) - rest) * scale + beta) + load(residual, i)
        passes = not value <= zero
        on[i] = passes
        store(y, i, value if passes else zero)


@inline
def _scale_run(dy, scale, dx):
    for i in range(dy.size):
        store(dx, i, load(dy, i) * scale)


# ---------------------------------------------------------------------------------------------- values s0…s1-1 of a plane
@inline
def _bits_of(mask, x, n, c, s, size):
    return bits_at(mask, (n * x.shape[1] + c) * bytes_for(x.shape[2]) + s // 8, size)


@inline
def _forward_scratch(x, residual, y):
    """Room for runs of each that are not adjacent, zeros in the place of no residual, and a number for each bit."""
    zeros = _scratch(residual) if residual.size else np.zeros(RUN, residual.dtype)
    return _scratch(x), zeros, _scratch(y), np.empty(RUN, np.uint8)


@inline
def _backward_scratch(dy, x, dx, dresidual):
    """Room for runs of each that are not adjacent; for dresidual always, where what passes stands if it is not given."""
    return _scratch(dy), _scratch(x), _scratch(dx), np.empty(RUN, dresidual.dtype)


@inline
def _normalize(x, n, c, s0, s1, mean, scale, beta, residual, y, mask, scratch):
    x_scratch, residual_scratch, y_scratch, on = scratch
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        x_run, y_run = gather(plane_of(x, n, c, s, end), x_scratch), place(plane_of(y, n, c, s, end), y_scratch)
        if residual.size:
            rest = gather(plane_of(residual, n, c, s, end), residual_scratch)
        else:
            rest = prefix(residual_scratch, end - s)
        if mask.size:
            _add_relu_run(x_run, mean[0, c], mean[1, c], scale, beta, rest, y_run, mean.dtype.type(0), on)
            put_bits(on, end - s, _bits_of(mask, x, n, c, s, end - s))
        else:
            _add_run(x_run, mean[0, c], mean[1, c], scale, beta, rest, y_run)
        scatter(plane_of(y, n, c, s, end), y_scratch)


@inline
def _passed(dy, x, n, c, s, end, mask, out, dy_scratch):
    """`out`: dy[n, c, s:end] as far as the mask lets it through."""
    dy_run = gather(plane_of(dy, n, c, s, end), dy_scratch)
    if mask.size:
        let_through(dy_run, _bits_of(mask, x, n, c, s, end - s), out)
    else:
        copy(dy_run, out)


@inline
def _add_gradients(dy, x, n, c, s0, s1, mask, mean, sums, j, scratch):
    dy_scratch, x_scratch, _, passed_scratch = scratch
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        passed = prefix(passed_scratch, end - s)
        _passed(dy, x, n, c, s, end, mask, passed, dy_scratch)
        x_run = gather(plane_of(x, n, c, s, end), x_scratch)
        pair = _gradient_sums(passed, x_run, mean[0, c], mean[1, c])
        add_to(sums, j, pair[0], pair[1])


@inline
def _apply(dy, x, n, c, s0, s1, mask, mean, scale, b, k, trained, dx, dresidual, scratch):
    dy_scratch, x_scratch, dx_scratch, passed_scratch = scratch
    around = _goes_around(dx)
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        if dresidual.size:
            passed = place(plane_of(dresidual, n, c, s, end), passed_scratch)
        else:
            passed = prefix(passed_scratch, end - s)
        _passed(dy, x, n, c, s, end, mask, passed, dy_scratch)
        dx_run = place(plane_of(dx, n, c, s, end), dx_scratch)
        if trained:
            x_run = gather(plane_of(x, n, c, s, end), x_scratch)
            _apply_run(passed, x_run, mean[0, c], mean[1, c], scale, b, k, dx_run, around)
        else:
            _scale_run(passed, scale, dx_run)
        scatter(plane_of(dx, n, c, s, end), dx_scratch)
        if dresidual.size:
            scatter(plane_of(dresidual, n, c, s, end), passed_scratch)


# ---------------------------------------------------------------------------------------------- whole channels
@kernel
def forward(
    first, last, group, x, gamma, beta, residual, y, mask, mean, var, rstd, running_mean, running_var, eps, momentum
):  # fmt: skip
    N, C, S = x.shape
    scratch = _forward_scratch(x, residual, y)
    shift, sums = np.empty(group), np.empty((2, 2, group))
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        _statistics(x, c0, c1, shift, sums, mean, var, rstd, running_mean, running_var, eps, momentum, scratch[0])
        for n in range(N):
            for c in range(c0, c1):
                _normalize(x, n, c, START, S, mean, rstd[c] * gamma[c], beta[c], residual, y, mask, scratch)


@kernel
def backward(first, last, group, dy, x, mask, mean, rstd, gamma, dx, dresidual, dgamma, dbeta):
    N, C, S = x.shape
    m = np.float64(N * S)
    scratch = _backward_scratch(dy, x, dx, dresidual)
    sums, b, k = np.empty((2, 2, group)), np.empty(group, rstd.dtype), np.empty(group, rstd.dtype)
    for block in range(first, last):
        c0, c1 = block * group, min(block * group + group, C)
        sums[:] = 0.0
        for n in range(N):
            for c in range(c0, c1):
                _add_gradients(dy, x, n, c, START, S, mask, mean, sums, c - c0, scratch)
        _gradients_of_channels(sums, c0, c1, m, rstd, dgamma, dbeta, b, k)
        for n in range(N):
            for c in range(c0, c1):
                j, scale = c - c0, rstd[c] * gamma[c]
                _apply(dy, x, n, c, START, S, mask, mean, scale, b[j], k[j], True, dx, dresidual, scratch)
    streamed()


# ---------------------------------------------------------------------------------------------- split
# The pieces of a channel are N ceil(S / RUN); block b is pieces b / blocks … (b + 1) / blocks of them, of every channel.
@kernel
def normalize(first, last, blocks, x, mean, scale, beta, residual, y, mask):
    N, C, S = x.shape
    runs = -(-S // RUN)
    scratch = _forward_scratch(x, residual, y)
    for block in range(first, last):
        u, end = N * runs * block // blocks, N * runs * (block + 1) // blocks
        while u < end:
            n, s, count = u // runs, u % runs * RUN, min(runs - u % runs, end - u)
            for c in range(C):
                _normalize(x, n, c, s, min(S, s + count * RUN), mean, scale[c], beta[c], residual, y, mask, scratch)
            u += count


@kernel
def gradient_sums(first, last, dy, x, mask, mean, partial):
    """partial (blocks, 2, C): sum dy and sum dy (x - mean) of every block, of the dy that passes."""
    N, C, S = x.shape
    blocks, runs = partial.shape[0], -(-S // RUN)
    scratch = _backward_scratch(dy, x, x, dy)
    pieces = np.empty((2, 2, C))
    for block in range(first, last):
        u, end = N * runs * block // blocks, N * runs * (block + 1) // blocks
        pieces[:] = 0.0
        while u < end:
            n, s, count = u // runs, u % runs * RUN, min(runs - u % runs, end - u)
            for c in range(C):
                _add_gradients(dy, x, n, c, s, min(S, s + count * RUN), mask, mean, pieces, c, scratch)
            u += count
        for c in range(C):
            partial[block, 0, c], partial[block, 1, c] = sums_of(pieces, c)


@kernel
def apply(first, last, blocks, dy, x, mask, mean, scale, b, k, trained, dx, dresidual):
    """dx = scale (dy - b - (x - mean) k), or scale dy, of the dy that passes."""
    N, C, S = x.shape
    runs = -(-S // RUN)
    scratch = _backward_scratch(dy, x, dx, dresidual)
    for block in range(first, last):
        u, end = N * runs * block // blocks, N * runs * (block + 1) // blocks
        while u < end:
            n, s, count = u // runs, u % runs * RUN, min(runs - u % runs, end - u)
            for c in range(C):
                stop = min(S, s + count * RUN)
                _apply(dy, x, n, c, s, stop, mask, mean, scale[c], b[c], k[c], trained, dx, dresidual, scratch)
            u += count
    streamed()
