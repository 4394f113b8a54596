"""Batch normalisation over axes 0 and 2 of (N, C, S), on the CPU. m = N S values a channel.

    mean = sum x / m,   var = sum (x - mean)^2 / m,   rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) rstd,      y = (x - mean) (rstd gamma) + beta
    dbeta = sum dy,   dgamma = sum dy x_hat
    dx = gamma rstd (dy - dbeta / m - x_hat dgamma / m)

    statistics, backward_reduce      read x (and dy)                    1 pass  (2)
    normalize, backward_apply        read x (and dy), write y or dx     2 passes (3)
    forward, backward                the channel read again in cache    2 passes (3); 3 (5) where it does not fit

A pass is one read or one write of the whole tensor. `mean` is kept as two numbers, mean[0] the rounded mean and mean[1] what
the rounding left, so that x - mean is right where the mean is large. Sums are taken in float64 of x - shift, where `shift`
is the mean of a few first values of the channel: with d = x - shift, mean = shift + sum d / m and
var = sum d^2 / m - (sum d / m)^2. What that difference cancels is (mean - shift)^2 / var; where this is large, which needs
first values unlike the rest, the sums are taken again about the mean just found.

Two layouts: *planes*, S adjacent (NCHW), and *rows*, C adjacent (channels-last); any other strides go through planes, a
run of values copied at a time. Blocks of work depend on the shape alone and are merged in order.
"""

from __future__ import annotations

import math

import numpy as np

from ._elements import accumulate_dtype, gather, load, place, scatter, store, to_accumulate
from ._jit import inline, kernel, reduction
from ._threads import run

# Values in a run that is copied to be adjacent, and in a run whose sum is taken at once.
RUN = 2048
# Values of a channel whose mean is the shift.
SHIFT_VALUES = 64
# Fewer channels than this are split over blocks, each a part of every channel; more go whole to one thread each.
FEW_CHANNELS = 16
# Blocks of a split; it bounds the memory of partial sums.
MOST_BLOCKS = 32
# (mean - shift)^2 / var above which the sums are taken again: cancels at most 6 bits of float64.
FAR_SHIFT = 64.0


# ---------------------------------------------------------------------------------------------- helpers
@inline
def _run_scratch(x):
    """Room for one run of a plane that is not adjacent in memory; empty where planes are adjacent."""
    return np.empty(0 if x.strides[2] == x.itemsize else RUN, x.dtype)


@reduction
def _deviation_sums(x, shift):
    """sum (x - shift) and sum (x - shift)^2 of a run."""
    total, square = 0.0, 0.0
    for i in range(x.size):
        d = np.float64(load(x, i)) - shift
        total += d
        square += d * d
    return total, square


@reduction
def _gradient_sums(dy, x, mean, rest):
    """sum dy and sum dy (x - mean) of a run."""
    total, product = 0.0, 0.0
    for i in range(x.size):
        g = np.float64(load(dy, i))
        total += g
        product += g * np.float64((load(x, i) - mean) - rest)
    return total, product


@inline
def _normalize_run(x, mean, rest, scale, beta, y):
    for i in range(x.size):
        store(y, i, ((load(x, i) - mean) - rest) * scale + beta)


@inline
def _apply_run(dy, x, mean, rest, scale, b, k, dx):
    for i in range(x.size):
        store(dx, i, scale * ((load(dy, i) - b) - ((load(x, i) - mean) - rest) * k))


@inline
def _first_mean(x, c):
    """The mean of the first values of channel c, or 0 if that is no finite number."""
    N, S = x.shape[0], x.shape[2]
    total, count = 0.0, 0
    for n in range(N):
        row = x[n, c]
        for s in range(min(S, SHIFT_VALUES - count)):
            total += np.float64(load(row, s))
            count += 1
        if count >= SHIFT_VALUES:
            break
    mean = total / count
    return mean if math.isfinite(mean) else 0.0


@inline
def _finish_channel(c, shift, total, square, m, eps, momentum, mean, var, rstd, running_mean, running_var):
    """The statistics of a channel from its sums about `shift`."""
    of = var.dtype.type
    d = total / m
    mu = shift + d
    variance = square / m - d * d
    variance = 0.0 if variance < 0.0 else variance
    mean[0, c] = of(mu)
    rest = (shift - np.float64(mean[0, c])) + d
    mean[1, c] = of(rest) if math.isfinite(rest) else of(0)
    var[c] = of(variance)
    rstd[c] = of(1.0 / math.sqrt(variance + eps))
    if running_mean.size:
        running_mean[c] = of((1.0 - momentum) * running_mean[c] + momentum * mu)
    if running_var.size:
        running_var[c] = of((1.0 - momentum) * running_var[c] + momentum * (variance * (m / (m - 1.0))))


