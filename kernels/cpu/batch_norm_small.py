"""Batch normalisation of float32 by address: the loops and plans of `batch_norm.py`, without NumPy's views.

The GPU has no such launcher: there a launch takes addresses anyway. Arrays are (N, C, S), contiguous, S = 1 for rows of
channels; which of them training takes, `trains` says. kind: the activation (`_batch_norm/activation.py`), or None. Addresses of
residuals and of their gradients are None where there are none, so that a call without them is compiled to the loops without.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import types

from ._batch_norm import lines
from ._batch_norm import planes as _planes
from ._batch_norm import tiles as _tiles
from ._batch_norm.activation import KINDS
from ._batch_norm.statistics import better_shifts, finish_all, finish_gradients, first_means, merge
from ._numba import threads
from ._numba.by_address import floats, planes, planes_or_none, vector_or
from ._numba.compile import inline, kernel, overload
from ._numba.simd import streamed
from ._numba.threads import Moves, moving, run
from ._numba.views import line_of
from .channel_plan import (
    BLOCK_ROWS,
    LINE,
    PLANE,
    SMALL_PLANE,
    BatchNormPlan,
    Layout,
    flat_blocks,
    plan_backward,
    plan_forward,
    tiles,
)

__all__ = ["backward", "forward", "inference_backward", "normalize", "trains"]

RELU = KINDS["relu"]
FEWEST_OF_A_PLANE = 16  # the smallest plane that is worth a loop of its own


def _beta_of(kind: Any, beta_at: Any, C: Any) -> Any:
    """beta, which an activation's gradient needs; None without one."""


@overload(_beta_of)
def _choose_beta_of(kind, beta_at, C) -> Any:
    return (lambda kind, beta_at, C: None) if kind == types.none else (lambda kind, beta_at, C: vector_or(beta_at, C, 0.0))


# ---------------------------------------------------------------------------------------------- training, whole channels
@inline
def _forward_operands(x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S) -> Any:
    """x, gamma, beta, y, mean, var, rstd, running_mean and running_var."""
    x, y, stats = planes(x_at, N, C, S), planes(y_at, N, C, S), floats(stats_at, (4, C))
    gamma, beta = vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)
    kept = C if running_mean_at else 0
    running_mean, running_var = floats(running_mean_at, kept), floats(running_var_at, kept)
    return x, gamma, beta, y, stats[:2], stats[3], stats[2], running_mean, running_var


@inline
def _backward_operands(dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S) -> Any:
    """dy, x, mean, rstd, gamma, dx, dgamma and dbeta."""
    dy, x, dx = planes(dy_at, N, C, S), planes(x_at, N, C, S), planes(dx_at, N, C, S)
    stats, gamma = floats(stats_at, (3, C)), vector_or(gamma_at, C, 1.0)
    return dy, x, stats[:2], stats[2], gamma, dx, floats(dgamma_at, C), floats(dbeta_at, C)


@kernel
def _forward(
    first, last, group, x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S, eps, momentum,
    kind, residual_at,
) -> None:  # fmt: skip
    of = _forward_operands(x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S)
    _tiles.forward(first, last, group, *of, eps, momentum, kind, planes_or_none(residual_at, N, C, S))


@kernel
def _forward_planes(
    first, last, group, x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S, eps, momentum,
    kind, residual_at,
) -> None:  # fmt: skip
    of = _forward_operands(x_at, gamma_at, beta_at, y_at, stats_at, running_mean_at, running_var_at, N, C, S)
    _planes.forward(first, last, group, *of, eps, momentum, kind, planes_or_none(residual_at, N, C, S), None)


@kernel
def _backward(
    first, last, group, dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S, kind, beta_at, beside_at,
    dresidual_at,
) -> None:  # fmt: skip
    of = _backward_operands(dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S)
    beside, dresidual = planes_or_none(beside_at, N, C, S), planes_or_none(dresidual_at, N, C, S)
    _tiles.backward(first, last, group, *of, _beta_of(kind, beta_at, C), kind, beside, dresidual)


