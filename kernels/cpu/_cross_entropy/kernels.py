"""The kernels of cross entropy on the CPU without options but weight and smoothing: rows `first` to `last - 1` of (N, S)."""

from __future__ import annotations

import math

import numpy as np

from .._numba.compile import kernel
from .._numba.elements import atomic_min
from .._numba.simd import streamed
from .._numba.views import borrowed, bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from .._rows import exp_and_sum_minus_1, exps_workspace, fill, row_max, sum_exp_minus_1_of_logits
from .row import (
    class_weight,
    hard_gradient,
    hard_gradient_of_logits,
    hard_loss,
    soft_gradient,
    soft_gradient_of_logits,
    soft_sums,
)


# ---------------------------------------------------------------------------------------------- kernels, hard targets
@kernel
def _hard_forward(first, last, z, target, weight, loss, stats, invalid, ignore_index, smoothing, weight_sum) -> None:
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch = smoothing / V, row_scratch(z)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m = row_max(z_row)
            sum_exp_minus_1 = sum_exp_minus_1_of_logits(z_row, m, prefetch_row(z, row, last, z_row))
            q = (1.0 - smoothing) * class_weight(weight, t)
            W = q + uniform * weight_sum
            loss[n, s] = hard_loss(z_row, m, sum_exp_minus_1, t, q, uniform, W, weight)
            stats[0, n, s], stats[1, n, s], stats[2, n, s] = m, sum_exp_minus_1, W
        else:
            stats[:, n, s] = 0.0
            loss[n, s] = 0.0
            if t != ignore_index:
                loss[n, s] = math.nan
                atomic_min(invalid, row)
    release(z_scratch)


@kernel
def _hard_backward(
    first, last, z, target, weight, stats, upstream, denominator, dz, unless_one, ignore_index, smoothing
) -> None:  # fmt: skip
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch, dz_scratch, around = smoothing / V, row_scratch(z), row_scratch(dz), bypasses_cache(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            sum_exp_minus_1, W = np.float64(stats[1, n, s]), np.float64(stats[2, n, s])
            q, g = (1.0 - smoothing) * class_weight(weight, t), np.float64(upstream[n, s]) / denominator[0]
            ahead = prefetch_row(z, row, last, z_row)
            hard_gradient_of_logits(z_row, stats[0, n, s], sum_exp_minus_1, t, q, uniform, W, g, weight, dz_row, around, ahead)
        else:
            fill(dz_row, 0.0 if t == ignore_index else math.nan)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(dz_scratch)


@kernel
def _hard_forward_backward(first, last, z, target, weight, loss, dz, invalid, g, ignore_index, smoothing, weight_sum) -> None:
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    uniform, z_scratch, dz_scratch, around = smoothing / V, row_scratch(z), row_scratch(dz), bypasses_cache(dz)
    exps = exps_workspace(V, weight)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m = row_max(z_row)
            sum_exp_minus_1 = exp_and_sum_minus_1(z_row, m, exps, prefetch_row(z, row, last, z_row))
            q = (1.0 - smoothing) * class_weight(weight, t)
            W = q + uniform * weight_sum
            loss[n, s] = hard_loss(z_row, m, sum_exp_minus_1, t, q, uniform, W, weight)
            hard_gradient(exps, sum_exp_minus_1, t, q, uniform, W, g, weight, dz_row, around)
        elif t == ignore_index:
            loss[n, s] = 0.0
            fill(dz_row, 0.0)
        else:
            loss[n, s] = math.nan
            fill(dz_row, math.nan)
            atomic_min(invalid, row)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(dz_scratch)
    release(exps)


# ---------------------------------------------------------------------------------------------- kernels, soft targets
@kernel
def _soft_forward(first, last, z, y, weight, loss, stats, smoothing) -> None:
    S, weight = z.shape[2], borrowed(weight)
    z_scratch, y_scratch = row_scratch(z), row_scratch(y)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        m = row_max(z_row)
        sum_exp_minus_1 = sum_exp_minus_1_of_logits(z_row, m, prefetch_row(z, row, last, z_row))
        W, dot = soft_sums(z_row, y_row, m, smoothing, weight, prefetch_row(y, row, last, y_row))
        loss[n, s] = W * math.log1p(sum_exp_minus_1) - dot
        stats[0, n, s], stats[1, n, s], stats[2, n, s] = m, sum_exp_minus_1, W
    release(z_scratch)
    release(y_scratch)


@kernel
def _soft_backward(first, last, z, y, weight, stats, upstream, denominator, dz, unless_one, smoothing) -> None:
    S, weight = z.shape[2], borrowed(weight)
    z_scratch, y_scratch, dz_scratch, around = row_scratch(z), row_scratch(y), row_scratch(dz), bypasses_cache(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        if unless_one and upstream[n, s] == 1.0:
            continue
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        sum_exp_minus_1, W = np.float64(stats[1, n, s]), np.float64(stats[2, n, s])
        g = np.float64(upstream[n, s]) / denominator[0]
        ahead = prefetch_row(z, row, last, z_row)
        soft_gradient_of_logits(z_row, stats[0, n, s], sum_exp_minus_1, y_row, W, g, smoothing, weight, dz_row, around, ahead)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(y_scratch)
    release(dz_scratch)


@kernel
def _soft_forward_backward(first, last, z, y, weight, loss, dz, g, smoothing) -> None:
    V, S, weight = z.shape[1], z.shape[2], borrowed(weight)
    z_scratch, y_scratch, dz_scratch, around = row_scratch(z), row_scratch(y), row_scratch(dz), bypasses_cache(dz)
    exps = exps_workspace(V, weight)
    for row in range(first, last):
        n, s = row // S, row % S
        z_row, y_row = gather(row_of(z, n, s), z_scratch), gather(row_of(y, n, s), y_scratch)
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        m = row_max(z_row)
        sum_exp_minus_1 = exp_and_sum_minus_1(z_row, m, exps, prefetch_row(z, row, last, z_row))
        W, dot = soft_sums(z_row, y_row, m, smoothing, weight, prefetch_row(y, row, last, y_row))
        loss[n, s] = W * math.log1p(sum_exp_minus_1) - dot
        soft_gradient(exps, sum_exp_minus_1, y_row, W, g, smoothing, weight, dz_row, around)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(y_scratch)
    release(dz_scratch)
    release(exps)