@inline
def _far(shift, total, square, m):
    """A better shift than `shift` if that is so far from the mean that var would cancel; else NaN."""
    d = total / m
    return shift + d if d * d > FAR_SHIFT * (square / m - d * d) and math.isfinite(d) else math.nan


@inline
def _channel_sums(x, c, shift, scratch):
    """sum (x - shift) and sum (x - shift)^2 of a channel."""
    total, square = 0.0, 0.0
    for n in range(x.shape[0]):
        for s in range(0, x.shape[2], RUN):
            sums = _deviation_sums(gather(x[n, c, s : s + RUN], scratch), shift)
            total, square = total + sums[0], square + sums[1]
    return total, square


# ---------------------------------------------------------------------------------------------- whole channels
@kernel
def _forward_channels(
    first, last, group, x, gamma, beta, y, mean, var, rstd, running_mean, running_var, eps, momentum
):
    """Statistics and y of the channel groups first…last-1, `group` channels each, a group while it is in cache."""
    N, C, S = x.shape
    m = np.float64(N * S)
    x_scratch, y_scratch = _run_scratch(x), _run_scratch(y)
    shift, total, square = np.empty(group), np.empty(group), np.empty(group)
    for block in range(first, last):
        c0 = block * group
        c1 = min(c0 + group, C)
        for c in range(c0, c1):
            shift[c - c0], total[c - c0], square[c - c0] = _first_mean(x, c), 0.0, 0.0
        for n in range(N):
            for c in range(c0, c1):
                for s in range(0, S, RUN):
                    sums = _deviation_sums(gather(x[n, c, s : s + RUN], x_scratch), shift[c - c0])
                    total[c - c0] += sums[0]
                    square[c - c0] += sums[1]
        for c in range(c0, c1):
            j = c - c0
            better = _far(shift[j], total[j], square[j], m)
            if better == better:
                shift[j] = better
                total[j], square[j] = _channel_sums(x, c, better, x_scratch)
            _finish_channel(
                c, shift[j], total[j], square[j], m, eps, momentum, mean, var, rstd, running_mean, running_var
            )
        for n in range(N):
            for c in range(c0, c1):
                _normalize_plane(x, n, c, 0, S, mean, rstd[c] * gamma[c], beta[c], y, x_scratch, y_scratch)


@kernel
def _backward_channels(first, last, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta):
    """dgamma, dbeta and dx of the channel groups first…last-1, a group while it is in cache."""
    N, C, S = x.shape
    m = np.float64(N * S)
    of = rstd.dtype.type
    dy_scratch, x_scratch, dx_scratch = _run_scratch(dy), _run_scratch(x), _run_scratch(dx)
    total, product = np.empty(group), np.empty(group)
    for block in range(first, last):
        c0 = block * group
        c1 = min(c0 + group, C)
        total[:] = 0.0
        product[:] = 0.0
        for n in range(N):
            for c in range(c0, c1):
                for s in range(0, S, RUN):
                    dy_run = gather(dy[n, c, s : s + RUN], dy_scratch)
                    x_run = gather(x[n, c, s : s + RUN], x_scratch)
                    sums = _gradient_sums(dy_run, x_run, mean[0, c], mean[1, c])
                    total[c - c0] += sums[0]
                    product[c - c0] += sums[1]
        for c in range(c0, c1):
            dbeta[c] = of(total[c - c0])
            dgamma[c] = of(product[c - c0] * rstd[c])
        for n in range(N):
            for c in range(c0, c1):
                b = of(total[c - c0] / m)
                k = of(product[c - c0] * rstd[c] * rstd[c] / m)
                scale = rstd[c] * gamma[c]
                _apply_plane(dy, x, n, c, 0, S, mean, scale, b, k, dx, dy_scratch, x_scratch, dx_scratch)


@inline
def _normalize_plane(x, n, c, s0, s1, mean, scale, beta, y, x_scratch, y_scratch):
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        x_run, y_run = gather(x[n, c, s:end], x_scratch), place(y[n, c, s:end], y_scratch)
        _normalize_run(x_run, mean[0, c], mean[1, c], scale, beta, y_run)
        scatter(y[n, c, s:end], y_scratch)


