"""The kernels of cross entropy on the CPU without options but class weights and smoothing: rows first…last - 1 of (N, S).

Formulas and symbols are those of `cross_entropy.py`. A row whose elements are not adjacent is copied first (`gather`), and its
gradient is copied back (`scatter`), so that the functions of one row have adjacent elements. `_class_gradient` is the gradient
by a class target, `_soft_gradient` by probabilities. Both take exp(z - m) from `exps`: the row where it has just been stored,
or (z, m, the row to fetch meanwhile), to compute it once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

from .._numba.compile import inline, kernel, overload
from .._numba.elements import atomic_min, load
from .._numba.exp import exp
from .._numba.simd import Lanes, first_lanes, load_lanes, load_lanes_like, prefetch, streamed, times, width, with_lane, write
from .._numba.views import borrowed, bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from .._rows import exp_and_sum_minus_1, exps_workspace, fill, row_max, sum_exp_minus_1_of_logits, sum_of_row, sums_of_row
from .reduction import class_weight


# ---------------------------------------------------------------------------------------------- exp(z - m) of a vector
@inline
def _stored(i, e) -> Lanes:
    return load_lanes(e, i, width(e), 0.0)


@inline
def _computed(i, exist, args) -> Lanes:
    z, m, ahead = args
    prefetch(ahead, i)
    return exp(load_lanes(z, i, exist, 0.0) - m)


def _exp(i: Any, exist: Any, exps: Any) -> Any:
    """A vector of exp(z - m) from `exps`: a row made by `exps_workspace`, or (z, m, the row to fetch meanwhile)."""
    return _stored(i, exps)


@overload(_exp)
def _choose_exp(i, exist, exps) -> Callable[..., Any]:
    if isinstance(exps, types.Array):
        return lambda i, exist, exps: _stored(i, exps)
    return lambda i, exist, exps: _computed(i, exist, exps)


# ---------------------------------------------------------------------------------------------- a row, of a class t
@inline
def _weighted(i, exist, args) -> Lanes:
    z, m, weight = args
    return times(load_lanes(weight, i, exist, 0.0), load_lanes(z, i, exist, 0.0) - m)


@inline
def _class_loss(z, m, sum_exp_minus_1, t, q_t, uniform, W, weight) -> float:
    """W (lse - m) - q_t (z_t - m) - uniform sum_c w_c (z_c - m): q_c = uniform w_c, and q_t more at the target."""
    loss = W * math.log1p(sum_exp_minus_1)
    if q_t != 0.0:
        loss -= q_t * np.float64(load(z, t) - m)
    if uniform != 0.0:
        loss -= uniform * sum_of_row(z, _weighted, (z, m, weight), z)
    return loss


@inline
def gradient_at_target(e_t, sum_exp_minus_1, q_t, W) -> float:
    """W p_t - q_t without the difference p_t - 1, whose digits are lost where p_t -> 1."""
    return (W - q_t) - W * ((sum_exp_minus_1 + (1.0 - e_t)) / (1.0 + sum_exp_minus_1))


def gradient(e: Any, scale: Any, q: Any) -> Any:
    """dz = g (W p - q) = scale e - g q, of numbers or of vectors of them: docs/derivations.md, (3.12).

    e = exp(z - m), scale = g W / sum e; q has the factor g already, and is None where it is 0.
    """


@overload(gradient)
def _choose_gradient(e, scale, q) -> Callable[..., Any]:
    return (lambda e, scale, q: e * scale) if q == types.none else (lambda e, scale, q: e * scale - q)


@inline
def _of_a_class(i, exist, args) -> Lanes:
    """dz of a vector, and `at_target` in the place of the target's."""
    exps, scale, t, at_target = args
    return with_lane(gradient(_exp(i, exist, exps), scale, None), t - i, at_target)


@inline
def _of_a_smoothed_class(i, exist, args) -> Lanes:
    """As `_of_a_class`; q_c = shift w_c."""
    exps, scale, t, at_target, shift, weight = args
    return with_lane(gradient(_exp(i, exist, exps), scale, load_lanes(weight, i, exist, 0.0) * shift), t - i, at_target)


