"""Cross entropy of one row, all of it adjacent in memory: its loss and its gradient, of a class or of probabilities.

The formulas and their symbols are those of `cross_entropy.py`. The functions named `..._of_logits` compute the exponentials
again; the others find them in a row of their own.
"""

from __future__ import annotations

import math

import numpy as np

from .._numba.compile import inline
from .._numba.elements import load
from .._numba.exp import exp
from .._numba.simd import Lanes, first_lanes, load_lanes, load_lanes_like, prefetch, times, width, with_lane, write
from .._rows import sum_of_row, sums_of_row


# ---------------------------------------------------------------------------------------------- of a class
@inline
def class_weight(weight, t) -> float:
    return np.float64(weight[t]) if weight.size else 1.0


@inline
def _weighted(i, exist, args) -> Lanes:
    z, m, weight = args
    return times(load_lanes(weight, i, exist, 0.0), load_lanes(z, i, exist, 0.0) - m)


@inline
def hard_loss(z, m, sum_exp_minus_1, t, q, uniform, W, weight) -> float:
    """q and `uniform` are the parts of q_t and of every q_c / w_c."""
    loss = W * math.log1p(sum_exp_minus_1)
    if q != 0.0:
        loss -= q * np.float64(load(z, t) - m)
    if uniform != 0.0:
        loss -= uniform * sum_of_row(z, _weighted, (z, m, weight), z)
    return loss


@inline
def _at_target(e_t, sum_exp_minus_1, q, W, g) -> float:
    """g (W p_t - q) without the difference p_t - 1, whose digits are lost where p_t -> 1."""
    return g * ((W - q) - W * ((sum_exp_minus_1 + (1.0 - e_t)) / (1.0 + sum_exp_minus_1)))


@inline
def _of_exps(i, exist, args) -> Lanes:
    e, scale, t, at_target = args
    return with_lane(load_lanes(e, i, width(e), 0.0) * scale, t - i, at_target)


@inline
def _of_exps_and_weights(i, exist, args) -> Lanes:
    e, scale, t, at_target, shift, weight = args
    return with_lane(load_lanes(e, i, width(e), 0.0) * scale - load_lanes(weight, i, exist, 0.0) * shift, t - i, at_target)


@inline
def hard_gradient(e, sum_exp_minus_1, t, q, uniform, W, g, weight, dz, around) -> None:
    """dz from e = exp(z - m) and its sum - 1."""
    of = weight.dtype.type
    scale = of(g * W / (1.0 + sum_exp_minus_1))
    at_target = _at_target(np.float64(e[t]), sum_exp_minus_1, q, W, g)
    if uniform == 0.0:
        write(dz, around, _of_exps, (e, scale, t, of(at_target)))
    else:
        at_target -= g * uniform * weight[t]
        write(dz, around, _of_exps_and_weights, (e, scale, t, of(at_target), of(g * uniform), weight))


@inline
def _of_logits(i, exist, args) -> Lanes:
    z, m, scale, t, at_target, ahead = args
    prefetch(ahead, i)
    return with_lane(exp(load_lanes(z, i, exist, 0.0) - m) * scale, t - i, at_target)


@inline
def _of_logits_and_weights(i, exist, args) -> Lanes:
    z, m, scale, t, at_target, shift, weight = args
    dz = exp(load_lanes(z, i, exist, 0.0) - m) * scale - load_lanes(weight, i, exist, 0.0) * shift
    return with_lane(dz, t - i, at_target)


@inline
def hard_gradient_of_logits(z, m, sum_exp_minus_1, t, q, uniform, W, g, weight, dz, around, ahead) -> None:
    """dz from the logits in one sweep, where m and sum exp(z - m) - 1 are known."""
    of = weight.dtype.type
    scale = of(g * W / (1.0 + sum_exp_minus_1))
    at_target = _at_target(np.float64(exp(load(z, t) - m)), sum_exp_minus_1, q, W, g)
    if uniform == 0.0:
        write(dz, around, _of_logits, (z, m, scale, t, of(at_target), ahead))
    else:
        at_target -= g * uniform * weight[t]
        write(dz, around, _of_logits_and_weights, (z, m, scale, t, of(at_target), of(g * uniform), weight))


# ---------------------------------------------------------------------------------------------- of probabilities
@inline
def _probabilities(i, exist, args) -> Lanes:
    """q of a vector; 0 in lanes that do not exist."""
    y, keep, uniform, weight = args
    q = first_lanes(load_lanes_like(y, i, exist, 0.0, weight) * keep + uniform, exist)
    return q * load_lanes(weight, i, exist, 0.0) if weight.size else q


@inline
def _q_and_product(i, exist, args) -> tuple[Lanes, Lanes]:
    z, m, of_probabilities = args
    q = _probabilities(i, exist, of_probabilities)
    return q, times(q, load_lanes(z, i, exist, 0.0) - m)


@inline
def soft_sums(z, y, m, smoothing, weight, ahead) -> tuple[float, float]:
    """W and sum q (z - m) of a row. Meanwhile fetches the row `ahead` of y."""
    of = weight.dtype.type
    return sums_of_row(z, _q_and_product, (z, m, (y, of(1.0 - smoothing), of(smoothing / z.size), weight)), ahead)


@inline
def _minus_probabilities(i, exist, args) -> Lanes:
    e, scale, of_probabilities = args
    return load_lanes(e, i, width(e), 0.0) * scale - _probabilities(i, exist, of_probabilities)


@inline
def soft_gradient(e, sum_exp_minus_1, y, W, g, smoothing, weight, dz, around) -> None:
    """dz from e = exp(z - m) and its sum - 1."""
    of = weight.dtype.type
    scale, keep, uniform = of(g * W / (1.0 + sum_exp_minus_1)), of(g * (1.0 - smoothing)), of(g * smoothing / dz.size)
    write(dz, around, _minus_probabilities, (e, scale, (y, keep, uniform, weight)))


@inline
def _exp_minus_probabilities(i, exist, args) -> Lanes:
    z, m, scale, of_probabilities, ahead = args
    prefetch(ahead, i)
    return exp(load_lanes(z, i, exist, 0.0) - m) * scale - _probabilities(i, exist, of_probabilities)


@inline
def soft_gradient_of_logits(z, m, sum_exp_minus_1, y, W, g, smoothing, weight, dz, around, ahead) -> None:
    """dz from the logits in one sweep, where m and sum exp(z - m) - 1 are known."""
    of = weight.dtype.type
    scale, keep, uniform = of(g * W / (1.0 + sum_exp_minus_1)), of(g * (1.0 - smoothing)), of(g * smoothing / z.size)
    write(dz, around, _exp_minus_probabilities, (z, m, scale, (y, keep, uniform, weight), ahead))