@inline
def _apply_plane(dy, x, n, c, s0, s1, mean, scale, b, k, dx, dy_scratch, x_scratch, dx_scratch):
    for s in range(s0, s1, RUN):
        end = min(s + RUN, s1)
        dy_run, x_run = gather(dy[n, c, s:end], dy_scratch), gather(x[n, c, s:end], x_scratch)
        dx_run = place(dx[n, c, s:end], dx_scratch)
        _apply_run(dy_run, x_run, mean[0, c], mean[1, c], scale, b, k, dx_run)
        scatter(dx[n, c, s:end], dx_scratch)


# ---------------------------------------------------------------------------------------------- split: sums
# A block is the values m b / B … m (b + 1) / B - 1 of every channel, value n S + s.
@kernel
def _plane_sums(first, last, x, shift, partial):
    N, C, S = x.shape
    B, m = partial.shape[0], N * S
    scratch = _run_scratch(x)
    for b in range(first, last):
        v0, v1 = m * b // B, m * (b + 1) // B
        for c in range(C):
            total, square, v = 0.0, 0.0, v0
            while v < v1:
                n, s = v // S, v % S
                end = min(s + RUN, S, s + v1 - v)
                sums = _deviation_sums(gather(x[n, c, s:end], scratch), shift[c])
                total, square, v = total + sums[0], square + sums[1], v + end - s
            partial[b, 0, c], partial[b, 1, c] = total, square


