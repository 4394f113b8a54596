"""Log-probability of a class, entropy and log sum exp along the middle axis of (N, V, S), and their gradient, on the CPU.

    d_c      = (z_c - m) / T,   m = max_c z_c,   T the temperature
    sum_exp_minus_1   = sum exp(d) - 1,   mean = sum exp(d) d / sum exp(d)
    lse      = m / T + log sum exp(d)
    log_prob = d_t - log sum exp(d)
    entropy  = log sum exp(d) - mean
    dz_c     = (p_c (g_lse - g_log_prob - g_entropy (d_c - mean)) + g_log_prob delta_ct) / T,   p = exp(d) / sum exp(d)

    forward     reads z               1 pass
    backward    reads z, writes dz    2 passes

A pass is one read or one write of the whole tensor. `forward` saves m, sum_exp_minus_1 and mean for the backward pass, and z_t
- m: of logits near 1e4 a rounded lse would lose the digits of p, and where p -> 1 so would 1 - p in a sum near 1. Differences
are taken before they are divided by T, which would round large logits. Everything is computed in float32 (float64 for float64),
and sums are merged in float64. A row whose target is `ignore_index` gives zeros, one whose target is no class at all NaN, and
the smallest such row number n S + s goes to `invalid`. The logits of neither are read.
"""

from __future__ import annotations

import math

import numpy as np

from ._numba.compile import inline, kernel
from ._numba.elements import accumulate_dtype, as_classes, atomic_min, load
from ._numba.exp import exp
from ._numba.simd import Lanes, load_lanes, prefetch, streamed, times, with_lane, write
from ._numba.threads import Moves, moving, run
from ._numba.views import bypasses_cache, gather, prefetch_row, release, row_buffer, row_of, row_scratch, scatter
from ._rows import SMALL, fill, row_max, small_sum_exp_minus_1, sums_of_row


@inline
def _exps(i, exist, args) -> Lanes:
    z, m, beta = args
    return exp((load_lanes(z, i, exist, -math.inf) - m) * beta)


@inline
def _exps_and_spread(i, exist, args) -> tuple[Lanes, Lanes]:
    z, m, beta = args
    d = (load_lanes(z, i, exist, -math.inf) - m) * beta
    e = exp(d)
    return e, times(e, d)


@inline
def _sums(z, m, beta, ahead) -> tuple[float, float]:
    """sum exp(d) - 1 and sum exp(d) d, d = (z - m) beta. Meanwhile fetches the row `ahead`."""
    total, spread = sums_of_row(z, _exps_and_spread, (z, m, beta), ahead)
    return total - 1.0 if not total < SMALL else small_sum_exp_minus_1(z, _exps, (z, m, beta)), spread


@kernel
def _forward_rows(first, last, z, target, log_prob, entropy, lse, stats, invalid, ignore_index, over_temperature) -> None:
    """Rows first…last - 1: reads z, writes the three numbers of each and stats."""
    V, S, of = z.shape[1], z.shape[2], lse.dtype.type
    beta, z_scratch = of(over_temperature), row_scratch(z)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m = row_max(z_row)
            sum_exp_minus_1, spread = _sums(z_row, m, beta, prefetch_row(z, row, last, z_row))
            log_total, mean = math.log1p(sum_exp_minus_1), spread / (1.0 + sum_exp_minus_1)
            below = load(z_row, t) - m
            log_prob[n, s] = np.float64(below) * over_temperature - log_total
            entropy[n, s] = log_total - mean
            lse[n, s] = np.float64(m) * over_temperature + log_total
            stats[0, n, s], stats[1, n, s], stats[2, n, s], stats[3, n, s] = m, sum_exp_minus_1, mean, below
        else:
            value = 0.0 if t == ignore_index else math.nan
            log_prob[n, s], entropy[n, s], lse[n, s] = value, value, value
            stats[:, n, s] = 0.0
            if t != ignore_index:
                atomic_min(invalid, row)
    release(z_scratch)


