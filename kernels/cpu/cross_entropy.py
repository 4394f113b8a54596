"""Softmax cross entropy along the middle axis of (N, V, S), loss and gradient, on the CPU.

With class weights w (1 if there are none), label smoothing eps and target probabilities y (one-hot for a class index):

    q_c    = w_c ((1 - eps) y_c + eps / V),   W = sum_c q_c
    lse    = m + log sum_c exp(z_c - m),      m = max_c z_c
    loss   = W log sum_c exp(z_c - m) - sum_c q_c (z_c - m)        with 0 * inf = 0
    p_c    = exp(z_c - lse)
    dz_c   = g (W p_c - q_c),                 g = upstream / denominator

    forward             reads z (and y)              1 pass  (2)
    backward            reads z (and y), writes dz   2 passes (3)
    forward_backward    reads z (and y), writes dz   2 passes (3)

A pass is one read or one write of the whole tensor. Everything is computed in float32 (float64 for float64) with sums
merged in float64, and rounded once: the 1 is subtracted from p before that. `lse` is rounded, so that exp(z - lse) carries
a relative error of |lse| units in the last place; `backward` divides it out again, see `_normaliser`.

A row whose target is `ignore_index` has loss 0 and dz 0 whatever its logits are. One whose target is no class at all has
loss and dz NaN, and the smallest such row number n*S + s goes to `invalid`. Neither is ever used as an address.
"""

from __future__ import annotations

import math

import numpy as np

from ._elements import (
    accumulate_dtype,
    atomic_min,
    exp,
    gather,
    load,
    place,
    row_scratch,
    same_dtype,
    scatter,
    store,
    to_accumulate,
)
from ._jit import inline, kernel, reduction
from ._rows import CHUNK, exp_sum, exp_total, fill, row_max, scale_into
from ._threads import run


# ---------------------------------------------------------------------------------------------- helpers
@inline
def _normaliser(total, lse, ulp):
    """What to divide exp(z - lse) by: its sum over the row, if the rounding of `lse` explains that it is not 1, else 1."""
    return total if abs(total - 1.0) <= ulp * (2.0 * abs(np.float64(lse)) + 16.0) else 1.0


@reduction
def _smooth_chunk(z, shift, weight, first, last):
    zero = weight.dtype.type(0)
    total = zero
    for i in range(first, last):
        w = weight[i]
        total += zero if w == zero else w * (load(z, i) - shift)
    return total


@inline
def _smooth_sum(z, shift, weight):
    """sum_c w_c (z_c - shift), terms with weight 0 left out."""
    total = 0.0
    for first in range(0, z.size, CHUNK):
        total += np.float64(_smooth_chunk(z, shift, weight, first, min(first + CHUNK, z.size)))
    return total


@inline
def _hard_loss(z, m, total, t, weight, smoothing, weight_sum):
    """The loss of a row whose class is `t`, from its maximum and its sum of exponentials."""
    q = (1.0 - smoothing) * (np.float64(weight[t]) if weight.size else 1.0)
    loss = (q + smoothing / z.size * weight_sum) * math.log(total)
    if q != 0.0:
        loss -= q * np.float64(load(z, t) - m)
    if smoothing != 0.0:
        loss -= smoothing / z.size * _smooth_sum(z, m, weight)
    return loss


@inline
def _hard_gradient(e, total, t, weight, smoothing, weight_sum, g, dz):
    """dz from e, exp(z) up to a factor, and the sum of e; `e` and `dz` may be one row."""
    of = weight.dtype.type
    uniform = smoothing / e.size
    q = (1.0 - smoothing) * (np.float64(weight[t]) if weight.size else 1.0)
    W = q + uniform * weight_sum
    at_target = W * (np.float64(e[t]) / total) - q
    if smoothing == 0.0:
        scale_into(e, of(g * W / total), dz)
    else:
        at_target -= uniform * weight[t]
        scale, shift, out = of(g * W / total), of(g * uniform), same_dtype(e, dz)
        for c in range(e.size):
            store(out, c, e[c] * scale - shift * weight[c])
    store(dz, t, of(g * at_target))