@kernel
def _row_sums(first, last, x, shift, partial):
    N, C, S = x.shape
    B, m = partial.shape[0], N * S
    none = np.empty(0, x.dtype)
    for b in range(first, last):
        total, square = partial[b, 0], partial[b, 1]
        total[:] = 0.0
        square[:] = 0.0
        for v in range(m * b // B, m * (b + 1) // B):
            x_row = gather(x[v // S, :, v % S], none)
            for c in range(C):
                d = np.float64(load(x_row, c)) - shift[c]
                total[c] += d
                square[c] += d * d


@kernel
def _plane_gradient_sums(first, last, dy, x, mean, partial):
    N, C, S = x.shape
    B, m = partial.shape[0], N * S
    dy_scratch, x_scratch = _run_scratch(dy), _run_scratch(x)
    for b in range(first, last):
        v0, v1 = m * b // B, m * (b + 1) // B
        for c in range(C):
            total, product, v = 0.0, 0.0, v0
            while v < v1:
                n, s = v // S, v % S
                end = min(s + RUN, S, s + v1 - v)
                dy_run, x_run = gather(dy[n, c, s:end], dy_scratch), gather(x[n, c, s:end], x_scratch)
                sums = _gradient_sums(dy_run, x_run, mean[0, c], mean[1, c])
                total, product, v = total + sums[0], product + sums[1], v + end - s
            partial[b, 0, c], partial[b, 1, c] = total, product


@kernel
def _row_gradient_sums(first, last, dy, x, mean, partial):
    N, C, S = x.shape
    B, m = partial.shape[0], N * S
    dy_none, x_none = np.empty(0, dy.dtype), np.empty(0, x.dtype)
    for b in range(first, last):
        total, product = partial[b, 0], partial[b, 1]
        total[:] = 0.0
        product[:] = 0.0
        for v in range(m * b // B, m * (b + 1) // B):
            dy_row, x_row = gather(dy[v // S, :, v % S], dy_none), gather(x[v // S, :, v % S], x_none)
            for c in range(C):
                g = np.float64(load(dy_row, c))
                total[c] += g
                product[c] += g * np.float64((load(x_row, c) - mean[0, c]) - mean[1, c])


# ---------------------------------------------------------------------------------------------- split: merges
@kernel
def _shifts(x, shift):
    for c in range(x.shape[1]):
        shift[c] = _first_mean(x, c)


@kernel
def _merge(partial):
    """partial[0] = the sum of all partial[b], in order."""
    for b in range(1, partial.shape[0]):
        for i in range(2):
            for c in range(partial.shape[2]):
                partial[0, i, c] += partial[b, i, c]


@kernel
def _better_shifts(shift, sums, m):
    """Replace every shift that is too far from its channel's mean; True if there was one."""
    found = False
    for c in range(shift.size):
        better = _far(shift[c], sums[0, c], sums[1, c], m)
        if better == better:
            shift[c] = better
            found = True
    return found


@kernel
def _finish_statistics(shift, sums, m, eps, momentum, mean, var, rstd, running_mean, running_var):
    for c in range(shift.size):
        _finish_channel(
            c, shift[c], sums[0, c], sums[1, c], m, eps, momentum, mean, var, rstd, running_mean, running_var
        )


@kernel
def _finish_gradient(sums, rstd, dgamma, dbeta):
    of = rstd.dtype.type
    for c in range(rstd.size):
        dbeta[c] = of(sums[0, c])
        dgamma[c] = of(sums[1, c] * rstd[c])


# ---------------------------------------------------------------------------------------------- split: results
@kernel
def _normalize_planes(first, last, blocks, x, mean, scale, beta, y):
    N, C, S = x.shape
    m = N * S
    x_scratch, y_scratch = _run_scratch(x), _run_scratch(y)
    for b in range(first, last):
        v, v1 = m * b // blocks, m * (b + 1) // blocks
        while v < v1:
            n, s = v // S, v % S
            end = min(S, s + v1 - v)
            for c in range(C):
                _normalize_plane(x, n, c, s, end, mean, scale[c], beta[c], y, x_scratch, y_scratch)
            v += end - s


@kernel
def _normalize_rows(first, last, blocks, x, mean, scale, beta, y):
    N, C, S = x.shape
    m = N * S
    x_none, y_none = np.empty(0, x.dtype), np.empty(0, y.dtype)
    for b in range(first, last):
        for v in range(m * b // blocks, m * (b + 1) // blocks):
            x_row, y_row = gather(x[v // S, :, v % S], x_none), place(y[v // S, :, v % S], y_none)
            for c in range(C):
                store(y_row, c, ((load(x_row, c) - mean[0, c]) - mean[1, c]) * scale[c] + beta[c])


@kernel
def _apply_planes(first, last, blocks, dy, x, mean, scale, b, k, dx):
    N, C, S = x.shape
    m = N * S
    dy_scratch, x_scratch, dx_scratch = _run_scratch(dy), _run_scratch(x), _run_scratch(dx)
    for block in range(first, last):
        v, v1 = m * block // blocks, m * (block + 1) // blocks
        while v < v1:
            n, s = v // S, v % S
            end = min(S, s + v1 - v)
            for c in range(C):
                _apply_plane(
                    dy, x, n, c, s, end, mean, scale[c], b[c], k[c], dx, dy_scratch, x_scratch, dx_scratch
                )
            v += end - s


@kernel
def _apply_rows(first, last, blocks, dy, x, mean, scale, b, k, dx):
    N, C, S = x.shape
    m = N * S
    dy_none, x_none, dx_none = np.empty(0, dy.dtype), np.empty(0, x.dtype), np.empty(0, dx.dtype)
    for block in range(first, last):
        for v in range(m * block // blocks, m * (block + 1) // blocks):
            n, s = v // S, v % S
            dy_row, x_row, dx_row = gather(dy[n, :, s], dy_none), gather(x[n, :, s], x_none), place(dx[n, :, s], dx_none)
            for c in range(C):
                x_c = (load(x_row, c) - mean[0, c]) - mean[1, c]
                store(dx_row, c, scale[c] * ((load(dy_row, c) - b[c]) - x_c * k[c]))


# ---------------------------------------------------------------------------------------------- launchers
def _in_rows(*arrays: np.ndarray) -> bool:
    """True for channels-last: C adjacent in every array, and S not."""
    return all(
        a.strides[1] == a.itemsize and (a.shape[2] == 1 or a.strides[2] != a.itemsize) for a in arrays
    )


def _whole_channels(*arrays: np.ndarray) -> bool:
    """True where a thread takes channels whole: there are enough of them, in planes."""
    return arrays[0].shape[1] >= FEW_CHANNELS and not _in_rows(*arrays)


def _channel_group(x: np.ndarray) -> int:
    """Channels done together: enough for 4 KiB in a row of memory, few enough to stay in the second-level cache."""
    N, C, S = x.shape
    return max(1, min(4096 // (S * x.itemsize), (1 << 18) // (N * S * x.itemsize), C))


def _blocks(x: np.ndarray) -> int:
    """Blocks of a split, each of some RUN values a channel or more."""
    return max(1, min(MOST_BLOCKS, x.size // RUN))


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


def _sum_statistics(x: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sum (x - shift) and sum (x - shift)^2 of every channel: (2, C) float64."""
    partial = np.empty((_blocks(x), 2, x.shape[1]))
    run(_row_sums if _in_rows(x) else _plane_sums, len(partial), x.nbytes, x, shift, partial)
    _merge(partial)
    return partial[0]


def _sum_gradients(dy: np.ndarray, x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """sum dy and sum dy (x - mean) of every channel: (2, C) float64."""
    partial = np.empty((_blocks(x), 2, x.shape[1]))
    sums = _row_gradient_sums if _in_rows(dy, x) else _plane_gradient_sums
    run(sums, len(partial), 2 * x.nbytes, dy, x, mean, partial)
    _merge(partial)
    return partial[0]


def _normalize(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, beta: np.ndarray, y: np.ndarray) -> None:
    blocks = _blocks(x)
    run(_normalize_rows if _in_rows(x, y) else _normalize_planes, blocks, 2 * x.nbytes, blocks, x, mean, scale, beta, y)


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
    C, m = x.shape[1], float(x.shape[0] * x.shape[2])
    new_mean, new_var = _running(running_mean, var.dtype), _running(running_var, var.dtype)
    if m == 0:
        shift, sums = np.zeros(C), np.zeros((2, C))
    else:
        shift = np.empty(C)
        _shifts(x, shift)
        sums = _sum_statistics(x, shift)
        if _better_shifts(shift, sums, m):
            sums = _sum_statistics(x, shift)
    _finish_statistics(shift, sums, m, float(eps), float(momentum), mean, var, rstd, new_mean, new_var)
    _store_running(running_mean, new_mean)
    _store_running(running_var, new_var)


def normalize(
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    beta: np.ndarray | None,
    y: np.ndarray,
) -> None:
    """y = (x - mean) (rstd gamma) + beta."""
    if x.size:
        C, dtype = x.shape[1], rstd.dtype
        scale = rstd if gamma is None else rstd * to_accumulate(gamma, C, dtype, 1.0)
        _normalize(x, mean, np.ascontiguousarray(scale), to_accumulate(beta, C, dtype, 0.0), y)


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
) -> None:
    """`statistics`, then `normalize`."""
    if x.size == 0 or not _whole_channels(x, y):
        statistics(x, mean, var, rstd, running_mean, running_var, eps=eps, momentum=momentum)
        normalize(x, mean, rstd, gamma, beta, y)
        return
    C, dtype, group = x.shape[1], var.dtype, _channel_group(x)
    new_mean, new_var = _running(running_mean, dtype), _running(running_var, dtype)
    gamma, beta = to_accumulate(gamma, C, dtype, 1.0), to_accumulate(beta, C, dtype, 0.0)
    run(
        _forward_channels, -(-C // group), 3 * x.nbytes,
        group, x, gamma, beta, y, mean, var, rstd, new_mean, new_var, float(eps), float(momentum),
    )  # fmt: skip
    _store_running(running_mean, new_mean)
    _store_running(running_var, new_var)


def backward_reduce(
    dy: np.ndarray, x: np.ndarray, mean: np.ndarray, rstd: np.ndarray, dgamma: np.ndarray, dbeta: np.ndarray
) -> None:
    """dbeta = sum dy, dgamma = sum dy x_hat."""
    sums = _sum_gradients(dy, x, mean) if x.size else np.zeros((2, x.shape[1]))
    _finish_gradient(sums, rstd, dgamma, dbeta)


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
) -> None:
    """dx = gamma rstd (dy - dbeta / count - x_hat dgamma / count)."""
    if x.size == 0:
        return
    count = float(np.asarray(count).item())
    scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
    b = (dbeta / count).astype(rstd.dtype)
    k = (rstd * (dgamma / count)).astype(rstd.dtype)
    blocks = _blocks(x)
    apply = _apply_rows if _in_rows(dy, x, dx) else _apply_planes
    run(apply, blocks, 3 * x.nbytes, blocks, dy, x, mean, scale, b, k, dx)


def backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
) -> None:
    """`backward_reduce`, then `backward_apply` with count = m."""
    if x.size == 0 or not _whole_channels(x, dy, dx):
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, x.shape[0] * x.shape[2], dx)
        return
    C, group = x.shape[1], _channel_group(x)
    gamma = to_accumulate(gamma, C, rstd.dtype, 1.0)
    run(_backward_channels, -(-C // group), 5 * x.nbytes, group, dy, x, mean, rstd, gamma, dx, dgamma, dbeta)


def inference_backward(
    dy: np.ndarray,
    x: np.ndarray,
    mean: np.ndarray,
    rstd: np.ndarray,
    gamma: np.ndarray | None,
    dx: np.ndarray,
    dgamma: np.ndarray,
    dbeta: np.ndarray,
) -> None:
    """dx = dy gamma rstd, for statistics that do not depend on x; dgamma and dbeta as in `backward_reduce`."""
    backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
    if x.size:
        scale = rstd * to_accumulate(gamma, rstd.size, rstd.dtype, 1.0)
        _normalize(dy, np.zeros_like(mean), scale, np.zeros_like(rstd), dx)
