"""Batch normalisation and activations: docs/errors.md, section 2."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference
from ..reference import Array, Extended, _extended, _ieee, _per_channel, _sigmoid, _standard_normal
from .rounding import CHANNEL, CHANNEL_SUM, EXP, MEAN, RSTD, VARIANCE, additions_of, result, times, unit_roundoff


def _of_rstd(var: Any, eps: float, additions: int) -> Any:
    """The roundings of 1 / sqrt(variance + eps) where the variance has its own."""
    return RSTD + (additions + VARIANCE) / 2.0 * np.where(var == 0.0, 0.0, var / (var + eps))


@_ieee
def batch_norm(
    x: Any, gamma: Any = None, beta: Any = None, *, eps: float = 1e-5, channel_axis: int | None = 1, dtype: str
) -> reference.BatchNorm:
    x = _extended(x)
    axes, shape, m = _per_channel(x, channel_axis)
    gamma, beta = abs(_extended(1.0 if gamma is None else gamma)), abs(_extended(0.0 if beta is None else beta))
    mean = np.asarray(np.sum(x, axis=axes) / m)
    distance = abs(x - mean.reshape(shape))
    spread = np.asarray(np.sum(distance, axis=axes) / m)
    var = np.asarray(np.sum(distance**2, axis=axes) / m)
    rstd = np.asarray(1.0 / np.sqrt(var + eps))

    additions = additions_of(m, CHANNEL)
    of_rstd = _of_rstd(var, eps, additions)
    of_mean = MEAN * spread + unit_roundoff(dtype) * abs(mean)  # the mean is kept in two parts
    x_hat = distance * rstd.reshape(shape)
    of_x_hat = x_hat * (of_rstd + 3.0).reshape(shape) + (of_mean * rstd).reshape(shape)
    y = gamma.reshape(shape) * (of_x_hat + 2.0 * x_hat) + beta.reshape(shape)
    counted = y, of_mean, (additions + VARIANCE) * var, rstd * of_rstd, of_x_hat
    return reference.BatchNorm(*(result(value, dtype) for value in counted))


@_ieee
def batch_norm_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None, *,
    eps: float = 1e-5, channel_axis: int | None = 1, dtype: str, own_statistics: bool = False,
) -> reference.BatchNormGradients:  # fmt: skip
    """`own_statistics`: mean and variance are exact here, and the kernels' own there; else both are given the same."""
    dy, x, mean, var = map(_extended, (dy, x, mean, var))
    axes, shape, m = _per_channel(x, channel_axis)
    gamma = abs(_extended(1.0 if gamma is None else gamma))
    rstd = 1.0 / np.sqrt(var + eps)
    centred = x - mean.reshape(shape)
    distance = abs(centred)
    totals, products = (np.asarray(np.sum(v, axis=axes)) for v in (abs(dy), abs(dy) * distance))

    of_rstd, of_products = np.asarray(RSTD + 0.0 * var), (CHANNEL_SUM + 3.0) * products
    if own_statistics:
        spread = np.asarray(np.sum(distance, axis=axes)) / m
        of_rstd = _of_rstd(var, eps, additions_of(m, CHANNEL))
        of_products = of_products + MEAN * spread * abs(np.sum(dy, axis=axes))
    of_dgamma = rstd * (of_products + (of_rstd + 1.0) * products)
    of_dbeta = CHANNEL_SUM * totals

    scale = gamma * rstd
    # scale ((dy - b) - (x - mean) k), b = dbeta / m, k = rstd dgamma / m
    terms = abs(dy) + (totals / m).reshape(shape) + distance * (rstd**2 * products / m).reshape(shape)
    inner = ((of_dbeta + totals) / m).reshape(shape)
    inner = inner + distance * (rstd * (of_dgamma + (of_rstd + 5.0) * rstd * products) / m).reshape(shape)
    of_dx = scale.reshape(shape) * (inner + terms * (of_rstd + 4.0).reshape(shape))
    of_dvar = 0.5 * scale * rstd * (of_dgamma + (2.0 * of_rstd + 5.0) * rstd * products)
    of_dmean = scale * (of_dbeta + (of_rstd + 4.0) * totals)
    dx_hat = abs(dy) * gamma.reshape(shape)
    results = [result(v, dtype) for v in (of_dx, of_dgamma, of_dbeta, of_dvar, of_dmean, dx_hat)]
    # Σ (x - mean), which the kernels count as 0, where the mean given is a rounded one: no rounding of theirs
    off_centre = abs(np.asarray(np.sum(centred, axis=axes))) / m
    slope = scale * rstd**2 * products / m
    results[0] = results[0] + np.asarray(slope * off_centre, dtype=np.float64).reshape(shape)
    results[4] = results[4] + np.asarray(m * slope * off_centre, dtype=np.float64)
    return reference.BatchNormGradients(*results)


