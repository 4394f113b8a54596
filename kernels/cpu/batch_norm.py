"""Batch normalisation over axes 0 and 2 of (N, C, S), on the CPU. m = N S values a channel.

    mean = sum x / m,   var = sum (x - mean)^2 / m,   rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) rstd,      y = (x - mean) (rstd gamma) + beta
    dbeta = sum dy,   dgamma = sum dy x_hat
    dx = gamma rstd (dy - dbeta / m - x_hat dgamma / m)
    with a residual or a ReLU: y = relu(x_hat gamma + beta + residual), one bit a value kept of where it is above 0; dy is 0
    where it is not
    with `valid`, the bits of the positions that count: m is their number, y, dx and dresidual are 0 elsewhere

    statistics, backward_reduce      read x (and dy)                    1 pass  (2)
    normalize, backward_apply        read x (and dy), write y or dx     2 passes (3)
    forward, backward                channels done whole, in cache      2 passes (3); 3 (5) where they are split
    a residual or a ReLU                                               2 passes more, a residual's own values one more;
                                                                       the mask: an eighth of a byte a value

A pass is one read or one write of the whole tensor. `mean` is kept as two numbers, mean[0] the rounded mean and mean[1] what
the rounding left, so that x - mean is right where the mean is large; y is never folded to a x + b. Sums are float64:
`_batch_norm/statistics.py` says how, `_batch_norm/planes.py`, `_batch_norm/lines.py` and `_batch_norm/tiles.py` hold the loops
for the two layouts:

    planes    S adjacent (NCHW); any other strides too, copied a piece at a time
    lines     C adjacent (channels-last), and planes too small to be a loop of their own. Of long rows of channels, and of
              several small planes, a tile is a few channels of every sample: `_batch_norm/tiles.py` does these whole

A residual and a ReLU are a pass of their own (`_batch_norm/residual_relu.py`), after `normalize` and before the sums of
`backward`: one loop for every layout, measured to take no longer than loops that do it all at once.

A call decides once which loops run and how their work is cut into blocks (`channel_plan.py`), by shapes and strides alone;
a launcher follows that plan. Blocks are merged in order. Where some positions do not count, `batch_norm_masked.py` does it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import batch_norm_masked as masked
from . import channel_plan
from ._batch_norm import lines, planes, residual_relu, tiles
from ._batch_norm.statistics import better_shifts, finish_all, finish_gradients, first_means, merge
from ._numba.compile import kernel
from ._numba.elements import store, to_accumulate
from ._numba.threads import Moves, moving, run
from .channel_plan import Pass, layout_of


# ---------------------------------------------------------------------------------------------- vectors
def _running(running: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    return np.empty(0, dtype) if running is None else to_accumulate(running, running.size, dtype, 0.0)


def _store_running(running: np.ndarray | None, new: np.ndarray) -> None:
    """Write running statistics back where they were converted to compute with."""
    if running is not None and new is not running:
        _copy_vector(new, running)


@kernel
def _copy_vector(values, out) -> None:
    for i in range(values.size):
        store(out, i, values[i])


def _check(x, mean, *of_channels, like=(), mask=None, valid=None) -> None:
    """The kernels look at no bound: a wrong shape is a wrong address. `like`: what has x's shape, or is None."""
    C = x.shape[1]
    assert mean.shape == (2, C), (mean.shape, x.shape)
    for v in of_channels:
        assert v is None or v.shape == (C,), (v.shape, x.shape)
    for v in like:
        assert v is None or v.shape == x.shape, (v.shape, x.shape)
    assert mask is None or mask.nbytes == mask.size >= mask_size(x), (mask.nbytes, x.shape)
    assert valid is None or valid.nbytes == valid.size >= -(-x.shape[0] * x.shape[2] // 8), (valid.nbytes, x.shape)


# ---------------------------------------------------------------------------------------------- passes
class _Loops(NamedTuple):
    """A pass's loops, by the family that its plan names."""

    planes: Any
    tiles: Any
    lines: Any = None


_SUMS = _Loops(planes.sums, tiles.sums, lines.sums)
_NORMALIZE = _Loops(planes.normalize, tiles.normalize, lines.normalize)
_FORWARD = _Loops(planes.forward, tiles.forward)
_GRADIENT_SUMS = _Loops(planes.gradient_sums, tiles.gradient_sums, lines.gradient_sums)
_APPLY = _Loops(planes.apply, tiles.apply, lines.apply)
_BACKWARD = _Loops(planes.backward, tiles.backward)

for _loops in (_SUMS, _NORMALIZE, _FORWARD):
    moving(Moves(("x",), ("y",)), *_loops)
for _loops in (_GRADIENT_SUMS, _APPLY, _BACKWARD):
    moving(Moves(("dy", "x"), ("dx",)), *_loops)
moving(Moves(("values", "residual"), ("values", "mask", "y")), residual_relu.finish)
moving(Moves(("dy", "mask"), ("out",)), residual_relu.let_through)


def _walked(of: Pass, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Arrays (N, C, S) as the loops of a pass walk them."""
    if not of.joined:
        return arrays
    N, C, S = arrays[0].shape
    return tuple(a.transpose(0, 2, 1).reshape(N * S, C, 1) for a in arrays)


def _run(loops: _Loops, of: Pass, cost: int, *operands: Any) -> None:
    run(getattr(loops, of.loops), of.blocks, cost, *of.told, *operands, plan=of)


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


def _sum_and_scale_gradients(dy: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """As `_sum_gradients`, and dx = scale dy."""
    of = channel_plan.plan_sums_and_result(layout_of(x, dy, dx))
    partial = np.empty((of.partial, 2, x.shape[1]))
    _run(_GRADIENT_SUMS, of, 3 * x.nbytes, dy, x, mean, scale, dx, partial)
    return _merged(partial)


# ---------------------------------------------------------------------------------------------- with a residual or a mask
def mask_size(x: np.ndarray) -> int:
    """Bytes of the mask of x (N, C, …): an eighth of a byte a value."""
    return residual_relu.mask_size(math.prod(x.shape))


def _in_order(a: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`a` (N, C, S), its axes in the order in which those of x lie in memory: the mask's order."""
    return a.transpose(0, 2, 1) if channel_plan.in_rows(layout_of(x)) else a


def _line(a: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    """`a` as one line (1, 1, size) in that order: a copy where it lies otherwise, empty for None."""
    return np.empty((1, 1, 0), x.dtype) if a is None else np.ascontiguousarray(_in_order(a, x)).reshape(1, 1, -1)


def _write_back(line: np.ndarray, a: np.ndarray, x: np.ndarray) -> None:
    """Write to `a` the line that stood in for it, where that was a copy."""
    if not np.may_share_memory(line, a):
        ordered = _in_order(a, x)
        ordered[...] = line.reshape(ordered.shape)


def _before_residual(x: np.ndarray, residual: np.ndarray | None, y: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where to normalise to: y, unless that would round it to half precision before the residual is added."""
    if residual is None or y.itemsize == dtype.itemsize:
        return y
    return _in_order(np.empty(_in_order(x, x).shape, dtype), x)


def _finish(x, values, residual, y, mask, chosen, dtype) -> None:
    """y = values + residual, what is below 0 as 0 where a mask is given to be written; 0 where a position is not `chosen`."""
    if x.size == 0 or (residual is None and mask is None):
        return
    line, rounded = _line(values, x), _line(None if values is y else y, x)
    bits = np.empty((1, 1, 0), np.uint8) if mask is None else mask.reshape(1, 1, -1)
    of = residual_relu.pieces(x.size)
    run(residual_relu.finish, of, 3 * x.nbytes, line, _line(residual, x), bits, dtype.type(0), rounded)
    _write_back(line if values is y else rounded, y, x)
    if chosen is not None:
        masked.clear(chosen, y)


def _passing(
    dy: np.ndarray, x: np.ndarray, mask: np.ndarray | None, dx: np.ndarray, dresidual: np.ndarray | None,
    chosen: masked.Chosen | None = None,
) -> np.ndarray:  # fmt: skip
    """dy as far as the mask lets it through: in dresidual, where that is given, then 0 where a position is not `chosen`, else
    in dx."""
    if x.size == 0 or (mask is None and dresidual is None):
        return dy
    passed = dx if dresidual is None else dresidual
    if mask is None:
        passed[...] = dy
    else:
        line, operands = _line(passed, x), (_line(dy, x), mask.reshape(1, 1, -1))
        run(residual_relu.let_through, residual_relu.pieces(x.size), 2 * x.nbytes, *operands, line)
        _write_back(line, passed, x)
    if chosen is not None and dresidual is not None:
        masked.clear(chosen, dresidual)
    return passed


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
    valid: np.ndarray | None = None,
    count: np.ndarray | None = None,
) -> None:
    """mean (2, C), var and rstd (C,) of x (N, C, S); running statistics updated in place. count: bits set in valid."""
    _check(x, mean, var, rstd, running_mean, running_var, valid=valid)
    chosen = masked.chosen(x, valid)
    if chosen is not None:
        new_mean, new_var = _running(running_mean, var.dtype), _running(running_var, var.dtype)
        masked.statistics(chosen, x, mean, var, rstd, new_mean, new_var, float(eps), float(momentum))
        _store_running(running_mean, new_mean)
        _store_running(running_var, new_var)
        return
    of = channel_plan.plan_sums(layout_of(x))
    _statistics(of, x, mean, var, rstd, running_mean, running_var, eps, momentum)


def _statistics(of, x, mean, var, rstd, running_mean, running_var, eps, momentum) -> None:
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
    valid: np.ndarray | None = None,
) -> None:
    """y = (x - mean) (rstd gamma) + beta + residual, what is below 0 as 0 where a mask is given to be written."""
    _check(x, mean, rstd, gamma, beta, like=(y, residual), mask=mask, valid=valid)
    values, chosen = _before_residual(x, residual, y, rstd.dtype), masked.chosen(x, valid)
    _normalize(channel_plan.plan_result(layout_of(x, values)), x, mean, rstd, gamma, beta, values, chosen)
    _finish(x, values, residual, y, mask, chosen, rstd.dtype)


def _normalize(of, x, mean, rstd, gamma, beta, y, chosen=None) -> None:
    if x.size == 0:
        return
    C, dtype = x.shape[1], rstd.dtype
    scale = np.ascontiguousarray(rstd if gamma is None else rstd * to_accumulate(gamma, C, dtype, 1.0))
    if chosen is not None:
        masked.normalize(chosen, x, mean, scale, to_accumulate(beta, C, dtype, 0.0), y)
        return
    _run(_NORMALIZE, of, 2 * x.nbytes, x, mean, scale, to_accumulate(beta, C, dtype, 0.0), y)


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
    valid: np.ndarray | None = None,
    count: np.ndarray | None = None,
) -> None:
    """`statistics`, then `normalize`. count: bits set in valid."""
    _check(x, mean, var, rstd, gamma, beta, running_mean, running_var, like=(y, residual), mask=mask, valid=valid)
    values, chosen = _before_residual(x, residual, y, var.dtype), masked.chosen(x, valid)
    plan = channel_plan.plan_forward(layout_of(x, values))
    if plan.whole is None and chosen is None:
        _statistics(plan.sums, x, mean, var, rstd, running_mean, running_var, eps, momentum)
        _normalize(plan.result, x, mean, rstd, gamma, beta, values)
    else:
        C, dtype = x.shape[1], var.dtype
        new_mean, new_var = _running(running_mean, dtype), _running(running_var, dtype)
        gamma, beta = to_accumulate(gamma, C, dtype, 1.0), to_accumulate(beta, C, dtype, 0.0)
        results = mean, var, rstd, new_mean, new_var, float(eps), float(momentum)
        if chosen is not None:
            masked.forward(chosen, x, gamma, beta, values, *results)
        elif plan.whole is not None:
            walked_x, walked = _walked(plan.whole, x, values)
            _run(_FORWARD, plan.whole, 3 * x.nbytes, walked_x, gamma, beta, walked, *results)
        _store_running(running_mean, new_mean)
        _store_running(running_var, new_var)
    _finish(x, values, residual, y, mask, chosen, var.dtype)


def backward_reduce(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
    *,
    mask: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> None:
    """dbeta = sum dy, dgamma = sum dy x_hat; dy counts where the mask, if given, is set, and so with valid."""
    _check(x, mean, rstd, dgamma, dbeta, like=(dy,), mask=mask, valid=valid)
    if mask is not None:
        dy = _passing(dy, x, mask, np.empty_like(dy), None)
    chosen = masked.chosen(x, valid)
    _reduce(channel_plan.plan_sums(layout_of(x, dy)), dy, x, mean, rstd, dgamma, dbeta, chosen)


def _reduce(of, dy, x, mean, rstd, dgamma, dbeta, chosen) -> None:
    if chosen is not None:
        sums = masked.gradient_sums(chosen, dy, x, mean, mean[0], None)
    else:
        sums = _sum_gradients(of, dy, x, mean) if x.size else np.zeros((2, x.shape[1]))
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
    valid: np.ndarray | None = None,
) -> None:
    """dx = gamma rstd (dy - dbeta / count - x_hat dgamma / count); dresidual, where given, is the dy that passes."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask, valid=valid)
    chosen = masked.chosen(x, valid)
    dy = _passing(dy, x, mask, dx, dresidual, chosen)
    _apply(channel_plan.plan_result(layout_of(x, dy, dx)), dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, chosen)


def _apply(of, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, chosen) -> None:
    if x.size == 0:
        return
    count = float(np.asarray(count).item())
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    b = (dbeta / count).astype(rstd.dtype)
    k = (rstd * (dgamma / count)).astype(rstd.dtype)
    if chosen is not None:
        masked.apply(chosen, dy, x, mean, scale, b, k, dx)
        return
    _run(_APPLY, of, 3 * x.nbytes, dy, x, mean, scale, b, k, dx)


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
    valid: np.ndarray | None = None,
    count: np.ndarray | None = None,
) -> None:
    """`backward_reduce`, then `backward_apply` with count = m. count: bits set in valid."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask, valid=valid)
    chosen = masked.chosen(x, valid)
    dy = _passing(dy, x, mask, dx, dresidual, chosen)
    plan = channel_plan.plan_backward(layout_of(x, dy, dx))
    whole: Pass | None = masked.plan_whole(x, dy, dx) if chosen is not None else plan.whole
    if whole is None:
        m = x.shape[0] * x.shape[2] if chosen is None else max(chosen.m, 1)
        _reduce(plan.sums, dy, x, mean, rstd, dgamma, dbeta, chosen)
        _apply(plan.result, dy, x, mean, rstd, gamma, dgamma, dbeta, m, dx, chosen)
        return
    gamma = to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    if chosen is not None:
        masked.backward(whole, chosen, dy, x, mean, rstd, gamma, dx, dgamma, dbeta)
        return
    dy, x, dx = _walked(whole, dy, x, dx)
    _run(_BACKWARD, whole, 5 * x.nbytes, dy, x, mean, rstd, gamma, dx, dgamma, dbeta)


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
    valid: np.ndarray | None = None,
) -> None:
    """dx = dy gamma rstd, for statistics that do not depend on x; dgamma and dbeta as in `backward_reduce`."""
    _check(x, mean, rstd, gamma, dgamma, dbeta, like=(dy, dx, dresidual), mask=mask, valid=valid)
    if x.size == 0:
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        return
    chosen = masked.chosen(x, valid)
    dy = _passing(dy, x, mask, dx, dresidual, chosen)
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    if chosen is not None:
        finish_gradients(masked.gradient_sums(chosen, dy, x, mean, scale, dx), rstd, dgamma, dbeta)
        return
    finish_gradients(_sum_and_scale_gradients(dy, x, mean, scale, dx), rstd, dgamma, dbeta)
