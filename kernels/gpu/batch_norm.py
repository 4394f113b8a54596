"""Batch normalisation of (N, C, S), each channel over its m = N·S values.

    forward   μ = Σ x / m,  σ² = Σ (x - μ)² / m,  rstd = 1/√(σ² + ε),  x̂ = (x - μ) rstd,  y = γ x̂ + β
    backward  dβ = Σ dy,  dγ = Σ dy x̂,  dx = γ rstd (dy - dβ/m - x̂ dγ/m)
    running   r <- (1 - momentum) r + momentum · new,  the new variance being σ² m/(m - 1)
    source    docs/derivations.md, section 2
    bytes     a channel block in one tile: forward read x, write y; backward read x, read dy, write dx.
              longer: x (and dy) are read twice, the second time from the far end back, where the cache still has them.

μ is kept as two floats, mean[0] + mean[1], so that a mean of 1e4 with a spread of 1 costs no digits of x - μ. Each tile is
summed about the mean of those before it (Chan's merge): a sum of squares about a value this near never cancels. Squares
are scaled by α², a power of two near 1/m, so that values near 1e18 do not overflow. Tiles are (samples, channels, lanes).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tile
from ._channels import count_ends, count_of, ends_of, fetch, fetch_ends, inside_of, line, place, put, put_ends, vector
from ._moments import compensated_add, first_moments, joined, next_moments, over_splits, per_channel
from ._rows import ACC, follower_mode, real, run_mode, warps
from .plan import float_and_bits, next_power_of_2, plan_batch_norm, plan_channels


@triton.jit
def _quotient(a, b, ACC: tl.constexpr):
    """a / b, rounded to nearest in float32 too."""
    if tl.float64 == ACC:
        q = a / b
    else:
        q = tl.div_rn(a, tl.zeros_like(a) + b)
    return q


@triton.jit
def _reciprocal_std(var, eps, ACC: tl.constexpr):
    if tl.float64 == ACC:
        rstd = 1.0 / tl.sqrt(var + eps)
    else:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return rstd


@triton.jit
def _finish(
    hi, lo, M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, c, C,
    m, eps, eps_bits, momentum, momentum_bits, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the statistics of the channels c (one-dimensional), updates the running ones, and returns rstd."""
    count = tl.cast(m, ACC)
    var = _quotient(tl.where(M2 < 0.0, 0.0, M2), alpha * alpha * count, ACC)
    rstd = _reciprocal_std(var, real(eps, eps_bits, ACC), ACC)
    tl.store(mean_ptr + c, hi, mask=c < C)
    tl.store(mean_ptr + (C + c), lo, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)
    tl.store(rstd_ptr + c, rstd, mask=c < C)
    weight = real(momentum, momentum_bits, ACC)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c, mask=c < C, other=0.0).to(ACC)
        tl.store(running_mean_ptr + c, old * (1.0 - weight) + weight * hi, mask=c < C)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + c, mask=c < C, other=0.0).to(ACC)
        new = var * (count / tl.maximum(count - 1.0, 1.0))
        tl.store(running_var_ptr + c, old * (1.0 - weight) + weight * new, mask=c < C)
    return rstd


COUNTS = ["N", "S", "lane_blocks", "tiles", "per_split", "splits", "m", "eps_bits", "momentum_bits"]