@_ieee
def batch_norm_inference(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None,
    eps: float = 1e-5, channel_axis: int | None = 1, *, dtype: str,
) -> Array:  # fmt: skip
    x, mean, var = map(_extended, (x, mean, var))
    _, shape, _ = _per_channel(x, channel_axis)
    gamma, beta = abs(_extended(1.0 if gamma is None else gamma)), abs(_extended(0.0 if beta is None else beta))
    x_hat = abs(x - mean.reshape(shape)) / np.sqrt(var + eps).reshape(shape)
    return result(gamma.reshape(shape) * x_hat * (RSTD + 4.0) + beta.reshape(shape), dtype)


@_ieee
def batch_norm_inference_backward(
    dy: Any, x: Any, mean: Any, var: Any, gamma: Any = None,
    eps: float = 1e-5, channel_axis: int | None = 1, *, dtype: str,
) -> reference.BatchNormInferenceGradients:  # fmt: skip
    given = dy, x, mean, var, gamma
    trained = batch_norm_backward(*given, eps=eps, channel_axis=channel_axis, dtype=dtype)
    constant = reference.batch_norm_inference_backward(*given, eps, channel_axis)
    dx = result((RSTD + 3.0) * abs(_extended(constant.dx)), dtype)
    return reference.BatchNormInferenceGradients(dx, trained.dgamma, trained.dbeta)


@_ieee
def activation(p: Any, kind: str, *, dtype: str) -> Array:
    """Of a(p), p exact."""
    p = _extended(p)
    y = abs(_extended(reference.activation(p, kind)))
    if kind == "silu":
        return result(times(y, 6.0 + times(_sigmoid(-p), EXP + abs(p))), dtype)
    if kind == "hardswish":
        return result(5.0 * y, dtype)
    if kind == "gelu":
        return result(times(abs(p), _of_distribution(p)) + 2.0 * y, dtype)
    return result(0.0 * y, dtype)


@_ieee
def activation_backward(dy: Any, p: Any, kind: str, *, dtype: str) -> Array:
    """Of dy a'(p), p exact."""
    dy, p = abs(_extended(dy)), _extended(p)
    if kind == "silu":
        sigma, rest, e = _sigmoid(p), _sigmoid(-p), EXP + abs(p)
        product = times(rest, abs(p))
        of_product = times(product, times(sigma, e) + 7.0)
        counted = times(sigma, times(abs(1.0 + product * np.sign(p)), times(rest, e) + 9.0) + of_product)
    elif kind == "hardswish":
        counted = np.where(abs(p) < 3.0, abs(p) + 2.0, 0.0) + 1.0
    elif kind == "gelu":
        density, distribution = _standard_normal(p)
        product = times(density, abs(p))
        counted = _of_distribution(p) + times(product, EXP + 1.5 * p * p + 4.0) + 2.0 * (distribution + product)
    else:
        counted = 0.0 * p
    return result(times(counted, dy), dtype)


def _of_distribution(p: Extended) -> Extended:
    """Φ = ½ (1 + erf(p / √2)): 4 for erf, 2 for p / √2, 2 for the sum and its half."""
    density, distribution = _standard_normal(p)
    return 4.0 * abs(distribution - 0.5) + 2.0 * times(density, abs(p)) + 2.0 * distribution