@reduction
def _soft_chunk(z, y, m, weight, keep, uniform, e, first, last):
    zero = e.dtype.type(0)
    total, W, dot = zero, zero, zero
    for i in range(first, last):
        q = weight[i] * (keep * load(y, i) + uniform)
        d = load(z, i) - m
        W += q
        dot += zero if q == zero else q * d
        value = exp(d)
        store(e, i, value)
        total += value
    return total, W, dot


@inline
def _soft_sums(z, y, m, weight, smoothing, e):
    """e = exp(z - m); returns sum e, W and sum_c q_c (z_c - m)."""
    of = e.dtype.type
    keep, uniform = of(1.0 - smoothing), of(smoothing / z.size)
    total, W, dot = 0.0, 0.0, 0.0
    for first in range(0, z.size, CHUNK):
        sums = _soft_chunk(z, y, m, weight, keep, uniform, e, first, min(first + CHUNK, z.size))
        total, W, dot = total + sums[0], W + sums[1], dot + sums[2]
    return total, W, dot


@inline
def _soft_gradient(e, total, y, W, weight, smoothing, g, dz):
    """dz from e, exp(z) up to a factor, and the sum of e; `e` and `dz` may be one row."""
    of = e.dtype.type
    keep, uniform, factor, scale = of(1.0 - smoothing), of(smoothing / e.size), of(g), of(g * W / total)
    out = same_dtype(e, dz)
    for c in range(e.size):
        store(out, c, e[c] * scale - factor * (weight[c] * (keep * load(y, c) + uniform)))


# ---------------------------------------------------------------------------------------------- hard targets
@kernel
def _hard_forward(first, last, z, target, weight, loss, lse, invalid, ignore_index, smoothing, weight_sum):
    V, S = z.shape[1], z.shape[2]
    z_scratch = row_scratch(z)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row = gather(z[n, :, s], z_scratch)
        t = target[n, s]
        m = row_max(z_row)
        total = exp_total(z_row, m, weight)
        lse[n, s] = m + math.log(total)
        if t == ignore_index:
            loss[n, s] = 0.0
        elif t < 0 or t >= V:
            loss[n, s] = math.nan
            atomic_min(invalid, row)
        else:
            loss[n, s] = _hard_loss(z_row, m, total, t, weight, smoothing, weight_sum)


