"""Rows of cross entropy with everything that may be asked of them: z-loss, softcap, a scale, six statistics, and the gradient.

`cross_entropy` has shorter loops for rows of which nothing of this is asked. Here each row is first made three adjacent rows
of the precision of the sums, which stay in the nearest caches:

    u_c = kappa z_c, or tau tanh(kappa z_c / tau),   q_c = what every class has of the target,   e_c = exp(u_c - m)

so that class targets and probabilities share what follows. The backward pass takes m, sum e - 1 and W from `stats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, kernel, overload, reduction
from .._numba.elements import atomic_min, load, store
from .._numba.exp import exp
from .._numba.views import gather, release, row_buffer, row_of, row_scratch, scatter
from .._rows import CHUNK, exp_and_sum_minus_1, exps_workspace, fill, row_max
from .kernels import gradient, gradient_at_target

_SERIES = tuple(np.float32(c) for c in (1 / 3, 2 / 15, 17 / 315, 62 / 2835, 1382 / 155925))
_ONE, _ZERO, _MINUS_TWO, _FAR, _SMALL = (np.float32(c) for c in (1.0, 0.0, -2.0, 0.25, 0.0625))


def tanh(x: Any) -> Any:
    """tanh x to a few units in the last place; in float32 without a branch, so that a loop over it becomes packed."""
    return math.tanh(x)


@overload(tanh)
def _tanh(x) -> Callable[..., Any]:
    if x == types.float64:
        return lambda x: math.tanh(x)

    def of_float32(x) -> Any:
        # 1 - exp(-2 |x|) would lose its digits near 0
        x2 = x * x
        u = exp(_MINUS_TWO * abs(x))
        tail = _SERIES[2] - x2 * (_SERIES[3] - x2 * _SERIES[4])
        series = abs(x) * (_ONE - x2 * (_SERIES[0] - x2 * (_SERIES[1] - x2 * tail)))
        far = u < _FAR  # 1 less a little has one rounding
        t = (_ONE if far else _ZERO) + (_MINUS_TWO * u if far else _ONE - u) / (_ONE + u)
        t = series if x2 < _SMALL else t
        return -t if x < 0 else t

    return of_float32


@inline
def _logits(z, cap, logit_scale, u) -> None:
    """u from a row of logits; `cap` is 0 where there is none."""
    of = u.dtype.type
    scale = of(logit_scale)
    if cap == 0.0:
        for c in range(z.size):
            u[c] = scale * load(z, c)
    else:
        tau = of(cap)
        for c in range(z.size):
            u[c] = tau * tanh(scale * load(z, c) / tau)


@inline
def _of_probabilities(y, smoothing, weight, q) -> None:
    of = q.dtype.type
    keep, uniform = of(1.0 - smoothing), of(smoothing / q.size)
    for c in range(q.size):
        q[c] = weight[c] * (keep * load(y, c) + uniform)


@inline
def _of_a_class(smoothing, weight, q) -> None:
    """What a class target leaves to every class."""
    uniform = q.dtype.type(smoothing / q.size)
    for c in range(q.size):
        q[c] = uniform * weight[c]


@inline
def _below(u, i, m) -> float:
    return u[i] - m


@reduction
def _sums_of_chunk(u, m, q, e, first, last) -> tuple[float, float, float]:
    """sum q, sum q (u - m) and sum e (u - m) of a chunk."""
    zero = u.dtype.type(0)
    dense, inner, spread = zero, zero, zero
    for i in range(first, last):
        d = _below(u, i, m)
        dense += q[i]
        inner += zero if q[i] == zero else q[i] * d
        spread += zero if e[i] == zero else e[i] * d
    return dense, inner, spread


@inline
def _sums(u, m, q, e) -> tuple[float, float, float]:
    dense, inner, spread, chunk = 0.0, 0.0, 0.0, CHUNK
    for first in range(0, u.size, chunk):
        sums = _sums_of_chunk(u, m, q, e, first, min(first + chunk, u.size))
        dense, inner = dense + np.float64(sums[0]), inner + np.float64(sums[1])
        spread += np.float64(sums[2])
    return dense, inner, spread


@inline
def _slope(u, cap) -> float:
    """The derivative of tau tanh(z / tau) by z, from u; the difference is taken before anything else is rounded."""
    return (cap - u) * (cap + u) / (cap * cap)


@inline
def _gradient(u, q, e, scale, z_loss_scale, g, cap, dz) -> None:
    """dz = (`gradient` + z_loss_scale e) (1 - u^2 / tau^2); z_loss_scale e is added last and keeps its digits."""
    of = u.dtype.type
    scale, z_loss_scale, g = of(scale), of(z_loss_scale), of(g)
    if cap == 0.0:
        for c in range(u.size):
            store(dz, c, gradient(e[c], scale, g * q[c]) + e[c] * z_loss_scale)
    else:
        tau, over = of(cap), of(1 / (cap * cap))
        for c in range(u.size):
            slope = (tau - u[c]) * (tau + u[c]) * over
            store(dz, c, (gradient(e[c], scale, g * q[c]) + e[c] * z_loss_scale) * slope)


@inline
def _argmax(u, m) -> int:
    """The first class whose logit is m, 0 in a row with a NaN."""
    for first in range(0, u.size, CHUNK):
        last, found = min(first + CHUNK, u.size), 0
        for c in range(first, last):
            found += u[c] == m
        if found:
            for c in range(first, last):
                if u[c] == m:
                    return c
    return 0


@inline
def _row(u, q, e, t, w_t, smoothing, z_loss, cap, g, dz, row_stats, known, statistics) -> float:
    """The loss of a row, its statistics, and dz where that is not empty. t is a class, or -1 where q is all there is.

    `known` statistics are taken as they are given, and the loss is not asked for: u may be a part of the row they are of.
    """
    q_t, loss = (1.0 - smoothing) * w_t if t >= 0 else 0.0, 0.0
    m = u.dtype.type(row_stats[0]) if known else row_max(u)
    sum_exp_minus_1 = exp_and_sum_minus_1(u, m, e, u)
    if known:
        sum_exp_minus_1, W = row_stats[1], row_stats[2]
        log_total, total = math.log1p(sum_exp_minus_1), 1.0 + sum_exp_minus_1
        lse = np.float64(m) + log_total
    else:
        dense, inner, spread = _sums(u, m, q, e)
        log_total, total = math.log1p(sum_exp_minus_1), 1.0 + sum_exp_minus_1
        lse = np.float64(m) + log_total
        below = np.float64(u[t] - m) if t >= 0 else 0.0
        W = q_t + dense
        loss = W * log_total - inner
        if q_t != 0.0:
            loss -= q_t * below
        if z_loss != 0.0:
            loss += z_loss * lse * lse
        row_stats[0], row_stats[1], row_stats[2], row_stats[3] = m, sum_exp_minus_1, W, below
        row_stats[4] = log_total - spread / total
        if statistics:
            row_stats[5] = _argmax(u, m)
    if dz.size:
        of_lse = 2.0 * z_loss * lse if z_loss != 0.0 else 0.0
        _gradient(u, q, e, g * W / total, g * of_lse / total, g, cap, dz)
        if t >= 0:
            e_t = np.float64(e[t])
            at_target = gradient_at_target(e_t, sum_exp_minus_1, q_t, W) - np.float64(q[t]) + of_lse * (e_t / total)
            if cap != 0.0:
                at_target *= _slope(np.float64(u[t]), cap)
            store(dz, t, u.dtype.type(g * at_target))
    return loss


@inline
def _exchange(stats, n, s, row_stats, get, put) -> None:
    for k in range(stats.shape[0]):
        if get:
            row_stats[k] = stats[k, n, s]
        if put:
            stats[k, n, s] = row_stats[k]


@inline
def _row_without_a_class(value, dz, row_stats) -> float:
    row_stats[:] = 0.0
    fill(dz, value)
    return value


@kernel
def hard_rows(
    first, last, z, target, weight, loss, stats, known, dz, invalid, upstream, denominator, unless_one,
    ignore_index, smoothing, z_loss, cap, logit_scale,
) -> None:  # fmt: skip
    """Loss and statistics (as many rows of them as `stats` has) unless `known`, and dz unless that is empty, of classes."""
    V, S = z.shape[1], z.shape[2]
    u, q, e = np.empty(V, weight.dtype), np.empty(V, weight.dtype), exps_workspace(V, weight)
    row_stats = np.empty(6)
    z_scratch, dz_scratch = row_scratch(z), row_scratch(dz)
    _of_a_class(smoothing, weight, q)
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch) if dz.size else row_buffer(dz_scratch[:0], dz_scratch)
        if 0 <= t < V and t != ignore_index:
            _exchange(stats, n, s, row_stats, known, False)
            _logits(gather(row_of(z, n, s), z_scratch), cap, logit_scale, u)
            g, w_t = np.float64(upstream[n, s]) / denominator[0] * logit_scale, np.float64(weight[t])
            loss[n, s] = _row(u, q, e, t, w_t, smoothing, z_loss, cap, g, dz_row, row_stats, known, stats.shape[0] > 5)
        elif t == ignore_index:
            loss[n, s] = _row_without_a_class(0.0, dz_row, row_stats)
        else:
            loss[n, s] = _row_without_a_class(math.nan, dz_row, row_stats)
            atomic_min(invalid, row)
        _exchange(stats, n, s, row_stats, False, not known)
        if dz.size:
            scatter(row_of(dz, n, s), dz_scratch)
    release(z_scratch)
    release(dz_scratch)
    release(e)


@kernel
def soft_rows(
    first, last, z, y, weight, loss, stats, known, dz, upstream, denominator, unless_one, smoothing, z_loss, cap,
    logit_scale,
) -> None:  # fmt: skip
    """As `hard_rows`, of probabilities."""
    V, S = z.shape[1], z.shape[2]
    u, q, e = np.empty(V, weight.dtype), np.empty(V, weight.dtype), exps_workspace(V, weight)
    row_stats = np.empty(6)
    z_scratch, y_scratch, dz_scratch = row_scratch(z), row_scratch(y), row_scratch(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch) if dz.size else row_buffer(dz_scratch[:0], dz_scratch)
        _exchange(stats, n, s, row_stats, known, False)
        _logits(gather(row_of(z, n, s), z_scratch), cap, logit_scale, u)
        _of_probabilities(gather(row_of(y, n, s), y_scratch), smoothing, weight, q)
        g = np.float64(upstream[n, s]) / denominator[0] * logit_scale
        loss[n, s] = _row(u, q, e, -1, 0.0, smoothing, z_loss, cap, g, dz_row, row_stats, known, stats.shape[0] > 5)
        _exchange(stats, n, s, row_stats, False, not known)
        if dz.size:
            scatter(row_of(dz, n, s), dz_scratch)
    release(z_scratch)
    release(y_scratch)
    release(dz_scratch)
    release(e)