@kernel
def _backward_planes(
    first, last, group, dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S, kind, beta_at, beside_at,
    dresidual_at,
) -> None:  # fmt: skip
    of = _backward_operands(dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S)
    beside, dresidual = planes_or_none(beside_at, N, C, S), planes_or_none(dresidual_at, N, C, S)
    _planes.backward(first, last, group, *of, _beta_of(kind, beta_at, C), kind, beside, dresidual, None)


# ---------------------------------------------------------------------------------------------- training, split rows
@kernel
def _row_shifts(x_at, N, C, S, shift) -> None:
    first_means(planes(x_at, N, C, S), None, shift)


@kernel
def _row_sums(first, last, rows, x_at, N, C, S, shift, partial) -> None:
    lines.sums(first, last, rows, planes(x_at, N, C, S), shift, partial, None)


@kernel
def _row_statistics(partial, shift, again, stats_at, running_mean_at, running_var_at, C, m, eps, momentum) -> int:
    """The statistics from the sums; 1, and none, if `shift` has become better and the sums are not taken `again` already."""
    sums = np.empty((2, C))
    merge(partial, sums)
    if not again and better_shifts(shift, sums, m):
        return 1
    stats, kept = floats(stats_at, (4, C)), C if running_mean_at else 0
    running_mean, running_var = floats(running_mean_at, kept), floats(running_var_at, kept)
    finish_all(shift, sums, m, eps, momentum, stats[:2], stats[3], stats[2], running_mean, running_var)
    return 0


@kernel
def _row_results(
    first, last, blocks, rows, x_at, gamma_at, beta_at, y_at, stats_at, N, C, S, kind, residual_at
) -> None:  # fmt: skip
    stats, beta, residual = floats(stats_at, (3, C)), vector_or(beta_at, C, 0.0), planes_or_none(residual_at, N, C, S)
    scale, x, y = stats[2] * vector_or(gamma_at, C, 1.0), planes(x_at, N, C, S), planes(y_at, N, C, S)
    lines.normalize(first, last, blocks, rows, x, stats[:2], scale, beta, y, kind, residual, None)


@kernel
def _row_gradient_sums(
    first, last, rows, dy_at, x_at, stats_at, gamma_at, N, C, S, partial, kind, beta_at, beside_at, passed_at
) -> None:  # fmt: skip
    stats, no_dx, beta = floats(stats_at, (3, C)), planes(x_at, 0, 0, 0), _beta_of(kind, beta_at, C)
    dy, x, beside = planes(dy_at, N, C, S), planes(x_at, N, C, S), planes_or_none(beside_at, N, C, S)
    passed = planes_or_none(passed_at, N, C, S)
    scale = stats[2] * vector_or(gamma_at, C, 1.0)
    lines.gradient_sums(first, last, rows, dy, x, stats[:2], scale, no_dx, partial, beta, kind, beside, passed, None)


@kernel
def _row_gradients(
    first, last, blocks, rows, dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S, kind, result_at
) -> None:  # fmt: skip
    """kind: a ReLU, or None where dy is what passes the activation already."""
    dy, x, mean, rstd, gamma, dx, dgamma, dbeta = _backward_operands(
        dy_at, x_at, stats_at, gamma_at, dx_at, dgamma_at, dbeta_at, N, C, S
    )  # fmt: skip
    m, result = np.float32(N * S), planes_or_none(result_at, N, C, S)
    b, k = dbeta / m, rstd * (dgamma / m)
    lines.apply(first, last, blocks, rows, dy, x, mean, rstd * gamma, b, k, dx, None, kind, result, None, None)


