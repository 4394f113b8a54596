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

How work is cut into blocks (`_batch_norm/cut.py`) depends on shapes and strides alone; blocks are merged in order.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._batch_norm import cut, lines, lines_fused, planes, planes_fused, tiles
from ._batch_norm.statistics import better_shifts, finish_all, finish_gradients, first_means, merge
from ._numba.compile import kernel
from ._numba.elements import store, to_accumulate
from ._numba.threads import run


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


# ---------------------------------------------------------------------------------------------- split: sums and results
def _merged(partial: np.ndarray) -> np.ndarray:
    """The sum over the blocks of partial (blocks, 2, C)."""
    if len(partial) == 1:
        return partial[0]
    sums = np.empty(partial.shape[1:])
    merge(partial, sums)
    return sums


def _sum_deviations(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sum (x - shift) and sum (x - shift)^2 of every channel: (2, C) float64."""
    C = x.shape[1]
    group, parts, (seen,) = cut.tiled(x)
    partial = np.empty((parts if group else cut.blocks(x), 2, C))
    if group:
        run(tiles.sums, -(-C // group) * parts, x.nbytes, group, seen, shift, partial)
    elif cut.in_rows(x):
        run(lines.sums, len(partial), x.nbytes, cut.rows_per_line(cut.SUM_LINE, x), x, shift, partial)
    else:
        run(planes.sums, len(partial), x.nbytes, x, shift, partial)
    return _merged(partial)


def _sum_gradients(dy: np.ndarray, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """sum dy and sum dy (x - mean) of every channel: (2, C) float64."""
    C, cost, no_dx = x.shape[1], 2 * x.nbytes, (mean[0], np.empty((0, 0, 0), x.dtype))
    group, parts, seen = cut.tiled(dy, x)
    partial = np.empty((parts if group else cut.blocks(x), 2, C))
    if group:
        run(tiles.gradient_sums, -(-C // group) * parts, cost, group, *seen, mean, *no_dx, partial)
    elif cut.in_rows(dy, x):
        rows = cut.rows_per_line(cut.SUM_LINE, dy, x)
        run(lines.gradient_sums, len(partial), cost, rows, dy, x, mean, *no_dx, partial)
    else:
        run(planes.gradient_sums, len(partial), cost, dy, x, mean, *no_dx, partial)
    return _merged(partial)


def _sum_and_scale_gradients(dy, x, mean, scale, dx):
    """As `_sum_gradients`, and dx = scale dy. No channel has to be done whole: in the order of memory."""
    C, cost, operands = x.shape[1], 3 * x.nbytes, (dy, x, mean, scale, dx)
    if cut.in_rows(dy, x, dx):
        partial, rows = np.empty((cut.blocks(x), 2, C)), cut.rows_per_line(cut.SUM_AND_RESULT_LINE, dy, x, dx)
        run(lines.gradient_sums, len(partial), cost, rows, *operands, partial)
    elif x.shape[2] < cut.PLANE and cut.small_planes(dy, x, dx):
        group, parts = cut.tiles(*x.shape, x.itemsize)
        partial = np.empty((parts, 2, C))
        run(tiles.gradient_sums, -(-C // group) * parts, cost, group, *operands, partial)
    else:
        partial = np.empty((cut.blocks(x), 2, C))
        run(planes.gradient_sums, len(partial), cost, *operands, partial)
    return _merged(partial)


def _normalize(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, beta: np.ndarray, y: np.ndarray) -> None:
    blocks, cost = cut.blocks(x), 2 * x.nbytes
    if cut.in_rows(x, y):
        run(lines.normalize, blocks, cost, blocks, cut.rows_per_line(cut.LINE, x, y), x, mean, scale, beta, y)
    elif cut.small_planes(x, y):
        group, parts = cut.tiles(*x.shape, x.itemsize)
        run(tiles.normalize, -(-x.shape[1] // group) * parts, cost, group, parts, x, mean, scale, beta, y)
    else:
        run(planes.normalize, blocks, cost, blocks, x, mean, scale, beta, y)


def _apply(dy, x, mean, scale, b, k, dx):
    blocks, cost = cut.blocks(x), 3 * x.nbytes
    if cut.in_rows(dy, x, dx):
        run(lines.apply, blocks, cost, blocks, cut.rows_per_line(cut.LINE, dy, x, dx), dy, x, mean, scale, b, k, dx)
    elif cut.small_planes(dy, x, dx):
        group, parts = cut.tiles(*x.shape, x.itemsize)
        run(tiles.apply, -(-x.shape[1] // group) * parts, cost, group, parts, dy, x, mean, scale, b, k, dx)
    else:
        run(planes.apply, blocks, cost, blocks, dy, x, mean, scale, b, k, dx)


# ---------------------------------------------------------------------------------------------- with a residual or a mask
def _rows(C: int) -> int:
    """Rows of a line of `_batch_norm.lines_fused`."""
    return max(1, cut.LINE // max(C, 1))


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _bytes_of_lines(rows: int, rows_per_line: int, size: int) -> int:
    """Bytes for the bits of rows of `size` values; a line, perhaps the last one a shorter one, has bytes of its own."""
    return rows // rows_per_line * _bytes(rows_per_line * size) + _bytes(rows % rows_per_line * size)


def mask_size(x: np.ndarray) -> int:
    """Bytes of the mask of x (N, C, …), by its shape alone: an eighth of a byte a value, and what fills up bytes."""
    N, C, *positions = x.shape
    S = math.prod(positions)
    N, S = (1, N) if S == 1 else (N, S)
    return max(N * C * _bytes(S), _bytes_of_lines(N * S, _rows(C), C))


def _turned(*arrays: Any) -> tuple[Any, ...]:
    """(N, C, 1) as (1, C, N), so that there are eight neighbours to share a byte."""
    return arrays if arrays[0].shape[2] != 1 else tuple(None if a is None else a.transpose(2, 1, 0) for a in arrays)


def _given(x: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    """An operand that may be None, as the kernels take it."""
    return np.empty((0, 0, 0), x.dtype) if other is None else other


def _given_mask(mask: np.ndarray | None) -> np.ndarray:
    return np.empty((0, 0, 0), np.uint8) if mask is None else mask.reshape(1, 1, -1)


def _new_mask(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """`mask` to be written, what the layout of x does not need of it set to 0."""
    if mask is not None:
        N, C, S = x.shape
        if cut.in_rows(x):
            used = _bytes_of_lines(N * S, _rows(C), C)
        else:
            used = N * _bytes_of_lines(C, _tile(x) or 1, S)
        mask[used:] = 0
    return _given_mask(mask)


def _tile(x: np.ndarray) -> int:
    """Channels whose small planes are gone through at once; 0 where x has another layout, or they are not done whole."""
    group, parts, _ = (0, 1, ()) if cut.in_rows(x) else cut.tiled(x)
    return group if parts == 1 else 0


def _whole_fused(x: np.ndarray) -> tuple[int, bool, tuple[np.ndarray, ...]]:
    """As `whole`, where the layout of x alone decides, and rows are never cut."""
    group = _tile(x)
    return (group, True, (x,)) if group else (0 if cut.small_planes(x) else cut.whole_planes(x), False, (x,))


def _pieces(x: np.ndarray) -> int:
    """Blocks of a split into whole pieces of the mask."""
    N, C, S = x.shape
    pieces = -(-(N * S) // _rows(C)) if cut.in_rows(x) else N * -(-S // planes.RUN)
    return max(1, min(cut.MOST_BLOCKS, x.nbytes // cut.BLOCK_BYTES, pieces))


def _fused_normalize(x, mean, scale, beta, y, residual, mask):
    x, y, residual = _turned(x, y, residual)
    operands, blocks, cost = (x, mean, scale, beta, _given(x, residual), y, _new_mask(x, mask)), _pieces(x), 3 * x.nbytes
    if cut.in_rows(x):
        run(lines_fused.rows_normalize, blocks, cost, blocks, _rows(x.shape[1]), *operands)
    elif group := _tile(x):
        run(lines_fused.tile_normalize, -(-x.shape[1] // group), cost, group, *operands)
    else:
        run(planes_fused.normalize, blocks, cost, blocks, *operands)


def _fused_gradient_sums(dy, x, mean, mask):
    """sum dy and sum dy (x - mean) of every channel, of the dy that passes: (2, C) float64."""
    dy, x = _turned(dy, x)
    C, cost = x.shape[1], 2 * x.nbytes
    sums, operands = np.empty((2, C)), (dy, x, _given_mask(mask), mean)
    if group := _tile(x):
        run(lines_fused.tile_gradient_sums, -(-C // group), cost, group, *operands, sums)
        return sums
    partial = np.empty((_pieces(x), 2, C))
    if cut.in_rows(x):
        run(lines_fused.rows_gradient_sums, len(partial), cost, _rows(C), *operands, partial)
    else:
        run(planes_fused.gradient_sums, len(partial), cost, *operands, partial)
    return _merged(partial)


def _fused_apply(dy, x, mean, scale, b, k, trained, dx, mask, dresidual):
    dy, x, dx, dresidual = _turned(dy, x, dx, dresidual)
    operands = dy, x, _given_mask(mask), mean, scale, b, k, trained, dx, _given(x, dresidual)
    blocks, cost = _pieces(x), 4 * x.nbytes
    if cut.in_rows(x):
        run(lines_fused.rows_apply, blocks, cost, blocks, _rows(x.shape[1]), *operands)
    elif group := _tile(x):
        run(lines_fused.tile_apply, -(-x.shape[1] // group), cost, group, *operands)
    else:
        run(planes_fused.apply, blocks, cost, blocks, *operands)


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
    C, m = x.shape[1], float(x.shape[0] * x.shape[2])
    new_mean, new_var = _running(running_mean, var.dtype), _running(running_var, var.dtype)
    if m == 0:
        shift, sums = np.zeros(C), np.zeros((2, C))
    else:
        shift = np.empty(C)
        first_means(x, shift)
        sums = _sum_deviations(x, shift)
        if better_shifts(shift, sums, m):
            sums = _sum_deviations(x, shift)
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
    if x.size == 0:
        return
    C, dtype = x.shape[1], rstd.dtype
    scale = np.ascontiguousarray(rstd if gamma is None else rstd * to_accumulate(gamma, C, dtype, 1.0))
    beta = to_accumulate(beta, C, dtype, 0.0)
    if residual is None and mask is None:
        _normalize(x, mean, scale, beta, y)
    else:
        _fused_normalize(x, mean, scale, beta, y, residual, mask)


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
    group, tiled, seen = _whole_fused(x) if fused else cut.whole(x, y)
    if not group:
        statistics(x, mean, var, rstd, running_mean, running_var, eps=eps, momentum=momentum)
        normalize(x, mean, rstd, gamma, beta, y, residual=residual, mask=mask)
        return
    C, dtype = x.shape[1], var.dtype
    new_mean, new_var = _running(running_mean, dtype), _running(running_var, dtype)
    gamma, beta = to_accumulate(gamma, C, dtype, 1.0), to_accumulate(beta, C, dtype, 0.0)
    results = mean, var, rstd, new_mean, new_var, float(eps), float(momentum)
    if fused:
        kernel = lines_fused.tile_forward if tiled else planes_fused.forward
        operands: tuple[Any, ...] = x, gamma, beta, _given(x, residual), y, _new_mask(x, mask)
    else:
        kernel = tiles.forward if tiled else planes.forward
        operands = seen[0], gamma, beta, seen[1]
    run(kernel, -(-C // group), 3 * x.nbytes, group, *operands, *results)
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
    if x.size == 0:
        sums = np.zeros((2, x.shape[1]))
    else:
        sums = _sum_gradients(dy, x, mean) if mask is None else _fused_gradient_sums(dy, x, mean, mask)
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
    if x.size == 0:
        return
    count = float(np.asarray(count).item())
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    b = (dbeta / count).astype(rstd.dtype)
    k = (rstd * (dgamma / count)).astype(rstd.dtype)
    if mask is not None or dresidual is not None:
        _fused_apply(dy, x, mean, scale, b, k, True, dx, mask, dresidual)
        return
    _apply(dy, x, mean, scale, b, k, dx)


def _backward_whole(dy, x, mean, rstd, gamma, dx, dgamma, dbeta):
    """Both parts of a backward pass without a mask, if channels are done whole; True if they were."""
    group, tiled, seen = cut.whole(dy, x, dx)
    if not group:
        return False
    dy, x, dx = seen
    gamma = to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    kernel = tiles.backward if tiled else planes.backward
    run(kernel, -(-rstd.size // group), 5 * x.nbytes, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta)
    return True


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
    if not fused and _backward_whole(dy, x, mean, rstd, gamma, dx, dgamma, dbeta):
        return
    if fused:
        x, dy, dx, dresidual = _turned(x, dy, dx, dresidual)
    group, tiled, _ = _whole_fused(x) if fused else (0, False, ())
    if not group:
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta, mask=mask)
        count = x.shape[0] * x.shape[2]
        backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx, mask=mask, dresidual=dresidual)
        return
    gamma = to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    kernel = lines_fused.tile_backward if tiled else planes_fused.backward
    operands = dy, x, _given_mask(mask), mean, rstd, gamma, dx, _given(x, dresidual)
    run(kernel, -(-rstd.size // group), 5 * x.nbytes, group, *operands, dgamma, dbeta)


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
    none = np.zeros_like(rstd)
    _fused_apply(dy, x, mean, scale, none, none, False, dx, mask, dresidual)
