"""Batch normalisation over axes 0 and 2 of (N, C, S), on the CPU. m = N S values a channel.

    mean = sum x / m,   var = sum (x - mean)^2 / m,   rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) rstd,      y = (x - mean) (rstd gamma) + beta
    dbeta = sum dy,   dgamma = sum dy x_hat
    dx = gamma rstd (dy - dbeta / m - x_hat dgamma / m)
    fused: y = a(p), p = x_hat gamma + beta + residual; dy counts as dy a'(p) (`_batch_norm/activation.py`)
    with `valid`, a bit a position that says whether it counts: m is their number, y, dx and dresidual are 0 elsewhere

    statistics, backward_reduce      read x (and dy)                    1 pass  (2)
    normalize, backward_apply        read x (and dy), write y or dx     2 passes (3)
    forward, backward                channels done whole, in cache      2 passes (3); 3 (5) where they are split
    a residual                                                         1 pass more; its gradient 1 pass more
    an activation                                                      backward reads the result of a ReLU as often as x; for
                                                                       others it computes p again from x and the residual

A pass is one read or one write of the whole tensor. `mean` is kept as two numbers, mean[0] the rounded mean and mean[1] what
the rounding left, so that x - mean is right where the mean is large; y is never folded to a x + b. Sums are float64:
`_batch_norm/statistics.py` says how, `_batch_norm/planes.py`, `_batch_norm/lines.py` and `_batch_norm/tiles.py` hold the loops
for the two layouts:

    planes    S adjacent (NCHW); any other strides too, copied a piece at a time
    lines     C adjacent (channels-last), and planes too small to be a loop of their own. Of long rows of channels, and of
              several small planes, a tile is a few channels of every sample: `_batch_norm/tiles.py` does these whole

A call decides once which loops run and how their work is cut into blocks (`channel_plan.py`), by shapes and strides alone;
a launcher follows that plan. Blocks are merged in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import channel_plan
from ._batch_norm import lines, planes, tiles
from ._batch_norm.activation import KINDS
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
    assert mask is None, "the kernels of the CPU keep no mask"
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
    moving(Moves(("x", "residual", "on"), ("y",)), *_loops)
for _loops in (_GRADIENT_SUMS, _APPLY, _BACKWARD):
    moving(Moves(("dy", "x", "residual", "on"), ("dx", "dresidual")), *_loops)


def _walked(of: Pass, *arrays: Any) -> tuple[Any, ...]:
    """Arrays (N, C, S), or None, as the loops of a pass walk them."""
    if not of.joined:
        return arrays
    N, C, S = arrays[0].shape
    return tuple(None if a is None else a.transpose(0, 2, 1).reshape(N * S, C, 1) for a in arrays)


def _run(loops: _Loops, of: Pass, cost: int, *operands: Any, on: np.ndarray | None = None) -> None:
    """on: the positions that count, last of the operands of all loops but tiles."""
    masks = () if of.loops == "tiles" else (on,)
    run(getattr(loops, of.loops), of.blocks, cost, *of.told, *operands, *masks, plan=of)


def _merged(partial: np.ndarray) -> np.ndarray:
    """The sum over the blocks of partial (blocks, 2, C)."""
    if len(partial) == 1:
        return partial[0]
    sums = np.empty(partial.shape[1:])
    merge(partial, sums)
    return sums


def _sum_deviations(of: Pass, x: np.ndarray, shift: np.ndarray, on: np.ndarray | None) -> np.ndarray:
    """sum (x - shift) and sum (x - shift)^2 of every channel: (2, C) float64."""
    partial = np.empty((of.partial, 2, x.shape[1]))
    _run(_SUMS, of, x.nbytes, *_walked(of, x), shift, partial, on=on)
    return _merged(partial)


def _sum_gradients(
    of: Pass, dy: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, gate: _Gate, on: np.ndarray | None
) -> np.ndarray:
    """sum dy and sum dy (x - mean) of every channel: (2, C) float64."""
    partial, no_dx = np.empty((of.partial, 2, x.shape[1])), np.empty((0, 0, 0), x.dtype)
    walked_dy, walked_x, residual = _walked(of, dy, x, gate.residual)
    by = gate.beta, gate.kind, residual, None
    _run(_GRADIENT_SUMS, of, 2 * x.nbytes, walked_dy, walked_x, mean, scale, no_dx, partial, *by, on=on)
    return _merged(partial)


def _sum_and_scale_gradients(
    dy: np.ndarray, x: np.ndarray, mean: np.ndarray, scale: np.ndarray, dx: np.ndarray, gate: _Gate,
    dresidual: np.ndarray | None, on: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """As `_sum_gradients`, and dx = scale dy."""
    of = channel_plan.plan_sums_and_result(layout_of(x, dy, dx, *_given(dresidual)), on is not None)
    partial = np.empty((of.partial, 2, x.shape[1]))
    _run(_GRADIENT_SUMS, of, 3 * x.nbytes, dy, x, mean, scale, dx, partial, *gate, dresidual, on=on)
    return _merged(partial)


def _given(*arrays: np.ndarray | None) -> list[np.ndarray]:
    return [a for a in arrays if a is not None]


# ---------------------------------------------------------------------------------------------- positions that count
class _Counted(NamedTuple):
    """on: (1, N, S) bytes, 1 where a position counts, or None where all do; m: how many do, so many values a channel."""

    on: np.ndarray | None
    m: float


def _unpacked(bits: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(bits, count=size, bitorder="little")


def _counted(x: np.ndarray, valid: np.ndarray | None) -> _Counted:
    """From the bits of the positions of x (N, C, S), a byte each: N S of them beside N C S values."""
    N, _, S = x.shape
    if valid is None:
        return _Counted(None, float(N * S))
    on = _unpacked(valid, N * S)
    m = int(np.count_nonzero(on))
    return _Counted(None if m == N * S else on.reshape(1, N, S), float(m))


# ---------------------------------------------------------------------------------------------- a residual and an activation
def mask_size(x: np.ndarray) -> int:
    """0: what passed an activation is computed again, or told by the result, and no mask is kept."""
    return 0


def _alike(a: np.ndarray | None, x: np.ndarray) -> np.ndarray | None:
    """`a`, of x's shape, as the loops that x's layout decides can walk it: a copy in x's order where they cannot."""
    if a is None:
        return None
    alone, both = layout_of(x), layout_of(x, a)
    if all(of(alone) == of(both) for of in (channel_plan.in_rows, channel_plan.packed, channel_plan.small_planes)):
        return a
    copied = np.empty_like(x)
    copied[...] = a
    return copied


