"""S2 and S3: batch normalisation over a mini-batch and its backward in closed form (docs/derivations.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .._core import arrays, check, dispatch, outputs
from .._core.dlpack import interchange

Array = Any


@dataclass(frozen=True)
class BatchNorm:
    """What `batch_norm` computed.

    y: x's shape, dtype and kind. mean, var (1/m) and rstd = 1/√(var + eps): (C,), or () for `channel_axis=None`, in
    float32 for half precision and in x's dtype otherwise.
    """

    y: Array
    mean: Array
    var: Array
    rstd: Array


@dataclass(frozen=True)
class BatchNormGradients:
    """What `batch_norm_backward` computed.

    dx: x's shape, dtype and kind. dgamma, dbeta, dvar and dmean: as `BatchNorm.mean`. dx_hat = ∂ℓ/∂x̂, x's shape, costs a
    pass of its own and is there only when it was asked for.
    """

    dx: Array
    dgamma: Array
    dbeta: Array
    dvar: Array
    dmean: Array
    dx_hat: Array | None = None


@interchange
def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int | None = 1,
) -> BatchNorm:
    """y = γ (x - μ)/√(σ² + ε) + β, with μ and σ² over all values of a channel (docs/derivations.md, section 2.1).

    x: NumPy, CuPy or torch array of float16, bfloat16, float32 or float64. gamma, beta: (C,) floating arrays of the same
    kind, or None for 1 and 0. channel_axis: 1 for (N, C, …), -1 for (B, W, H, C), None for one variable x_1…x_m; then
    gamma and beta have shape () or (1,).

    Raises TypeError for kinds and dtypes, ValueError for shapes, an empty mini-batch and eps < 0.
    """
    C = _operands(x, gamma, beta, eps, channel_axis)
    channel_axis = None if channel_axis is None else int(channel_axis)
    y, y_folded = outputs.output_like(x, channel_axis)
    acc = arrays.accumulate_dtype(x)
    mean, var, rstd = (outputs.empty(shape, acc, x) for shape in ((2, C), (C,), (C,)))
    which = dispatch.backend(x)
    operands = outputs.fold(x, channel_axis), _flat(gamma), _flat(beta), y_folded, mean, var, rstd, None, None
    with dispatch.launch_scope(x):
        dispatch.batch_norm(which).forward(*map(dispatch.kernel_view(which), operands), eps=float(eps), momentum=0.0)
    shape = () if channel_axis is None else (C,)
    return BatchNorm(y, mean[0].reshape(shape), var.reshape(shape), rstd.reshape(shape))


@interchange
def batch_norm_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    *,
    eps: float = 1e-5,
    channel_axis: int | None = 1,
    return_dx_hat: bool = False,
) -> BatchNormGradients:
    """Gradients of ℓ with respect to x, γ, β, σ² and μ from ∂ℓ/∂y (docs/derivations.md, sections 2.2 and 2.3).

    dy: x's shape, dtype and kind. mean, var: what `batch_norm` returned for x. Other arguments as there. `dvar` and `dmean`
    come from the two sums that dgamma and dbeta are; Σ (x - μ) counts as zero. `return_dx_hat` adds ∂ℓ/∂x̂ = γ ∂ℓ/∂y.

    Raises TypeError for kinds and dtypes, ValueError for shapes and eps < 0.
    """
    C = _operands(x, gamma, None, eps, channel_axis)
    channel_axis, eps = None if channel_axis is None else int(channel_axis), float(eps)
    check.boolean(return_dx_hat, "return_dx_hat")
    arrays.same_kind(dy, "dy", x, "x")
    check.same_dtype(dy, "dy", x, "x")
    check.same_shape(dy, "dy", x, "x")
    mean = _channel_vector(mean, "mean", x, C, channel_axis)
    var = _channel_vector(var, "var", x, C, channel_axis)
    acc = arrays.accumulate_dtype(x)
    dx, dx_folded = outputs.output_like(x, channel_axis)
    dgamma, dbeta = (outputs.empty((C,), acc, x) for _ in range(2))
    with np.errstate(all="ignore"):  # of a variance that is none, as in the kernels
        rstd = arrays.cast(1.0 / (arrays.cast(_flat(var), "float64") + eps) ** 0.5, acc)
    mean_pair = outputs.empty((2, C), acc, x)
    mean_pair[0] = _flat(mean)
    mean_pair[1] = 0
    which = dispatch.backend(x)
    folded = outputs.fold(dy, channel_axis), outputs.fold(x, channel_axis)
    with dispatch.launch_scope(x):
        dispatch.batch_norm(which).backward(
            *map(dispatch.kernel_view(which), (*folded, mean_pair, rstd, _flat(gamma), dx_folded, dgamma, dbeta))
        )
    shape = () if channel_axis is None else (C,)
    dvar, dmean = (arrays.cast(v, acc).reshape(shape) for v in _statistics_gradients(var, gamma, dgamma, dbeta, eps))
    dx_hat = _dx_hat(dy, gamma, channel_axis) if return_dx_hat else None
    return BatchNormGradients(dx, dgamma.reshape(shape), dbeta.reshape(shape), dvar, dmean, dx_hat)


@np.errstate(all="ignore")
def _statistics_gradients(var: Array, gamma: Array | None, dgamma: Array, dbeta: Array, eps: float) -> tuple[Array, Array]:
    """∂ℓ/∂σ² and ∂ℓ/∂μ in float64: a few numbers, whose products should not round twice."""
    var, dgamma, dbeta = (arrays.cast(_flat(v), "float64") for v in (var, dgamma, dbeta))
    rstd = 1.0 / (var + eps) ** 0.5
    scale = rstd if gamma is None else rstd * arrays.cast(_flat(gamma), "float64")
    return -0.5 * rstd * scale * dgamma, -scale * dbeta


def _operands(x: Array, gamma: Array | None, beta: Array | None, eps: float, channel_axis: int | None) -> int:
    """Checks what forward and backward share; the number of channels."""
    arrays.kind(x, "x")
    check.floating(x, "x")
    if channel_axis is None:
        C = 1
    else:
        check.rank_at_least(x, "x", 2, "samples and channels; channel_axis=None takes one variable")
        C = x.shape[check.axis(channel_axis, "channel_axis", x, "x")]
    if 0 in x.shape:
        raise ValueError(f"x: expected at least one value per channel, got shape {check.shape_of(x)}")
    check.at_least_zero(eps, "eps")
    for v, name in ((gamma, "gamma"), (beta, "beta")):
        if v is not None:
            _channel_vector(v, name, x, C, channel_axis)
    return C


def _channel_vector(v: Array, name: str, x: Array, C: int, channel_axis: int | None) -> Array:
    arrays.same_kind(v, name, x, "x")
    check.floating(v, name)
    if not (channel_axis is None and tuple(v.shape) == ()):
        check.shape(v, name, (C,), "one number per channel of x")
    return v


def _flat(v: Array | None) -> Array | None:
    """A number a channel with unit stride, as the kernels walk it."""
    return None if v is None else arrays.contiguous(v.reshape(-1))


def _dx_hat(dy: Array, gamma: Array | None, channel_axis: int | None) -> Array:
    if gamma is None:
        return arrays.cast(dy, arrays.dtype_name(dy)) + 0
    shape = [1] * dy.ndim
    if channel_axis is not None:
        shape[channel_axis] = -1
    acc = arrays.accumulate_dtype(dy)
    return arrays.cast(arrays.cast(dy, acc) * arrays.cast(gamma, acc).reshape(shape), arrays.dtype_name(dy))