@inline
def _gradient(i, exist, args) -> Lanes:
    z, m, beta, mean, over, of_p, g_entropy, t, at_target, ahead = args
    prefetch(ahead, i)
    d = (load_lanes(z, i, exist, 0.0) - m) * beta
    return with_lane(times(exp(d) * over, of_p - (d - mean) * g_entropy), t - i, at_target)


@kernel
def _backward_rows(
    first, last, z, target, stats, g_log_prob, g_entropy, g_lse, dz, ignore_index, over_temperature
) -> None:  # fmt: skip
    """Rows first…last - 1: reads z and stats, writes dz."""
    V, S, of = z.shape[1], z.shape[2], stats.dtype.type
    beta, z_scratch, dz_scratch, around = of(over_temperature), row_scratch(z), row_scratch(dz), bypasses_cache(dz)
    for row in range(first, last):
        n, s = row // S, row % S
        t = target[n, s]
        dz_row = row_buffer(row_of(dz, n, s), dz_scratch)
        if 0 <= t < V and t != ignore_index:
            z_row = gather(row_of(z, n, s), z_scratch)
            m, sum_exp_minus_1, mean = stats[0, n, s], np.float64(stats[1, n, s]), stats[2, n, s]
            of_log_prob = np.float64(g_log_prob[n, s]) * over_temperature
            of_entropy = np.float64(g_entropy[n, s]) * over_temperature
            of_lse = np.float64(g_lse[n, s]) * over_temperature
            total, d_t = 1.0 + sum_exp_minus_1, (load(z_row, t) - m) * beta
            e_t = np.float64(exp(d_t))
            # without the difference 1 - p_t, whose digits are lost where p_t -> 1
            at_target = of_log_prob * ((sum_exp_minus_1 + (1.0 - e_t)) / total)
            if e_t != 0.0:
                at_target += e_t / total * (of_lse - of_entropy * np.float64(d_t - mean))
            numbers = of(1.0 / total), of(of_lse - of_log_prob), of(of_entropy), t, of(at_target)
            write(dz_row, around, _gradient, (z_row, m, beta, mean, *numbers, prefetch_row(z, row, last, z_row)))
        else:
            fill(dz_row, 0.0 if t == ignore_index else math.nan)
        scatter(row_of(dz, n, s), dz_scratch)
    streamed()
    release(z_scratch)
    release(dz_scratch)


moving(Moves(("z", "target"), ("log_prob", "entropy", "lse", "stats")), _forward_rows)
moving(Moves(("z", "target", "stats", "g_log_prob", "g_entropy", "g_lse"), ("dz",)), _backward_rows)


def forward(z, target, log_prob, entropy, lse, stats, invalid, *, ignore_index: int, temperature: float) -> None:
    """The three numbers of each row, (N, S), and stats, (4, N, S) or None: m, sum exp(d) - 1, mean, z_t - m."""
    N, _, S = z.shape
    stats = np.empty((4, N, S), lse.dtype) if stats is None else stats
    assert len(stats) == 4, stats.shape
    for values in (target, log_prob, entropy, lse, stats[0]):
        assert values.shape == (N, S), (values.shape, z.shape)  # the kernels check no bounds
    args = (z, as_classes(target), log_prob, entropy, lse, stats, invalid, int(ignore_index), 1.0 / temperature)
    run(_forward_rows, N * S, z.nbytes, *args)


def backward(
    z, target, stats, g_log_prob, g_entropy, g_lse, dz, *, ignore_index: int, temperature: float
) -> None:  # fmt: skip
    """dz from what `forward` saved; an upstream gradient is (N, S), of any strides, or None for one of zeros."""
    N, _, S = z.shape
    assert dz.shape == z.shape, (dz.shape, z.shape)
    acc = accumulate_dtype(z)
    upstream = [np.zeros((N, S), acc) if g is None else np.ascontiguousarray(g, acc) for g in (g_log_prob, g_entropy, g_lse)]
    for values in (target, stats[0], *upstream):
        assert values.shape == (N, S), (values.shape, z.shape)
    args = (z, as_classes(target), stats, *upstream, dz, int(ignore_index), 1.0 / temperature)
    run(_backward_rows, N * S, 2 * z.nbytes, *args)
