"""Batch normalisation over axes 0 and 2 of (N, C, S), on the CPU. m = N S values a channel.

    mean = sum x / m,   var = sum (x - mean)^2 / m,   rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) rstd,      y = (x - mean) (rstd gamma) + beta
    dbeta = sum dy,   dgamma = sum dy x_hat
    dx = gamma rstd (dy - dbeta / m - x_hat dgamma / m)
    fused: y = relu(x_hat gamma + beta + residual), one bit a value kept of where it is above 0; dy is 0 where it is not

    statistics, backward_reduce      read x (and dy)                    1 pass  (2)
    normalize, backward_apply        read x (and dy), write y or dx     2 passes (3)
    forward, backward                channels done whole, in cache      2 passes (3); 3 (5) where they are split
    a residual or its gradient                                          1 pass more; the mask: an eighth of a byte a value

A pass is one read or one write of the whole tensor. `mean` is kept as two numbers, mean[0] the rounded mean and mean[1] what
the rounding left, so that x - mean is right where the mean is large; y is never folded to a x + b. Sums are float64:
`_batch_norm/statistics.py` says how, `_batch_norm/planes.py`, `_batch_norm/lines.py` and `_batch_norm/tiles.py` hold the loops
for the two layouts:

    planes    S adjacent (NCHW); any other strides too, copied a piece at a time
    lines     C adjacent (channels-last), and planes too small to be a loop of their own. Of long rows of channels, and of
              several small planes, a tile is a few channels of every sample: `_batch_norm/tiles.py` does these whole

and `_batch_norm/planes_fused.py` and `_batch_norm/lines_fused.py` those with a residual or a mask (`_batch_norm/mask.py`),
whose layout that of x decides.

A call decides once which loops run and how their work is cut into blocks (`channel_plan.py`), by shapes and strides alone;
a launcher follows that plan. Blocks are merged in order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import channel_plan
from ._batch_norm import lines, lines_fused, planes, planes_fused, tiles
from ._batch_norm.statistics import better_shifts, finish_all, finish_gradients, first_means, merge
from ._numba.compile import kernel
from ._numba.elements import store, to_accumulate
from ._numba.threads import run
from .channel_plan import Pass, layout_of


# ---------------------------------------------------------------------------------------------- vectors
def _running(running: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    return np.empty(0, dtype) if running is None else to_accumulate(running, running.size, dtype, 0.0)


def _store_running(running: np.ndarray | None, new: np.ndarray) -> None:
    """Write running statistics back where they were converted to compute with."""
    if running is not None and new is not running:
        _copy_vector(new, running)


@kernel
def _copy_vector(values, out):
    for i in range(values.size):
        store(out, i, values[i])


def _check(x, mean, *of_channels, like=(), mask=None):
    """The kernels look at no bound: a wrong shape is a wrong address. `like`: what has x's shape, or is None."""
    C = x.shape[1]
    assert mean.shape == (2, C), (mean.shape, x.shape)
    for v in of_channels:
        assert v is None or v.shape == (C,), (v.shape, x.shape)
    for v in like:
        assert v is None or v.shape == x.shape, (v.shape, x.shape)
    assert mask is None or mask.nbytes == mask.size >= mask_size(x), (mask.nbytes, x.shape)


# ---------------------------------------------------------------------------------------------- passes
# The loops of a pass, by the family that its plan names.
_SUMS = {"planes": planes.sums, "lines": lines.sums, "tiles": tiles.sums}
_GRADIENT_SUMS = {"planes": planes.gradient_sums, "lines": lines.gradient_sums, "tiles": tiles.gradient_sums}
_NORMALIZE = {"planes": planes.normalize, "lines": lines.normalize, "tiles": tiles.normalize}
_APPLY = {"planes": planes.apply, "lines": lines.apply, "tiles": tiles.apply}
_FORWARD = {"planes": planes.forward, "tiles": tiles.forward}
_BACKWARD = {"planes": planes.backward, "tiles": tiles.backward}