@triton.jit
def _with_ends(
    hi, lo, M2, count, x_ptr, c, at, N, C, S, stride_xn, stride_xc, stride_xs, alpha, GROUP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The moments and their count after the ends of the rows that begin in the tile."""
    ends = ends_of(c, at, N, C, S, GROUP)
    x = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
    more = count_ends(c, at, N, C, S, GROUP).to(ACC)
    hi, lo, M2 = next_moments(hi, lo, M2, count, x, ends[2], more, alpha)
    return hi, lo, M2, count + more


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    x_ptr, partial_ptr, N, C, S, lane_blocks, tiles, per_split, splits, alpha, stride_xn, stride_xc, stride_xs,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial (4, splits, C): mean hi and lo, scaled M2 and count of each split of each channel."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    first = split * per_split
    at = place(c, first, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
    x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
    position = tl.minimum((first % lane_blocks) * LANES, S - 1)
    start = (first // lane_blocks) * BLOCK_N * stride_xn + position * stride_xs
    origin = tl.load(x_ptr + (start + channel * stride_xc), mask=channel < C, other=0.0).to(ACC)[None, :, None]
    count = count_of(at).to(ACC)
    mean_hi, mean_lo, M2 = first_moments(x, inside_of(at, LANES), count, origin, alpha)
    if ENDS:
        mean_hi, mean_lo, M2, count = _with_ends(
            mean_hi, mean_lo, M2, count, x_ptr, c, at, N, C, S, stride_xn, stride_xc, stride_xs, alpha, GROUP, ACC
        )
    for tile in range(first + 1, tl.minimum(first + per_split, tiles)):
        at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
        x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
        more = count_of(at).to(ACC)
        mean_hi, mean_lo, M2 = next_moments(mean_hi, mean_lo, M2, count, x, inside_of(at, LANES), more, alpha)
        count += more
        if ENDS:
            mean_hi, mean_lo, M2, count = _with_ends(
                mean_hi, mean_lo, M2, count, x_ptr, c, at, N, C, S, stride_xn, stride_xc, stride_xs, alpha, GROUP, ACC
            )
    out = partial_ptr + (split * C + c)
    tl.store(out, mean_hi, mask=c < C)
    tl.store(out + splits * C, mean_lo, mask=c < C)
    tl.store(out + 2 * splits * C, M2, mask=c < C)
    tl.store(out + 3 * splits * C, count, mask=c < C)


@triton.jit(do_not_specialize=COUNTS)
def _merge_kernel(
    partial_ptr, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, C, splits, alpha,
    m, eps, eps_bits, momentum, momentum_bits,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The splits of each channel as one: means by their distance from the first, then squares about the common mean."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & (channel < C)[None, :]
    cell = partial_ptr + (split * C + channel[None, :])
    step = splits.to(tl.int64) * C
    count = tl.load(cell + 3 * step, mask=mask, other=0.0)
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    first = tl.load(partial_ptr + channel, mask=channel < C, other=0.0)
    delta = (tl.load(cell, mask=mask, other=0.0) - first[None, :]) + tl.load(cell + step, mask=mask, other=0.0)
    u = over_splits(delta * count, tl.zeros_like(delta)) / total
    d = alpha * (delta - u[None, :])
    squares = tl.load(cell + 2 * step, mask=mask, other=0.0)
    M2 = over_splits(squares, tl.where(mask, count * d * d, 0.0))
    hi = first + u
    _finish(
        hi, u - (hi - first), M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip


@triton.jit
def _normalize_ends(
    x_ptr, y_ptr, mean_hi, mean_lo, scale, beta, c, at, N, C, S,
    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of the ends of the rows that begin in the tile."""
    ends = ends_of(c, at, N, C, S, GROUP)
    x = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
    put_ends(y_ptr, ((x - mean_hi) - mean_lo) * scale + beta, c, ends, stride_yn, stride_yc, stride_ys)


@triton.jit(do_not_specialize=COUNTS)
def _normalize_kernel(
    x_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, y_ptr, N, C, S, lane_blocks, tiles, per_split, splits,
    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
    MODE: tl.constexpr, Y_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = (x - μ) (rstd γ) + β; the last tiles first, for the statistics have just read them."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    pid = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = (pid % splits) * per_split
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
    mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
    scale = vector(rstd_ptr, channel, C, 0.0, ACC) * vector(gamma_ptr, channel, C, 1.0, ACC)
    beta = vector(beta_ptr, channel, C, 0.0, ACC)
    stop = tl.minimum(first + per_split, tiles)
    for i in range(first, stop):
        tile = first + stop - 1 - i
        at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
        x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
        y = ((x - mean_hi) - mean_lo) * scale + beta
        put(y_ptr, y, c, at, stride_yn, stride_yc, stride_ys, LANES, Y_MODE, GROUP)
        if ENDS:
            ends = ends_of(c, at, N, C, S, GROUP)
            x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
            y_ends = ((x_ends - mean_hi) - mean_lo) * scale + beta
            put_ends(y_ptr, y_ends, c, ends, stride_yn, stride_yc, stride_ys)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N, C, S, lane_blocks, tiles, alpha,
    m, eps, eps_bits, momentum, momentum_bits,
    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, RESIDENT: tl.constexpr,
    MODE: tl.constexpr, Y_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics and normalisation of a block of channels by one program; the last tile read stays in registers."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    at = place(c, 0, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
    x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
    origin = tl.load(x_ptr + channel * stride_xc, mask=channel < C, other=0.0).to(ACC)[None, :, None]
    count = count_of(at).to(ACC)
    mean_hi, mean_lo, M2 = first_moments(x, inside_of(at, LANES), count, origin, alpha)
    if ENDS:
        ends = ends_of(c, at, N, C, S, GROUP)
        x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
        more = count_ends(c, at, N, C, S, GROUP).to(ACC)
        mean_hi, mean_lo, M2 = next_moments(mean_hi, mean_lo, M2, count, x_ends, ends[2], more, alpha)
        count += more
    if not RESIDENT:
        for tile in range(1, tiles):
            at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
            x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
            more = count_of(at).to(ACC)
            mean_hi, mean_lo, M2 = next_moments(mean_hi, mean_lo, M2, count, x, inside_of(at, LANES), more, alpha)
            count += more
            if ENDS:
                mean_hi, mean_lo, M2, count = _with_ends(
                    mean_hi, mean_lo, M2, count, x_ptr, c, at, N, C, S, stride_xn, stride_xc, stride_xs, alpha, GROUP, ACC
                )
    rstd = _finish(
        line(mean_hi), line(mean_lo), line(M2), alpha,
        mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip
    scale = rstd[None, :, None] * vector(gamma_ptr, channel, C, 1.0, ACC)
    beta = vector(beta_ptr, channel, C, 0.0, ACC)
    y = ((x - mean_hi) - mean_lo) * scale + beta
    put(y_ptr, y, c, at, stride_yn, stride_yc, stride_ys, LANES, Y_MODE, GROUP)
    if ENDS:
        if not RESIDENT:
            ends = ends_of(c, at, N, C, S, GROUP)
            x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
        y_ends = ((x_ends - mean_hi) - mean_lo) * scale + beta
        put_ends(y_ptr, y_ends, c, ends, stride_yn, stride_yc, stride_ys)
    if not RESIDENT:
        for i in range(1, tiles):
            tile = tiles - 1 - i
            at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
            x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
            y = ((x - mean_hi) - mean_lo) * scale + beta
            put(y_ptr, y, c, at, stride_yn, stride_yc, stride_ys, LANES, Y_MODE, GROUP)
            if ENDS:
                _normalize_ends(
                    x_ptr, y_ptr, mean_hi, mean_lo, scale, beta, c, at, N, C, S,
                    stride_xn, stride_xc, stride_xs, stride_yn, stride_yc, stride_ys, GROUP, ACC,
                )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _backward_reduce_kernel(
    dy_ptr, x_ptr, mean_ptr, partial_ptr, N, C, S, lane_blocks, tiles, per_split, splits,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
    MODE: tl.constexpr, DY_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial (4, splits, C): hi and lo of Σ dy (x - μ) and of Σ dy, of each split of each channel."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
    mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
    dgamma = tl.zeros([BLOCK_N, BLOCK_C, LANES], ACC)
    dbeta, lost_dgamma, lost_dbeta = dgamma, dgamma, dgamma
    if ENDS:
        dgamma_ends = tl.zeros([BLOCK_N, BLOCK_C, 2 * GROUP], ACC)
        dbeta_ends, lost_dgamma_ends, lost_dbeta_ends = dgamma_ends, dgamma_ends, dgamma_ends
    first = split * per_split
    for tile in range(first, tl.minimum(first + per_split, tiles)):
        at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
        x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
        dy = fetch(dy_ptr, c, at, stride_gn, stride_gc, stride_gs, LANES, DY_MODE, GROUP, ACC)
        dbeta, lost_dbeta = compensated_add(dbeta, lost_dbeta, dy)
        product = tl.where(inside_of(at, LANES), dy * ((x - mean_hi) - mean_lo), 0.0)
        dgamma, lost_dgamma = compensated_add(dgamma, lost_dgamma, product)
        if ENDS:
            ends = ends_of(c, at, N, C, S, GROUP)
            x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
            dy_ends = fetch_ends(dy_ptr, c, ends, stride_gn, stride_gc, stride_gs, ACC)
            dbeta_ends, lost_dbeta_ends = compensated_add(dbeta_ends, lost_dbeta_ends, dy_ends)
            product = tl.where(ends[2], dy_ends * ((x_ends - mean_hi) - mean_lo), 0.0)
            dgamma_ends, lost_dgamma_ends = compensated_add(dgamma_ends, lost_dgamma_ends, product)
    out = partial_ptr + (split * C + c)
    step = splits.to(tl.int64) * C
    hi, lo = per_channel(dgamma, lost_dgamma)
    if ENDS:
        more_hi, more_lo = per_channel(dgamma_ends, lost_dgamma_ends)
        hi, lo = joined(hi, lo, more_hi, more_lo)
    tl.store(out, hi, mask=c < C)
    tl.store(out + step, lo, mask=c < C)
    hi, lo = per_channel(dbeta, lost_dbeta)
    if ENDS:
        more_hi, more_lo = per_channel(dbeta_ends, lost_dbeta_ends)
        hi, lo = joined(hi, lo, more_hi, more_lo)
    tl.store(out + 2 * step, hi, mask=c < C)
    tl.store(out + 3 * step, lo, mask=c < C)


@triton.jit(do_not_specialize=["splits"])
def _backward_merge_kernel(
    partial_ptr, rstd_ptr, dgamma_ptr, dbeta_ptr, C, splits, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """The splits' sums as one."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, SPLITS)[:, None]
    mask = (split < splits) & (channel < C)[None, :]
    cell = partial_ptr + (split * C + channel[None, :])
    step = splits.to(tl.int64) * C
    rstd = tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    dgamma = over_splits(tl.load(cell, mask=mask, other=0.0), tl.load(cell + step, mask=mask, other=0.0))
    dbeta = over_splits(tl.load(cell + 2 * step, mask=mask, other=0.0), tl.load(cell + 3 * step, mask=mask, other=0.0))
    tl.store(dgamma_ptr + channel, dgamma * rstd, mask=channel < C)
    tl.store(dbeta_ptr + channel, dbeta, mask=channel < C)


@triton.jit(do_not_specialize=COUNTS)
def _backward_apply_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, dgamma_ptr, dbeta_ptr, dx_ptr,
    N, C, S, lane_blocks, tiles, per_split, splits, m,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_dn, stride_dc, stride_ds,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr,
    MODE: tl.constexpr, DY_MODE: tl.constexpr, DX_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = γ rstd (dy - dβ/m - x̂ dγ/m), or γ rstd dy where the statistics were not the batch's (no x)."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    pid = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = (pid % splits) * per_split
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    rstd = vector(rstd_ptr, channel, C, 0.0, ACC)
    a = rstd * vector(gamma_ptr, channel, C, 1.0, ACC)
    if x_ptr is not None:
        mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
        mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
        k = rstd * (vector(dgamma_ptr, channel, C, 0.0, ACC) / tl.cast(m, ACC))
        b = vector(dbeta_ptr, channel, C, 0.0, ACC) / tl.cast(m, ACC)
    stop = tl.minimum(first + per_split, tiles)
    for i in range(first, stop):
        tile = first + stop - 1 - i
        at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
        dx = fetch(dy_ptr, c, at, stride_gn, stride_gc, stride_gs, LANES, DY_MODE, GROUP, ACC)
        if x_ptr is not None:
            x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
            dx = (dx - b) - ((x - mean_hi) - mean_lo) * k
        put(dx_ptr, dx * a, c, at, stride_dn, stride_dc, stride_ds, LANES, DX_MODE, GROUP)
        if ENDS:
            ends = ends_of(c, at, N, C, S, GROUP)
            dx_ends = fetch_ends(dy_ptr, c, ends, stride_gn, stride_gc, stride_gs, ACC)
            if x_ptr is not None:
                x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
                dx_ends = (dx_ends - b) - ((x_ends - mean_hi) - mean_lo) * k
            put_ends(dx_ptr, dx_ends * a, c, ends, stride_dn, stride_dc, stride_ds)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    dy_ptr, x_ptr, mean_ptr, rstd_ptr, gamma_ptr, dx_ptr, dgamma_ptr, dbeta_ptr,
    N, C, S, lane_blocks, tiles, m,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_dn, stride_dc, stride_ds,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, RESIDENT: tl.constexpr,
    MODE: tl.constexpr, DY_MODE: tl.constexpr, DX_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The whole backward of a block of channels by one program; the last tile read stays in registers."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
    mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
    rstd = vector(rstd_ptr, channel, C, 0.0, ACC)
    at = place(c, 0, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
    x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
    dy = fetch(dy_ptr, c, at, stride_gn, stride_gc, stride_gs, LANES, DY_MODE, GROUP, ACC)
    d = (x - mean_hi) - mean_lo
    dbeta = dy
    dgamma = tl.where(inside_of(at, LANES), dy * d, 0.0)
    lost_dgamma = tl.zeros_like(d)
    lost_dbeta = lost_dgamma
    if ENDS:
        ends = ends_of(c, at, N, C, S, GROUP)
        x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
        dy_ends = fetch_ends(dy_ptr, c, ends, stride_gn, stride_gc, stride_gs, ACC)
        d_ends = (x_ends - mean_hi) - mean_lo
        dbeta_ends = dy_ends
        dgamma_ends = tl.where(ends[2], dy_ends * d_ends, 0.0)
        lost_dgamma_ends = tl.zeros_like(d_ends)
        lost_dbeta_ends = lost_dgamma_ends
    if not RESIDENT:
        for tile in range(1, tiles):
            at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
            x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
            dy = fetch(dy_ptr, c, at, stride_gn, stride_gc, stride_gs, LANES, DY_MODE, GROUP, ACC)
            d = (x - mean_hi) - mean_lo
            dbeta, lost_dbeta = compensated_add(dbeta, lost_dbeta, dy)
            dgamma, lost_dgamma = compensated_add(dgamma, lost_dgamma, tl.where(inside_of(at, LANES), dy * d, 0.0))
            if ENDS:
                ends = ends_of(c, at, N, C, S, GROUP)
                x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
                dy_ends = fetch_ends(dy_ptr, c, ends, stride_gn, stride_gc, stride_gs, ACC)
                d_ends = (x_ends - mean_hi) - mean_lo
                dbeta_ends, lost_dbeta_ends = compensated_add(dbeta_ends, lost_dbeta_ends, dy_ends)
                product = tl.where(ends[2], dy_ends * d_ends, 0.0)
                dgamma_ends, lost_dgamma_ends = compensated_add(dgamma_ends, lost_dgamma_ends, product)
    total_dgamma, rest_dgamma = per_channel(dgamma, lost_dgamma)
    total_dbeta, rest_dbeta = per_channel(dbeta, lost_dbeta)
    if ENDS:
        more, more_lo = per_channel(dgamma_ends, lost_dgamma_ends)
        total_dgamma, rest_dgamma = joined(total_dgamma, rest_dgamma, more, more_lo)
        more, more_lo = per_channel(dbeta_ends, lost_dbeta_ends)
        total_dbeta, rest_dbeta = joined(total_dbeta, rest_dbeta, more, more_lo)
        total_dgamma += rest_dgamma
        total_dbeta += rest_dbeta
    total_dgamma *= rstd
    tl.store(dgamma_ptr + c, total_dgamma, mask=c < C)
    tl.store(dbeta_ptr + c, total_dbeta, mask=c < C)
    a = rstd * vector(gamma_ptr, channel, C, 1.0, ACC)
    k = rstd * (total_dgamma / tl.cast(m, ACC))
    b = total_dbeta / tl.cast(m, ACC)
    dx = ((dy - b) - d * k) * a
    put(dx_ptr, dx, c, at, stride_dn, stride_dc, stride_ds, LANES, DX_MODE, GROUP)
    if ENDS:
        dx_ends = ((dy_ends - b) - d_ends * k) * a
        put_ends(dx_ptr, dx_ends, c, ends, stride_dn, stride_dc, stride_ds)
    if not RESIDENT:
        for i in range(1, tiles):
            tile = tiles - 1 - i
            at = place(c, tile, N, C, S, lane_blocks, stride_xn, stride_xc, BLOCK_N, LANES, MODE, GROUP)
            x = fetch(x_ptr, c, at, stride_xn, stride_xc, stride_xs, LANES, MODE, GROUP, ACC)
            dy = fetch(dy_ptr, c, at, stride_gn, stride_gc, stride_gs, LANES, DY_MODE, GROUP, ACC)
            dx = ((dy - b) - ((x - mean_hi) - mean_lo) * k) * a
            put(dx_ptr, dx, c, at, stride_dn, stride_dc, stride_ds, LANES, DX_MODE, GROUP)
            if ENDS:
                ends = ends_of(c, at, N, C, S, GROUP)
                x_ends = fetch_ends(x_ptr, c, ends, stride_xn, stride_xc, stride_xs, ACC)
                dy_ends = fetch_ends(dy_ptr, c, ends, stride_gn, stride_gc, stride_gs, ACC)
                dx_ends = ((dy_ends - b) - ((x_ends - mean_hi) - mean_lo) * k) * a
                put_ends(dx_ptr, dx_ends, c, ends, stride_dn, stride_dc, stride_ds)


def _flatten(*tensors):
    """(N, C, S) seen as (1, C, N·S) where every tensor's samples and positions are one run: channels-last, S = 1."""
    N, C, S = tensors[0].shape
    if N == 1 or S == 1 or all(x.stride(0) == S * x.stride(2) for x in tensors):
        return tuple(x.permute(1, 0, 2).reshape(C, N * S)[None] if N > 1 and S > 1 else
                     (x if N == 1 else x.permute(2, 1, 0)) for x in tensors)  # fmt: skip
    return tensors


def _plan(x, operands, whole=False):
    """(plan, sizes as the kernels take them, constants) for a pass over `x` and its other operands."""
    N, C, S = x.shape
    mode = run_mode(2, x)
    plan = plan_batch_norm(N, C, S, x.element_size(), mode, channels_last=x.stride(1) == 1 and C > 1 and x.stride(2) != 1,
                           operands=operands, whole=whole)  # fmt: skip
    constants = {
        "BLOCK_C": plan.BLOCK_C, "BLOCK_N": plan.BLOCK_N, "LANES": plan.LANES,
        "MODE": mode, "GROUP": 16 // x.element_size(), "ACC": ACC[x.dtype], "num_warps": warps(plan.num_warps),
    }  # fmt: skip
    return plan, (N, C, S, plan.lane_blocks, plan.tiles), constants


def _moment_scalars(m, eps, momentum):
    """(α, m, ε, momentum) as the kernels take them; α² is a power of four near 1/m."""
    alpha = 2.0 ** -(max(m - 1, 1).bit_length() // 2)
    return alpha, (m, *float_and_bits(eps), *float_and_bits(momentum))


def statistics(x, mean, var, rstd, running_mean, running_var, *, eps: float, momentum: float) -> None:
    """mean (2, C), var and rstd (C,) of x (N, C, S); running_mean and running_var, where given, are updated."""
    (x,) = _flatten(x)
    plan, sizes, constants = _plan(x, operands=1)
    C = x.shape[1]
    alpha, scalars = _moment_scalars(x.shape[0] * x.shape[2], eps, momentum)
    partial = torch.empty((4, plan.splits, C), dtype=mean.dtype, device=x.device)
    _statistics_kernel[(plan.channel_blocks * plan.splits,)](x, partial, *sizes, *plan.split, alpha, *x.stride(), **constants)
    block, programs = plan_channels(C, plan.splits)
    _merge_kernel[(programs,)](
        partial, mean, var, rstd, running_mean, running_var, C, plan.splits, alpha, *scalars,
        SPLITS=next_power_of_2(plan.splits), BLOCK_C=block, ACC=constants["ACC"],
    )  # fmt: skip


def normalize(x, mean, rstd, gamma, beta, y) -> None:
    """y = (x - mean) (rstd γ) + β."""
    if not x.numel():
        return
    x, y = _flatten(x, y)
    plan, sizes, constants = _plan(x, operands=1)
    _normalize_kernel[(plan.channel_blocks * plan.splits,)](
        x,
        mean,
        rstd,
        gamma,
        beta,
        y,
        *sizes,
        *plan.split,
        *x.stride(),
        *y.stride(),
        Y_MODE=follower_mode(2, x, y),
        **constants,
    )


def forward(x, gamma, beta, y, mean, var, rstd, running_mean, running_var, *, eps: float, momentum: float) -> None:
    """`statistics` and `normalize`, in one launch where a program can own whole channels."""
    x, y = _flatten(x, y)
    plan, sizes, constants = _plan(x, operands=1, whole=True)
    if plan.splits > 1:
        statistics(x, mean, var, rstd, running_mean, running_var, eps=eps, momentum=momentum)
        normalize(x, mean, rstd, gamma, beta, y)
        return
    alpha, scalars = _moment_scalars(x.shape[0] * x.shape[2], eps, momentum)
    _forward_kernel[(plan.channel_blocks,)](
        x, gamma, beta, y, mean, var, rstd, running_mean, running_var, *sizes, alpha, *scalars,
        *x.stride(), *y.stride(), RESIDENT=plan.tiles == 1, Y_MODE=follower_mode(2, x, y), **constants,
    )  # fmt: skip


def backward_reduce(dy, x, mean, rstd, dgamma, dbeta) -> None:
    """dγ = Σ dy x̂ and dβ = Σ dy, (C,) each."""
    if not x.numel():
        dgamma.zero_()
        dbeta.zero_()
        return
    dy, x = _flatten(dy, x)
    plan, sizes, constants = _plan(x, operands=2)
    C = x.shape[1]
    partial = torch.empty((4, plan.splits, C), dtype=dgamma.dtype, device=x.device)
    _backward_reduce_kernel[(plan.channel_blocks * plan.splits,)](
        dy, x, mean, partial, *sizes, *plan.split,
        *dy.stride(), *x.stride(), DY_MODE=follower_mode(2, x, dy), **constants,
    )  # fmt: skip
    block, programs = plan_channels(C, plan.splits)
    _backward_merge_kernel[(programs,)](
        partial, rstd, dgamma, dbeta, C, plan.splits, BLOCK_C=block, SPLITS=next_power_of_2(plan.splits)
    )


def backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, count: int, dx) -> None:
    """dx = γ rstd (dy - dβ/count - x̂ dγ/count)."""
    if not x.numel():
        return
    dy, x, dx = _flatten(dy, x, dx)
    plan, sizes, constants = _plan(x, operands=2)
    _backward_apply_kernel[(plan.channel_blocks * plan.splits,)](
        dy, x, mean, rstd, gamma, dgamma, dbeta, dx, *sizes, *plan.split, count,
        *dy.stride(), *x.stride(), *dx.stride(), DY_MODE=follower_mode(2, x, dy), DX_MODE=follower_mode(2, x, dx), **constants,
    )  # fmt: skip


def backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta) -> None:
    """`backward_reduce` and `backward_apply`, in one launch where a program can own whole channels."""
    dy, x, dx = _flatten(dy, x, dx)
    plan, sizes, constants = _plan(x, operands=2, whole=True)
    count = x.shape[0] * x.shape[2]
    if plan.splits > 1 or not x.numel():
        backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
        backward_apply(dy, x, mean, rstd, gamma, dgamma, dbeta, count, dx)
        return
    _backward_kernel[(plan.channel_blocks,)](
        dy, x, mean, rstd, gamma, dx, dgamma, dbeta, *sizes, count,
        *dy.stride(), *x.stride(), *dx.stride(), RESIDENT=plan.tiles == 1,
        DY_MODE=follower_mode(2, x, dy), DX_MODE=follower_mode(2, x, dx), **constants,
    )  # fmt: skip


def inference_backward(dy, x, mean, rstd, gamma, dx, dgamma, dbeta) -> None:
    """Backward where mean and rstd are constants: dx = γ rstd dy, and the sums of `backward_reduce`."""
    backward_reduce(dy, x, mean, rstd, dgamma, dbeta)
    if not x.numel():
        return
    dy, dx = _flatten(dy, dx)
    plan, sizes, constants = _plan(dy, operands=1)
    _backward_apply_kernel[(plan.channel_blocks * plan.splits,)](
        dy, None, None, rstd, gamma, None, None, dx, *sizes, *plan.split, 1,
        *dy.stride(), *dy.stride(), *dx.stride(), DY_MODE=constants["MODE"], DX_MODE=follower_mode(2, dy, dx), **constants,
    )  # fmt: skip