@inline
def _class_gradient(exps, e_t, sum_exp_minus_1, t, q_t, uniform, W, g, weight, dz, around) -> None:
    """`gradient` of a row, p_c = exp(z_c - m) / (1 + sum_exp_minus_1)."""
    of = weight.dtype.type
    scale = of(g * W / (1.0 + sum_exp_minus_1))
    at_target = g * gradient_at_target(np.float64(e_t), sum_exp_minus_1, q_t, W)
    if uniform == 0.0:
        write(dz, around, _of_a_class, (exps, scale, t, of(at_target)))
    else:
        at_target -= g * uniform * weight[t]
        write(dz, around, _of_a_smoothed_class, (exps, scale, t, of(at_target), of(g * uniform), weight))


# ---------------------------------------------------------------------------------------------- a row, of probabilities y
@inline
def _q(i, exist, args) -> Lanes:
    """q_c = w_c (keep y_c + uniform) of a vector; 0 in lanes that do not exist."""
    y, keep, uniform, weight = args
    q = first_lanes(load_lanes_like(y, i, exist, 0.0, weight) * keep + uniform, exist)
    return q * load_lanes(weight, i, exist, 0.0) if weight.size else q


@inline
def _q_and_product(i, exist, args) -> tuple[Lanes, Lanes]:
    z, m, of_q = args
    q = _q(i, exist, of_q)
    return q, times(q, load_lanes(z, i, exist, 0.0) - m)


@inline
def _soft_sums(z, y, m, smoothing, weight, ahead) -> tuple[float, float]:
    """W = sum q and sum q (z - m) of a row. Meanwhile fetches the row `ahead` of y."""
    of = weight.dtype.type
    return sums_of_row(z, _q_and_product, (z, m, (y, of(1.0 - smoothing), of(smoothing / z.size), weight)), ahead)


@inline
def _of_probabilities(i, exist, args) -> Lanes:
    exps, scale, of_q = args
    return gradient(_exp(i, exist, exps), scale, _q(i, exist, of_q))


@inline
def _soft_gradient(exps, sum_exp_minus_1, y, W, g, smoothing, weight, dz, around) -> None:
    """As `_class_gradient`."""
    of = weight.dtype.type
    scale, keep, uniform = of(g * W / (1.0 + sum_exp_minus_1)), of(g * (1.0 - smoothing)), of(g * smoothing / dz.size)
    write(dz, around, _of_probabilities, (exps, scale, (y, keep, uniform, weight)))


# ---------------------------------------------------------------------------------------------- kernels, hard targets
@kernel
def _hard_forward(first, last, z, target, weight, loss, stats, invalid, ignore_index, smoothing, weight_sum) -> None:
    """Reads z, writes loss and stats: m, sum exp(z - m) - 1 and W. weight_sum: sum_c w_c, where smoothing needs it."""
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch = smoothing / V, row_scratch(z)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m = row_max(z_row)
            sum_exp_minus_1 = sum_exp_minus_1_of_logits(z_row, m, prefetch_row(z, row, last, z_row))
            q_t = (1.0 - smoothing) * class_weight(weight, t)
            W = q_t + uniform * weight_sum
            loss[n, s] = _class_loss(z_row, m, sum_exp_minus_1, t, q_t, uniform, W, weight)
            stats[0, n, s], stats[1, n, s], stats[2, n, s] = m, sum_exp_minus_1, W
        else:
            loss[n, s], stats[:, n, s] = 0.0 if t == ignore_index else math.nan, 0.0
            if t != ignore_index:
                atomic_min(invalid, row)
    release(z_scratch)


@kernel
def _hard_backward(
    first, last, z, target, weight, stats, upstream, denominator, dz, unless_one, ignore_index, smoothing
) -> None:  # fmt: skip
    """Reads z and stats, writes dz for g = upstream / denominator; `unless_one` passes over rows with an upstream of 1."""
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch, dz_scratch, around = smoothing / V, row_scratch(z), row_scratch(dz), bypasses_cache(dz)
    over = denominator[0] if denominator.size else 1.0
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            sum_exp_minus_1, W = np.float64(stats[1, n, s]), np.float64(stats[2, n, s])
            q_t, g = (1.0 - smoothing) * class_weight(weight, t), np.float64(upstream[n, s]) / over
            m, ahead = stats[0, n, s], prefetch_row(z, row, last, z_row)
            exps, e_t = (z_row, m, ahead), exp(load(z_row, t) - m)
            _class_gradient(exps, e_t, sum_exp_minus_1, t, q_t, uniform, W, g, weight, dz_row, around)
        else:
            fill(dz_row, 0.0 if t == ignore_index else math.nan)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(dz_scratch)