@kernel
def _hard_backward(
    first, last, z, target, weight, lse, upstream, denominator, dz, ignore_index, smoothing, weight_sum, ulp
):
    V, S = z.shape[1], z.shape[2]
    z_scratch, dz_scratch, exps = row_scratch(z), row_scratch(dz), np.empty(V, weight.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        dz_row = place(dz[n, :, s], dz_scratch)
        t = target[n, s]
        if t == ignore_index:
            fill(dz_row, 0.0)
        elif t < 0 or t >= V:
            fill(dz_row, math.nan)
        else:
            z_row = gather(z[n, :, s], z_scratch)
            e = same_dtype(dz_row, exps)
            total = _normaliser(exp_sum(z_row, lse[n, s], e), lse[n, s], ulp)
            g = np.float64(upstream[n, s]) / denominator[0]
            _hard_gradient(e, total, t, weight, smoothing, weight_sum, g, dz_row)
        scatter(dz[n, :, s], dz_scratch)


@kernel
def _hard_forward_backward(
    first, last, z, target, weight, loss, dz, invalid, ignore_index, smoothing, weight_sum
):
    V, S = z.shape[1], z.shape[2]
    z_scratch, dz_scratch, exps = row_scratch(z), row_scratch(dz), np.empty(V, weight.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        dz_row = place(dz[n, :, s], dz_scratch)
        t = target[n, s]
        if t == ignore_index:
            loss[n, s] = 0.0
            fill(dz_row, 0.0)
        elif t < 0 or t >= V:
            loss[n, s] = math.nan
            fill(dz_row, math.nan)
            atomic_min(invalid, row)
        else:
            z_row = gather(z[n, :, s], z_scratch)
            e = same_dtype(dz_row, exps)
            m = row_max(z_row)
            total = exp_sum(z_row, m, e)
            loss[n, s] = _hard_loss(z_row, m, total, t, weight, smoothing, weight_sum)
            _hard_gradient(e, total, t, weight, smoothing, weight_sum, 1.0, dz_row)
        scatter(dz[n, :, s], dz_scratch)


# ---------------------------------------------------------------------------------------------- soft targets
@kernel
def _soft_forward(first, last, z, y, weight, loss, lse, smoothing):
    V, S = z.shape[1], z.shape[2]
    z_scratch, y_scratch, exps = row_scratch(z), row_scratch(y), np.empty(V, weight.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(z[n, :, s], z_scratch), gather(y[n, :, s], y_scratch)
        m = row_max(z_row)
        total, W, dot = _soft_sums(z_row, y_row, m, weight, smoothing, exps)
        log_total = math.log(total)
        lse[n, s] = m + log_total
        loss[n, s] = W * log_total - dot


@kernel
def _soft_backward(first, last, z, y, weight, lse, upstream, denominator, dz, smoothing, ulp):
    V, S = z.shape[1], z.shape[2]
    z_scratch, y_scratch, dz_scratch = row_scratch(z), row_scratch(y), row_scratch(dz)
    exps = np.empty(V, weight.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(z[n, :, s], z_scratch), gather(y[n, :, s], y_scratch)
        dz_row = place(dz[n, :, s], dz_scratch)
        e = same_dtype(dz_row, exps)
        total, W, _ = _soft_sums(z_row, y_row, lse[n, s], weight, smoothing, e)
        g = np.float64(upstream[n, s]) / denominator[0]
        _soft_gradient(e, _normaliser(total, lse[n, s], ulp), y_row, W, weight, smoothing, g, dz_row)
        scatter(dz[n, :, s], dz_scratch)


@kernel
def _soft_forward_backward(first, last, z, y, weight, loss, dz, smoothing):
    V, S = z.shape[1], z.shape[2]
    z_scratch, y_scratch, dz_scratch = row_scratch(z), row_scratch(y), row_scratch(dz)
    exps = np.empty(V, weight.dtype)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(z[n, :, s], z_scratch), gather(y[n, :, s], y_scratch)
        dz_row = place(dz[n, :, s], dz_scratch)
        e = same_dtype(dz_row, exps)
        total, W, dot = _soft_sums(z_row, y_row, row_max(z_row), weight, smoothing, e)
        loss[n, s] = W * math.log(total) - dot
        _soft_gradient(e, total, y_row, W, weight, smoothing, 1.0, dz_row)
        scatter(dz[n, :, s], dz_scratch)


# ---------------------------------------------------------------------------------------------- reduction
@kernel
def _compensated_sum(values):
    """The sum in order, in float64, with the rounding of each addition carried along (Neumaier)."""
    total, lost = 0.0, 0.0
    for n in range(values.shape[0]):
        for s in range(values.shape[1]):
            value = np.float64(values[n, s])
            new = total + value
            if abs(total) >= abs(value):
                lost += (total - new) + value
            else:
                lost += (value - new) + total
            total = new
    # an infinite or NaN sum leaves NaN in `lost`
    return total + lost if math.isfinite(total) else total


@kernel
def _weight_of_targets(target, weight, V, ignore_index):
    """The sum of w_target over the rows that have a class; a target that is no class counts nothing."""
    total = 0.0
    for n in range(target.shape[0]):
        for s in range(target.shape[1]):
            t = target[n, s]
            if t != ignore_index and 0 <= t < V:
                total += np.float64(weight[t]) if weight.size else 1.0
    return total


# ---------------------------------------------------------------------------------------------- launchers
def _weights(weight: np.ndarray | None, z: np.ndarray, every_class: bool) -> tuple[np.ndarray, float]:
    """Class weights as the kernels take them, and their sum. Empty stands for ones where only w_target is asked for."""
    dtype, V = accumulate_dtype(z), z.shape[1]
    if weight is None:
        return (np.ones(V, dtype) if every_class else np.empty(0, dtype)), float(V)
    weight = np.ascontiguousarray(weight, dtype)
    return weight, float(weight.sum(dtype=np.float64)) if every_class else 0.0


def _per_row(upstream: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return to_accumulate(upstream, upstream.size, dtype, 1.0)


def _classes(target: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(target, np.int64)


def forward(
    z: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    loss: np.ndarray,
    lse: np.ndarray,
    invalid: np.ndarray,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """The loss and the log-sum-exp of every row."""
    rows, smoothing = loss.size, float(label_smoothing)
    soft = target.ndim == 3
    weight, weight_sum = _weights(weight, z, soft or smoothing != 0.0)
    if z.size == 0:
        loss.fill(0.0)
        lse.fill(-math.inf)
    elif soft:
        run(_soft_forward, rows, z.nbytes + target.nbytes, z, target, weight, loss, lse, smoothing)
    else:
        target = _classes(target)
        run(
            _hard_forward, rows, z.nbytes,
            z, target, weight, loss, lse, invalid, int(ignore_index), smoothing, weight_sum,
        )  # fmt: skip


def backward(
    z: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    lse: np.ndarray,
    upstream: np.ndarray,
    denominator: np.ndarray | None,
    dz: np.ndarray,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """dz for a given upstream gradient of every row's loss, divided by `denominator`."""
    if z.size == 0:
        return
    rows, smoothing = lse.size, float(label_smoothing)
    soft = target.ndim == 3
    weight, weight_sum = _weights(weight, z, soft or smoothing != 0.0)
    upstream = _per_row(upstream, weight.dtype)
    denominator = np.ones(1, weight.dtype) if denominator is None else denominator
    ulp = float(np.finfo(weight.dtype).eps)
    if soft:
        run(
            _soft_backward, rows, 2 * z.nbytes + target.nbytes,
            z, target, weight, lse, upstream, denominator, dz, smoothing, ulp,
        )  # fmt: skip
    else:
        target = _classes(target)
        run(
            _hard_backward, rows, 2 * z.nbytes,
            z, target, weight, lse, upstream, denominator, dz, int(ignore_index), smoothing, weight_sum, ulp,
        )  # fmt: skip


def forward_backward(
    z: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    loss: np.ndarray,
    dz: np.ndarray,
    invalid: np.ndarray,
    *,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """The loss of every row and its gradient for upstream 1."""
    rows, smoothing = loss.size, float(label_smoothing)
    soft = target.ndim == 3
    weight, weight_sum = _weights(weight, z, soft or smoothing != 0.0)
    if z.size == 0:
        loss.fill(0.0)
    elif soft:
        run(_soft_forward_backward, rows, 2 * z.nbytes + target.nbytes, z, target, weight, loss, dz, smoothing)
    else:
        target = _classes(target)
        run(
            _hard_forward_backward, rows, 2 * z.nbytes,
            z, target, weight, loss, dz, invalid, int(ignore_index), smoothing, weight_sum,
        )  # fmt: skip


def reduce(
    loss: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    total: np.ndarray,
    denominator: np.ndarray,
    *,
    ignore_index: int,
) -> None:
    """total[0] = the sum of `loss`; denominator[0] = what 'mean' divides it by."""
    total[0] = _compensated_sum(loss)
    if target.ndim == 3:
        denominator[0] = loss.size
    else:
        V = np.iinfo(np.int64).max if weight is None else weight.shape[0]
        weight = np.empty(0, loss.dtype) if weight is None else np.ascontiguousarray(weight, loss.dtype)
        denominator[0] = _weight_of_targets(_classes(target), weight, V, int(ignore_index))