_FUSED_GRADIENT_SUMS = {
    "planes": planes_fused.gradient_sums, "lines": lines_fused.rows_gradient_sums, "tiles": lines_fused.tile_gradient_sums
}  # fmt: skip
_FUSED_NORMALIZE = {
    "planes": planes_fused.normalize, "lines": lines_fused.rows_normalize, "tiles": lines_fused.tile_normalize
}  # fmt: skip
_FUSED_APPLY = {"planes": planes_fused.apply, "lines": lines_fused.rows_apply, "tiles": lines_fused.tile_apply}
_FUSED_FORWARD = {"planes": planes_fused.forward, "tiles": lines_fused.tile_forward}
_FUSED_BACKWARD = {"planes": planes_fused.backward, "tiles": lines_fused.tile_backward}


def _walked(of: Pass, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays (N, C, S) as the loops of a pass walk them."""
    if not of.joined:
        return arrays
    N, C, S = arrays[0].shape
    return tuple(a.transpose(0, 2, 1).reshape(N * S, C, 1) for a in arrays)


def _run(kernels: dict[str, Any], of: Pass, cost: int, *operands: Any) -> None:
    run(kernels[of.loops], of.blocks, cost, *of.told, *operands)


def _merged(partial: np.ndarray) -> np.ndarray:
    """The sum over the blocks of partial (blocks, 2, C)."""
    if len(partial) == 1:
        return partial[0]
    sums = np.empty(partial.shape[1:])
    merge(partial, sums)
    return sums


def _sum_deviations(of: Pass, x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sum (x - shift) and sum (x - shift)^2 of every channel: (2, C) float64."""
    partial = np.empty((of.partial, 2, x.shape[1]))
    _run(_SUMS, of, x.nbytes, *_walked(of, x), shift, partial)
    return _merged(partial)


def _sum_gradients(of: Pass, dy: np.ndarray, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """sum dy and sum dy (x - mean) of every channel: (2, C) float64."""
    partial = np.empty((of.partial, 2, x.shape[1]))
    no_scale_and_dx = mean[0], np.empty((0, 0, 0), x.dtype)
    _run(_GRADIENT_SUMS, of, 2 * x.nbytes, *_walked(of, dy, x), mean, *no_scale_and_dx, partial)
    return _merged(partial)


def _sum_and_scale_gradients(dy, x, mean, scale, dx):
    """As `_sum_gradients`, and dx = scale dy."""
    of = channel_plan.plan_sums_and_result(layout_of(x, dy, dx))
    partial = np.empty((of.partial, 2, x.shape[1]))
    _run(_GRADIENT_SUMS, of, 3 * x.nbytes, dy, x, mean, scale, dx, partial)
    return _merged(partial)


# ---------------------------------------------------------------------------------------------- with a residual or a mask
def mask_size(x: np.ndarray) -> int:
    """Bytes of the mask of x (N, C, …), by its shape alone: an eighth of a byte a value, and what fills up bytes."""
    N, C, *positions = x.shape
    return channel_plan.mask_size(N, C, math.prod(positions))


def _turned(*arrays: Any) -> tuple[Any, ...]:
    """(N, C, 1) as (1, C, N), so that there are eight neighbours to share a byte."""
    return arrays if arrays[0].shape[2] != 1 else tuple(None if a is None else a.transpose(2, 1, 0) for a in arrays)


def _given(x: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    """An operand that may be None, as the kernels take it."""
    return np.empty((0, 0, 0), x.dtype) if other is None else other


def _given_mask(mask: np.ndarray | None) -> np.ndarray:
    return np.empty((0, 0, 0), np.uint8) if mask is None else mask.reshape(1, 1, -1)


def _new_mask(mask: np.ndarray | None, used: int) -> np.ndarray:
    """`mask` to be written, what the layout of x does not need of it set to 0."""
    if mask is not None:
        mask[used:] = 0
    return _given_mask(mask)


def _masked_gradient_sums(of: Pass, dy, x, mean, mask):
    """sum dy and sum dy (x - mean) of every channel, of the dy that passes: (2, C) float64."""
    C, operands = x.shape[1], (dy, x, _given_mask(mask), mean)
    if not of.partial:
        sums = np.empty((2, C))
        _run(_FUSED_GRADIENT_SUMS, of, 2 * x.nbytes, *operands, sums)
        return sums
    partial = np.empty((of.partial, 2, C))
    _run(_FUSED_GRADIENT_SUMS, of, 2 * x.nbytes, *operands, partial)
    return _merged(partial)


# ---------------------------------------------------------------------------------------------- launchers
def statistics(
    x: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    rstd: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    *,
    eps: float,
    momentum: float,
) -> None:
    """mean (2, C), var and rstd (C,) of x (N, C, S); running statistics updated in place."""
    _check(x, mean, var, rstd, running_mean, running_var)
    of = channel_plan.plan_sums(layout_of(x))
    _statistics(of, x, mean, var, rstd, running_mean, running_var, eps, momentum)


def _statistics(of, x, mean, var, rstd, running_mean, running_var, eps, momentum):
    C, m = x.shape[1], float(x.shape[0] * x.shape[2])
    new_mean, new_var = _running(running_mean, var.dtype), _running(running_var, var.dtype)
    if m == 0:
        shift, sums = np.zeros(C), np.zeros((2, C))
    else:
        shift = np.empty(C)
        first_means(x, shift)
        sums = _sum_deviations(of, x, shift)
        if better_shifts(shift, sums, m):
            sums = _sum_deviations(of, x, shift)
    finish_all(shift, sums, m, float(eps), float(momentum), mean, var, rstd, new_mean, new_var)
    _store_running(running_mean, new_mean)
    _store_running(running_var, new_var)


def normalize(
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    y: np.ndarray,
    *,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> None:
    """y = (x - mean) (rstd gamma) + beta + residual, what is below 0 as 0 where a mask is given to be written."""
    _check(x, mean, rstd, gamma, beta, like=(y, residual), mask=mask)
    fused = residual is not None or mask is not None
    if fused:
        x, y, residual = _turned(x, y, residual)
    _normalize(channel_plan.plan_result(layout_of(x, y), fused), x, mean, rstd, gamma, beta, y, residual, mask)


def _normalize(plan, x, mean, rstd, gamma, beta, y, residual, mask):
    if x.size == 0:
        return
    C, dtype = x.shape[1], rstd.dtype
    scale = np.ascontiguousarray(rstd if gamma is None else rstd * to_accumulate(gamma, C, dtype, 1.0))
    beta = to_accumulate(beta, C, dtype, 0.0)
    if plan.fused:
        operands = x, mean, scale, beta, _given(x, residual), y, _new_mask(mask, plan.mask_bytes)
        _run(_FUSED_NORMALIZE, plan.result, 3 * x.nbytes, *operands)
    else:
        _run(_NORMALIZE, plan.result, 2 * x.nbytes, x, mean, scale, beta, y)


def forward(
    x: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    y: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    rstd: np.ndarray,
    running_mean: np.ndarray | None,
    running_var: np.ndarray | None,
    *,
    eps: float,
    momentum: float,
    residual: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> None:
    """`statistics`, then `normalize`."""
    _check(x, mean, var, rstd, gamma, beta, running_mean, running_var, like=(y, residual), mask=mask)
    fused = residual is not None or mask is not None
    if fused:
        x, y, residual = _turned(x, y, residual)
    plan = channel_plan.plan_forward(layout_of(x, y), fused)
    if plan.whole is None:
        _statistics(plan.sums, x, mean, var, rstd, running_mean, running_var, eps, momentum)
        _normalize(plan, x, mean, rstd, gamma, beta, y, residual, mask)
        return
    C, dtype = x.shape[1], var.dtype
    new_mean, new_var = _running(running_mean, dtype), _running(running_var, dtype)
    gamma, beta = to_accumulate(gamma, C, dtype, 1.0), to_accumulate(beta, C, dtype, 0.0)
    results = mean, var, rstd, new_mean, new_var, float(eps), float(momentum)
    if fused:
        operands = x, gamma, beta, _given(x, residual), y, _new_mask(mask, plan.mask_bytes)
        _run(_FUSED_FORWARD, plan.whole, 3 * x.nbytes, *operands, *results)
    else:
        x, y = _walked(plan.whole, x, y)
        _run(_FORWARD, plan.whole, 3 * x.nbytes, x, gamma, beta, y, *results)
    _store_running(running_mean, new_mean)
    _store_running(running_var, new_var)


def backward_reduce(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    *,
    mask: np.ndarray | None = None,
) -> None:
    """dbeta = sum dy, dgamma = sum dy x_hat; dy counts where the mask, if given, is set."""
    _check(x, mean, rstd, dgamma, dbeta, like=(dy,), mask=mask)
    if mask is not None:
        dy, x = _turned(dy, x)
    layout = layout_of(x, dy)
    of = channel_plan.plan_sums(layout) if mask is None else channel_plan.plan_masked_sums(layout)
    _reduce(of, dy, x, mean, rstd, dgamma, dbeta, mask)


def _reduce(of, dy, x, mean, rstd, dgamma, dbeta, mask):
    if x.size == 0:
        sums = np.zeros((2, x.shape[1]))
    else:
        sums = _sum_gradients(of, dy, x, mean) if mask is None else _masked_gradient_sums(of, dy, x, mean, mask)
    finish_gradients(sums, rstd, dgamma, dbeta)


def backward_apply(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    count: float,
    dx: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    dresidual: np.ndarray | None = None,
) -> None:
    """dx = gamma rstd (dy - dbeta / count - x_hat dgamma / count); dresidual, where given, is the dy that passes."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask)
    fused = mask is not None or dresidual is not None
    if fused:
        dy, x, dx, dresidual = _turned(dy, x, dx, dresidual)
    plan = channel_plan.plan_result(layout_of(x, dy, dx), fused)
    _apply(plan, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask, dresidual)


def _apply(plan, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask, dresidual):
    if x.size == 0:
        return
    count = float(np.asarray(count).item())
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    b = (dbeta / count).astype(rstd.dtype)
    k = (rstd * (dgamma / count)).astype(rstd.dtype)
    if plan.fused:
        _fused_apply(plan, dy, x, mean, scale, b, k, True, dx, mask, dresidual)
    else:
        _run(_APPLY, plan.result, 3 * x.nbytes, dy, x, mean, scale, b, k, dx)


def _fused_apply(plan, dy, x, mean, scale, b, k, trained, dx, mask, dresidual):
    operands = dy, x, _given_mask(mask), mean, scale, b, k, trained, dx, _given(x, dresidual)
    _run(_FUSED_APPLY, plan.result, 4 * x.nbytes, *operands)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    dresidual: np.ndarray | None = None,
) -> None:
    """`backward_reduce`, then `backward_apply` with count = m."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask)
    fused = mask is not None or dresidual is not None
    if fused:
        x, dy, dx, dresidual = _turned(x, dy, dx, dresidual)
    plan = channel_plan.plan_backward(layout_of(x, dy, dx), fused, mask is not None)
    if plan.whole is None:
        _reduce(plan.sums, dy, x, mean, rstd, dgamma, dbeta, mask)
        count = x.shape[0] * x.shape[2]
        _apply(plan, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask, dresidual)
        return
    gamma = to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    if fused:
        operands = dy, x, _given_mask(mask), mean, rstd, gamma, dx, _given(x, dresidual)
        _run(_FUSED_BACKWARD, plan.whole, 5 * x.nbytes, *operands, dgamma, dbeta)
    else:
        dy, x, dx = _walked(plan.whole, dy, x, dx)
        _run(_BACKWARD, plan.whole, 5 * x.nbytes, dy, x, mean, rstd, gamma, dx, dgamma, dbeta)


def inference_backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    dresidual: np.ndarray | None = None,
) -> None:
    """dx = dy gamma rstd, for statistics that do not depend on x; dgamma and dbeta as in `backward_reduce`."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask)
    if x.size == 0:
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        return
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    if mask is None and dresidual is None:
        finish_gradients(_sum_and_scale_gradients(dy, x, mean, scale, dx), rstd, dgamma, dbeta)
        return
    backward_reduce(dy, x, mean, rstd, dgamma, dbeta, mask=mask)
    dy, x, dx, dresidual = _turned(dy, x, dx, dresidual)
    plan = channel_plan.plan_result(layout_of(x, dy, dx), True)
    none = np.zeros_like(rstd)
    _fused_apply(plan, dy, x, mean, scale, none, none, False, dx, mask, dresidual)