class _Gate(NamedTuple):
    """What an activation needs in the backward pass, as the loops take it; nothing without one."""

    beta: np.ndarray | None
    kind: Any
    residual: np.ndarray | None


def _gate(
    x: np.ndarray, rstd: np.ndarray, activation: str | None, beta: np.ndarray | None, residual: np.ndarray | None
) -> _Gate:
    if activation is None:
        return _Gate(None, None, None)
    assert activation != "relu" or residual is not None, "the result of a ReLU, in the place of a residual"
    return _Gate(to_accumulate(beta, rstd.size, rstd.dtype, 0.0), KINDS[activation], _alike(residual, x))


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
    counted = _counted(x, valid)
    of = channel_plan.plan_sums(layout_of(x), counted.on is not None)
    _statistics(of, counted, x, mean, var, rstd, running_mean, running_var, eps, momentum)


def _statistics(of, counted, x, mean, var, rstd, running_mean, running_var, eps, momentum) -> None:
    C, (on, m) = x.shape[1], counted
    if on is not None and m == 0:  # mean and var are 0, and nothing is learnt
        running_mean, running_var, m = None, None, 1.0
    new_mean, new_var = _running(running_mean, var.dtype), _running(running_var, var.dtype)
    if m == 0:
        shift, sums = np.zeros(C), np.zeros((2, C))
    else:
        shift = np.empty(C)
        first_means(x, on, shift)
        sums = _sum_deviations(of, x, shift, on)
        if better_shifts(shift, sums, m):
            sums = _sum_deviations(of, x, shift, on)
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
    activation: str | None = None,
) -> None:
    """y = a((x - mean) (rstd gamma) + beta + residual), 0 at positions that do not count."""
    _check(x, mean, rstd, gamma, beta, like=(y, residual), mask=mask, valid=valid)
    after, on = (KINDS[activation], _alike(residual, x)), _counted(x, valid).on
    _normalize(channel_plan.plan_result(layout_of(x, y), on is not None), x, mean, rstd, gamma, beta, y, after, on)