# ---------------------------------------------------------------------------------------------- backward of known statistics
@inline
def _inference_operands(
    dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dy, x, mean, scale and dx."""
    stats = floats(stats_at, (3, C))
    scale = stats[2] * vector_or(gamma_at, C, 1.0)
    return planes(dy_at, N, C, S), planes(x_at, N, C, S), stats[:2], scale, planes(dx_at, N, C, S)


@kernel
def _inference_tiles(first, last, group, dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S, partial) -> None:
    dy, x, mean, scale, dx = _inference_operands(dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S)
    _tiles.gradient_sums(first, last, group, dy, x, mean, scale, dx, partial, None, None, None, None)


@kernel
def _inference_planes(first, last, dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S, partial) -> None:
    dy, x, mean, scale, dx = _inference_operands(dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S)
    _planes.gradient_sums(first, last, dy, x, mean, scale, dx, partial, None, None, None, None, None)


@kernel
def _inference_rows(first, last, rows, dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S, partial) -> None:
    dy, x, mean, scale, dx = _inference_operands(dy_at, x_at, stats_at, gamma_at, dx_at, N, C, S)
    lines.gradient_sums(first, last, rows, dy, x, mean, scale, dx, partial, None, None, None, None, None)


@kernel
def _finish_gradients(partial, stats_at, dgamma_at, dbeta_at, C) -> None:
    sums = np.empty((2, C))
    merge(partial, sums)
    finish_gradients(sums, floats(stats_at, (3, C))[2], floats(dgamma_at, C), floats(dbeta_at, C))


# ---------------------------------------------------------------------------------------------- evaluation
# In the order of memory: nothing is summed, so that channels need not be done whole.
@inline
def _known(
    first, gamma_at, beta_at, running_mean_at, running_var_at, stats_at, C, eps
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean, scale and beta, by float32's operations, as PyTorch has them; the first block writes stats (3, C) if asked for."""
    mean, var, rstd = floats(running_mean_at, C), floats(running_var_at, C), np.empty(C, np.float32)
    for c in range(C):
        rstd[c] = np.float32(1) / math.sqrt(var[c] + np.float32(eps))
    if stats_at and first == 0:
        stats = floats(stats_at, (3, C))
        for c in range(C):
            stats[0, c], stats[1, c], stats[2, c] = mean[c], np.float32(0), rstd[c]
    return mean, rstd * vector_or(gamma_at, C, 1.0), vector_or(beta_at, C, 0.0)


@inline
def _normalize_operands(
    first, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps
) -> Any:  # fmt: skip
    """x, mean (2, C), scale, beta and y; a mean that is known has no second part."""
    known, scale, beta = _known(first, gamma_at, beta_at, running_mean_at, running_var_at, stats_at, C, eps)
    mean = np.zeros((2, C), np.float32)
    for c in range(C):
        mean[0, c] = known[c]
    return planes(x_at, N, C, S), mean, scale, beta, planes(y_at, N, C, S)


@kernel
def _normalize_tiles(
    first, last, group, parts, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps, kind,
    residual_at,
) -> None:  # fmt: skip
    of = _normalize_operands(first, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps)
    _tiles.normalize(first, last, group, parts, *of, kind, planes_or_none(residual_at, N, C, S))


@kernel
def _normalize_planes(
    first, last, blocks, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps, kind,
    residual_at,
) -> None:  # fmt: skip
    of = _normalize_operands(first, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps)
    _planes.normalize(first, last, blocks, *of, kind, planes_or_none(residual_at, N, C, S), None)


@kernel
def _normalize_lines(
    first, last, blocks, rows, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps, kind,
    residual_at,
) -> None:  # fmt: skip
    of = _normalize_operands(first, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps)
    lines.normalize(first, last, blocks, rows, *of, kind, planes_or_none(residual_at, N, C, S), None)


@kernel
def _normalize_small_planes(
    first, last, blocks, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps, kind,
    residual_at,
) -> None:  # fmt: skip
    """No activation, no residual. Plane by plane, which LLVM's vectoriser does best: the length is the same for all."""
    mean, scale, beta = _known(first, gamma_at, beta_at, running_mean_at, running_var_at, stats_at, C, eps)
    x, y = floats(x_at, (N * C, S)), floats(y_at, (N * C, S))
    start, end = N * C * first // blocks, N * C * last // blocks
    c = start % C
    for plane in range(start, end):
        about, slope, shift = mean[c], scale[c], beta[c]
        for s in range(S):
            y[plane, s] = (x[plane, s] - about) * slope + shift
        c = c + 1 if c + 1 < C else 0


@kernel
def _normalize_rows(
    first, last, blocks, x_at, gamma_at, beta_at, y_at, running_mean_at, running_var_at, stats_at, N, C, S, eps, kind,
    residual_at,
) -> None:  # fmt: skip
    """No activation, no residual. Rows of channels, S = 1: several a line where they are short, else a piece of each."""
    mean, scale, beta = _known(first, gamma_at, beta_at, running_mean_at, running_var_at, stats_at, C, eps)
    x, y = floats(x_at, (1, N, C)), floats(y_at, (1, N, C))
    rows, piece, at = max(1, _tiles.WIDE // C), min(C, _tiles.WIDE), lines.parameters(max(C, _tiles.WIDE), x)
    start, end = N * first // blocks, N * last // blocks
    for c0 in range(0, C, piece):
        c1 = min(c0 + piece, C)
        lines.repeat_known(at, mean[c0:c1], scale[c0:c1], beta[c0:c1])
        for n in range(start, end, rows):
            size = min(rows, end - n) * (c1 - c0)
            lines.normalize_known(line_of(x, 0, n, c0, size), at, line_of(y, 0, n, c0, size), y)
    streamed()


moving(Moves(("x_at",)), _row_sums)
moving(Moves(("x_at", "residual_at"), ("y_at",)), _forward, _forward_planes, _row_results)
moving(Moves(("x_at", "residual_at"), ("y_at",)), _normalize_tiles, _normalize_planes, _normalize_lines)
moving(Moves(("x_at",), ("y_at",)), _normalize_small_planes, _normalize_rows)
moving(Moves(("dy_at", "x_at", "beside_at"), ("passed_at",)), _row_gradient_sums)
moving(Moves(("dy_at", "x_at", "beside_at"), ("dx_at", "dresidual_at")), _backward, _backward_planes)
moving(Moves(("dy_at", "x_at", "result_at"), ("dx_at",)), _row_gradients)
moving(Moves(("dy_at", "x_at"), ("dx_at",)), _inference_tiles, _inference_planes, _inference_rows)


@functools.lru_cache(1024)
def _plans(N: int, C: int, S: int) -> tuple[BatchNormPlan, BatchNormPlan]:
    """The plans of `batch_norm.forward` and `batch_norm.backward`."""
    strides = 4 * C * S, 4 * S, 4
    of = Layout((N, C, S), 4, (strides, strides))
    return plan_forward(of), plan_backward(of._replace(strides=(strides, strides, strides)))


def trains(N: int, C: int, S: int) -> bool:
    """True for what `forward` and `backward` take: channels that are done whole, and rows of channels."""
    return S == 1 or _plans(N, C, S)[0].whole is not None


def forward(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float, momentum: float, activation: str | None = None, residual: int | None = None,
) -> None:  # fmt: skip
    """`batch_norm.forward`; stats (4, C): mean (2, C), rstd, var."""
    plan, _ = _plans(N, C, S)
    fused = KINDS[activation], residual
    operands = x, gamma, beta, y, stats, running_mean, running_var, N, C, S, float(eps), float(momentum)
    if plan.whole is None:
        _forward_rows(plan, fused, *operands)
        return
    of = plan.whole
    run(_forward if of.loops == "tiles" else _forward_planes, of.blocks, 12 * N * C * S, *of.told, *operands, *fused)


def _forward_rows(plan, fused, x, gamma, beta, y, stats, running_mean, running_var, N, C, S, eps, momentum) -> None:
    of, nbytes, m = plan.sums, 4 * N * C * S, float(N * S)
    shift, partial = np.empty(C), np.empty((of.partial, 2, C))
    _row_shifts(x, N, C, S, shift)
    for again in (False, True):
        run(_row_sums, of.blocks, nbytes, *of.told, x, N, C, S, shift, partial)
        if not _row_statistics(partial, shift, again, stats, running_mean, running_var, C, m, eps, momentum):
            break
    of = plan.result
    run(_row_results, of.blocks, 2 * nbytes, *of.told, x, gamma, beta, y, stats, N, C, S, *fused)


def backward(
    dy: int, x: int, stats: int, gamma: int, dx: int, dgamma: int, dbeta: int, N: int, C: int, S: int,
    *, activation: str | None = None, beta: int = 0, beside: int | None = None, dresidual: int | None = None,
) -> None:  # fmt: skip
    """`batch_norm.backward`; of `stats` three rows count. beside: the residual, for "relu" the result."""
    _, plan = _plans(N, C, S)
    operands = dy, x, stats, gamma, dx, dgamma, dbeta, N, C, S
    fused = KINDS[activation], beta, beside, dresidual
    of = plan.whole
    if of is not None:
        kernel = _backward if of.loops == "tiles" else _backward_planes
        run(kernel, of.blocks, 20 * N * C * S, *of.told, *operands, *fused)
        return
    _backward_rows(plan, fused, *operands)


def _backward_rows(plan, fused, dy, x, stats, gamma, dx, dgamma, dbeta, N, C, S) -> None:
    of, nbytes, (kind, beta, beside, passed) = plan.sums, 4 * N * C * S, fused
    if passed is None and kind is not None and kind is not RELU:  # computed once, and kept in dx
        passed = dx
    partial = np.empty((of.partial, 2, C))
    run(_row_gradient_sums, of.blocks, 2 * nbytes, *of.told, dy, x, stats, gamma, N, C, S, partial, kind, beta, beside, passed)
    _finish_gradients(partial, stats, dgamma, dbeta, C)
    if passed is not None:
        dy, kind, beside = passed, None, None
    of = plan.result
    run(_row_gradients, of.blocks, 3 * nbytes, *of.told, dy, x, stats, gamma, dx, dgamma, dbeta, N, C, S, kind, beside)


def inference_backward(
    dy: int, x: int, stats: int, gamma: int, dx: int, dgamma: int, dbeta: int, N: int, C: int, S: int
) -> None:  # fmt: skip
    """`batch_norm.inference_backward`; of `stats` three rows count."""
    kernel, blocks, parts, way = _inference(N, C, S)
    partial = np.empty((parts, 2, C))
    run(kernel, blocks, 12 * N * C * S, *way, dy, x, stats, gamma, dx, N, C, S, partial)
    _finish_gradients(partial, stats, dgamma, dbeta, C)


@functools.lru_cache(1024)
def _inference(N: int, C: int, S: int) -> tuple[Any, int, int, tuple[int, ...]]:
    """The kernel of `inference_backward`, the number of its blocks and of their sums, and what it is told of them."""
    nbytes = 4 * N * C * S
    if S == 1:
        blocks = flat_blocks(nbytes, N // BLOCK_ROWS)
        return _inference_rows, blocks, blocks, (max(1, min(LINE // C, N)),)
    if S < PLANE:
        group, parts = tiles(N, C, S, 4)
        return _inference_tiles, -(-C // group) * parts, parts, (group,)
    blocks = flat_blocks(nbytes, N * C * S)
    return _inference_planes, blocks, blocks, ()


def normalize(
    x: int, gamma: int, beta: int, y: int, stats: int, running_mean: int, running_var: int, N: int, C: int, S: int,
    *, eps: float, activation: str | None = None, residual: int | None = None,
) -> None:  # fmt: skip
    """`batch_norm.normalize` by running statistics; stats (3, C), of mean, 0 and rstd, are written, or 0."""
    kernel, blocks, way = _evaluation(N, C, S, activation is not None or residual is not None)
    operands = *way, x, gamma, beta, y, running_mean, running_var, stats, N, C, S, float(eps), KINDS[activation], residual
    if 8 * N * C * S < 2 * threads.BYTES_PER_THREAD and threads.observer.get() is None:  # what `run` would do, in half its time
        kernel(0, blocks, *operands)
        return
    run(kernel, blocks, 8 * N * C * S, *operands)


@functools.lru_cache(1024)
def _evaluation(N: int, C: int, S: int, fused: bool) -> tuple[Any, int, tuple[int, ...]]:
    """The kernel of `normalize`, the number of its blocks, and what it is told of them."""
    nbytes = 4 * N * C * S
    if S > SMALL_PLANE:
        blocks = flat_blocks(nbytes, N * C * S)
        return _normalize_planes, blocks, (blocks,)
    if fused and S == 1:
        blocks = flat_blocks(nbytes, N)
        return _normalize_lines, blocks, (blocks, max(1, min(LINE // C, N)))
    if not fused and (S == 1 or S >= FEWEST_OF_A_PLANE):
        blocks = flat_blocks(nbytes, N if S == 1 else N * C)
        return _normalize_rows if S == 1 else _normalize_small_planes, blocks, (blocks,)
    group, parts = tiles(N, C, S, 4)
    return _normalize_tiles, -(-C // group) * parts, (group, parts)