@kernel
def _hard_forward_backward(first, last, z, target, weight, loss, dz, invalid, g, ignore_index, smoothing, weight_sum) -> None:
    """Reads z, writes loss and dz for one g of all rows; each exponential is computed once."""
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch, dz_scratch, around = smoothing / V, row_scratch(z), row_scratch(dz), bypasses_cache(dz)
    exps = exps_workspace(V, weight)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m = row_max(z_row)
            sum_exp_minus_1 = exp_and_sum_minus_1(z_row, m, exps, prefetch_row(z, row, last, z_row))
            q_t = (1.0 - smoothing) * class_weight(weight, t)
            W = q_t + uniform * weight_sum
            loss[n, s] = _class_loss(z_row, m, sum_exp_minus_1, t, q_t, uniform, W, weight)
            _class_gradient(exps, exps[t], sum_exp_minus_1, t, q_t, uniform, W, g, weight, dz_row, around)
        else:
            loss[n, s] = 0.0 if t == ignore_index else math.nan
            fill(dz_row, loss[n, s])
            if t != ignore_index:
                atomic_min(invalid, row)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(dz_scratch)
    release(exps)


# ---------------------------------------------------------------------------------------------- kernels, soft targets
@kernel
def _soft_forward(first, last, z, y, weight, loss, stats, smoothing) -> None:
    """As `_hard_forward`, of probabilities y, which it reads too."""
    S, weight = z.shape[2], borrowed(weight)
    z_scratch, y_scratch = row_scratch(z), row_scratch(y)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        m = row_max(z_row)
        sum_exp_minus_1 = sum_exp_minus_1_of_logits(z_row, m, prefetch_row(z, row, last, z_row))
        W, dot = _soft_sums(z_row, y_row, m, smoothing, weight, prefetch_row(y, row, last, y_row))
        loss[n, s] = W * math.log1p(sum_exp_minus_1) - dot
        stats[0, n, s], stats[1, n, s], stats[2, n, s] = m, sum_exp_minus_1, W
    release(z_scratch)
    release(y_scratch)


@kernel
def _soft_backward(first, last, z, y, weight, stats, upstream, denominator, dz, unless_one, smoothing) -> None:
    """As `_hard_backward`, of probabilities y, which it reads too."""
    S, weight = z.shape[2], borrowed(weight)
    z_scratch, y_scratch, dz_scratch, around = row_scratch(z), row_scratch(y), row_scratch(dz), bypasses_cache(dz)
    over = denominator[0] if denominator.size else 1.0
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        sum_exp_minus_1, W = np.float64(stats[1, n, s]), np.float64(stats[2, n, s])
        g = np.float64(upstream[n, s]) / over
        exps = (z_row, stats[0, n, s], prefetch_row(z, row, last, z_row))
        _soft_gradient(exps, sum_exp_minus_1, y_row, W, g, smoothing, weight, dz_row, around)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(y_scratch)
    release(dz_scratch)


@kernel
def _soft_forward_backward(first, last, z, y, weight, loss, dz, g, smoothing) -> None:
    """As `_hard_forward_backward`, of probabilities y, which it reads too."""
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    z_scratch, y_scratch, dz_scratch, around = row_scratch(z), row_scratch(y), row_scratch(dz), bypasses_cache(dz)
    exps = exps_workspace(V, weight)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        m = row_max(z_row)
        sum_exp_minus_1 = exp_and_sum_minus_1(z_row, m, exps, prefetch_row(z, row, last, z_row))
        W, dot = _soft_sums(z_row, y_row, m, smoothing, weight, prefetch_row(y, row, last, y_row))
        loss[n, s] = W * math.log1p(sum_exp_minus_1) - dot
        _soft_gradient(exps, sum_exp_minus_1, y_row, W, g, smoothing, weight, dz_row, around)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(y_scratch)
    release(dz_scratch)
    release(exps)