def _normalize(of, x, mean, rstd, gamma, beta, y, after, on) -> None:
    if x.size == 0:
        return
    C, dtype = x.shape[1], rstd.dtype
    scale = np.ascontiguousarray(rstd if gamma is None else rstd * to_accumulate(gamma, C, dtype, 1.0))
    _run(_NORMALIZE, of, 2 * x.nbytes, x, mean, scale, to_accumulate(beta, C, dtype, 0.0), y, *after, on=on)


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
    activation: str | None = None,
) -> None:
    """`statistics`, then `normalize`. count: bits set in valid."""
    _check(x, mean, var, rstd, gamma, beta, running_mean, running_var, like=(y, residual), mask=mask, valid=valid)
    counted = _counted(x, valid)
    plan = channel_plan.plan_forward(layout_of(x, y), counted.on is not None)
    kind, residual = KINDS[activation], _alike(residual, x)
    if plan.whole is None:
        _statistics(plan.sums, counted, x, mean, var, rstd, running_mean, running_var, eps, momentum)
        _normalize(plan.result, x, mean, rstd, gamma, beta, y, (kind, residual), counted.on)
        return
    if counted.m == 0:  # of a mask: nothing is learnt
        running_mean = running_var = None
    C, dtype = x.shape[1], var.dtype
    new_mean, new_var = _running(running_mean, dtype), _running(running_var, dtype)
    gamma, beta = to_accumulate(gamma, C, dtype, 1.0), to_accumulate(beta, C, dtype, 0.0)
    results = mean, var, rstd, new_mean, new_var, float(eps), float(momentum)
    walked_x, walked, residual = _walked(plan.whole, x, y, residual)
    _run(_FORWARD, plan.whole, 3 * x.nbytes, walked_x, gamma, beta, walked, *results, kind, residual, on=counted.on)
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
    valid: np.ndarray | None = None,
    activation: str | None = None,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> None:
    """dbeta = sum dy, dgamma = sum dy x_hat; with an activation dy counts as dy a'(p), p = gamma x_hat + beta + residual; 0 at
    positions that do not count.

    residual: for "relu" the result.
    """
    _check(x, mean, rstd, dgamma, dbeta, gamma, beta, like=(dy, residual), mask=mask, valid=valid)
    gate, on = _gate(x, rstd, activation, beta, residual), _counted(x, valid).on
    of = channel_plan.plan_sums(layout_of(x, dy), on is not None)
    _reduce(of, dy, x, mean, rstd, gamma, dgamma, dbeta, gate, on)


def _scale_of(rstd, gamma) -> np.ndarray:
    return rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)


def _reduce(of, dy, x, mean, rstd, gamma, dgamma, dbeta, gate, on) -> None:
    scale = mean[0] if gate.kind is None else _scale_of(rstd, gamma)  # which does not count without an activation
    sums = _sum_gradients(of, dy, x, mean, scale, gate, on) if x.size else np.zeros((2, x.shape[1]))
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
    activation: str | None = None,
    beta: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> None:
    """dx = gamma rstd (dy - dbeta / count - x_hat dgamma / count); dresidual, if given, is dy as `backward_reduce` has it."""
    _check(x, mean, rstd, gamma, beta, dgamma, dbeta, like=(dy, dx, residual, dresidual), mask=mask, valid=valid)
    gate, on = _gate(x, rstd, activation, beta, residual), _counted(x, valid).on
    of = channel_plan.plan_result(layout_of(x, dy, dx, *_given(dresidual)), on is not None)
    _apply(of, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, gate, dresidual, on)


def _apply(of, dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, gate, dresidual, on) -> None:
    if x.size == 0:
        return
    count = float(np.asarray(count).item())
    scale = _scale_of(rstd, gamma)
    b = (dbeta / count).astype(rstd.dtype)
    k = (rstd * (dgamma / count)).astype(rstd.dtype)
    _run(_APPLY, of, 3 * x.nbytes, dy, x, mean, scale, b, k, dx, *gate, dresidual, on=on)


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
    activation: str | None = None,
    beta: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> None:
    """`backward_reduce`, then `backward_apply` with count = m. count: bits set in valid."""
    _check(x, mean, rstd, gamma, beta, dgamma, dbeta, like=(dy, dx, residual, dresidual), mask=mask, valid=valid)
    gate, (on, m) = _gate(x, rstd, activation, beta, residual), _counted(x, valid)
    plan = channel_plan.plan_backward(layout_of(x, dy, dx, *_given(dresidual)), on is not None)
    if plan.whole is None:
        _reduce(plan.sums, dy, x, mean, rstd, gamma, dgamma, dbeta, gate, on)
        _apply(plan.result, dy, x, mean, rstd, gamma, dgamma, dbeta, max(m, 1.0), dx, gate, dresidual, on)
        return
    gamma = to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    dy, x, dx, residual, dresidual = _walked(plan.whole, dy, x, dx, gate.residual, dresidual)
    by = gate.beta, gate.kind, residual, dresidual
    _run(_BACKWARD, plan.whole, 5 * x.nbytes, dy, x, mean, rstd, gamma, dx, dgamma, dbeta, *by, on=on)


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
    activation: str | None = None,
    beta: np.ndarray | None = None,
    residual: np.ndarray | None = None,
) -> None:
    """dx = dy gamma rstd, for statistics that do not depend on x; dgamma and dbeta as in `backward_reduce`."""
    _check(x, mean, rstd, gamma, beta, dgamma, dbeta, like=(dy, dx, residual, dresidual), mask=mask, valid=valid)
    if x.size == 0:
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        return
    gate, scale, on = _gate(x, rstd, activation, beta, residual), _scale_of(rstd, gamma), _counted(x, valid).on
    sums = _sum_and_scale_gradients(dy, x, mean, scale, dx, gate, dresidual, on)
    finish_gradients(sums, rstd, dgamma, dbeta)
