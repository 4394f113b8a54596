"""The kernels of batch normalisation's forward pass; `batch_norm.py` has the formulas and the launchers."""

import triton
import triton.language as tl

from . import _tile
from ._channels import (
    alone,
    count_ends,
    count_of,
    ends_of,
    fetch,
    fetch_ends,
    inside_of,
    line,
    lone,
    place,
    put,
    put_ends,
    vector,
)
from ._mask import put_bits, put_end_bits
from ._moments import finite_or_zero, first_moments, next_moments, over_splits, renewed
from ._rows import real

COUNTS = ["N", "S", "lane_blocks", "row_lanes", "tiles", "per_split", "splits", "m", "eps_bits", "momentum_bits"]


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
    count, M2 = tl.cast(m, ACC), tl.where(M2 < 0.0, 0.0, M2)
    var = _quotient(M2, alpha * alpha * count, ACC)
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
        new = _quotient(M2, alpha * alpha * tl.maximum(count - 1.0, 1.0), ACC)
        tl.store(running_var_ptr + c, old * (1.0 - weight) + weight * new, mask=c < C)
    return rstd


@triton.jit
def _with_ends(hi, lo, M2, count, x, c, tile, walk, alpha, ROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr):
    """The moments and their count after the ends of the rows that begin in the tile; their values."""
    ends = ends_of(c, tile, walk, ROWS, GROUP)
    more = count_ends(ends).to(ACC)
    values = fetch_ends(x, c, ends, ACC)
    hi, lo, M2 = next_moments(lone(hi), lone(lo), lone(M2), lone(count), values, ends[2], more, alpha)
    return alone(hi, c), alone(lo, c), alone(M2, c), count + alone(more, c), values


@triton.jit
def _moments_of(
    x, channel, first, stop, walk, alpha,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(mean hi, mean lo, scaled M2, count) of the tiles first…stop-1, ONE where that is one; and the values of the last of
    them and of its ends."""
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    _, C, S, lane_blocks, _, stride_n, stride_c, stride_s = walk
    c = channel[None, :, None]
    at = place(c, first, walk, BLOCK_N, LANES, FLAT, MODE, GROUP)
    values = fetch(x, c, at, LANES, FLAT, MODE, GROUP, ACC)
    position = tl.minimum((first % lane_blocks) * LANES, S - 1)
    start = (first // lane_blocks) * ROWS * stride_n + position * stride_s
    origin = tl.load(x[0] + (start + channel * stride_c), mask=channel < C, other=0.0).to(ACC)[None, :, None]
    count = count_of(at).to(ACC)
    hi, lo, M2 = first_moments(values, inside_of(at, LANES), count, origin, alpha)
    end_values = c  # of no use: a compiled function returns no None
    if ENDS:
        hi, lo, M2, count, end_values = _with_ends(hi, lo, M2, count, x, c, first, walk, alpha, ROWS, GROUP, ACC)
    if not ONE:
        for tile in range(first + 1, stop):
            at = place(c, tile, walk, BLOCK_N, LANES, FLAT, MODE, GROUP)
            values = fetch(x, c, at, LANES, FLAT, MODE, GROUP, ACC)
            more = count_of(at).to(ACC)
            hi, lo, M2 = next_moments(hi, lo, M2, count, values, inside_of(at, LANES), more, alpha)
            count += more
            if ENDS:
                hi, lo, M2, count, end_values = _with_ends(hi, lo, M2, count, x, c, tile, walk, alpha, ROWS, GROUP, ACC)
    return hi, lo, M2, count, values, end_values


@triton.jit
def _activated(values, affine, residual, RELU: tl.constexpr):
    """(y, which y are let through) of values of x: γ x̂ + β + residual, and what is below 0 as 0; NaN stays."""
    mean_hi, mean_lo, scale, beta = affine
    y = ((values - mean_hi) - mean_lo) * scale + beta
    if residual is not None:
        y += residual
    on = (y <= 0.0) == 0
    if RELU:
        y = tl.where(on, y, 0.0)
    return y, on


@triton.jit
def _write(
    values, affine, residual, y, mask, c, at, walk, LANES: tl.constexpr, FLAT: tl.constexpr,
    RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of a tile's values of x."""
    more = None
    if residual[0] is not None:
        more = fetch(residual, c, at, LANES, FLAT, RESIDUAL_MODE, GROUP, ACC)
    out, on = _activated(values, affine, more, mask[0] is not None)
    put(y, out, c, at, LANES, FLAT, Y_MODE, GROUP)
    if mask[0] is not None:
        put_bits(mask, on, c, at, walk, LANES, FLAT)


@triton.jit
def _write_ends(
    values, affine, residual, y, mask, c, tile, walk, ROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """y of the ends of the rows that begin in the tile."""
    ends = ends_of(c, tile, walk, ROWS, GROUP)
    more = None
    if residual[0] is not None:
        more = fetch_ends(residual, c, ends, ACC)
    affine = lone(affine[0]), lone(affine[1]), lone(affine[2]), lone(affine[3])
    out, on = _activated(values, affine, more, mask[0] is not None)
    put_ends(y, out, c, ends)
    if mask[0] is not None:
        put_end_bits(mask, on, c, tile, walk, ROWS, GROUP)


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    x_ptr, partial_ptr, N, C, S, lane_blocks, row_lanes, tiles, per_split, splits, alpha, stride_xn, stride_xc, stride_xs,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """partial (4, splits, C): mean hi and lo, scaled M2 and count of each split of each channel."""
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    first = split * per_split
    walk = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    mean_hi, mean_lo, M2, count, _, _ = _moments_of(
        (x_ptr, stride_xn, stride_xc, stride_xs), channel, first, tl.minimum(first + per_split, tiles), walk, alpha,
        BLOCK_N, LANES, ROWS, FLAT, False, MODE, GROUP, ACC,
    )  # fmt: skip
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
    first = finite_or_zero(tl.load(partial_ptr + channel, mask=channel < C, other=0.0))
    delta = (tl.load(cell, mask=mask, other=0.0) - first[None, :]) + tl.load(cell + step, mask=mask, other=0.0)
    u = over_splits(delta * count, tl.zeros_like(delta)) / total
    d = alpha * (delta - u[None, :])
    squares = tl.load(cell + 2 * step, mask=mask, other=0.0)
    M2 = over_splits(squares, tl.where(mask, count * d * d, 0.0))
    hi, lo = renewed(first, u)
    _finish(
        hi, lo, M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _normalize_kernel(
    x_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, y_ptr, mask_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, per_split, splits,
    stride_xn, stride_xc, stride_xs, stride_rn, stride_rc, stride_rs, stride_yn, stride_yc, stride_ys,
    stride_mn, stride_mc, stride_mb,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = (x - μ) (rstd γ) + β + residual; the last tiles first, for the statistics have just read them."""
    pid = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = (pid % splits) * per_split
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    walk = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    x, y = (x_ptr, stride_xn, stride_xc, stride_xs), (y_ptr, stride_yn, stride_yc, stride_ys)
    residual, mask = (residual_ptr, stride_rn, stride_rc, stride_rs), (mask_ptr, stride_mn, stride_mc, stride_mb)
    scale = vector(rstd_ptr, channel, C, 0.0, ACC) * vector(gamma_ptr, channel, C, 1.0, ACC)
    affine = (
        vector(mean_ptr, channel, C, 0.0, ACC), vector(mean_ptr + C, channel, C, 0.0, ACC),
        scale, vector(beta_ptr, channel, C, 0.0, ACC),
    )  # fmt: skip
    stop = tl.minimum(first + per_split, tiles)
    for i in range(first, stop):
        tile = first + stop - 1 - i
        at = place(c, tile, walk, BLOCK_N, LANES, FLAT, MODE, GROUP)
        values = fetch(x, c, at, LANES, FLAT, MODE, GROUP, ACC)
        _write(values, affine, residual, y, mask, c, at, walk, LANES, FLAT, RESIDUAL_MODE, Y_MODE, GROUP, ACC)
        if MODE == _tile.SHIFTED:
            end_values = fetch_ends(x, c, ends_of(c, tile, walk, ROWS, GROUP), ACC)
            _write_ends(end_values, affine, residual, y, mask, c, tile, walk, ROWS, GROUP, ACC)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, residual_ptr, y_ptr, mask_ptr, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, alpha, m, eps, eps_bits, momentum, momentum_bits,
    stride_xn, stride_xc, stride_xs, stride_rn, stride_rc, stride_rs, stride_yn, stride_yc, stride_ys,
    stride_mn, stride_mc, stride_mb,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    RESIDENT: tl.constexpr, MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Statistics and normalisation of a block of channels by one program; the last tile read stays in registers."""
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    walk = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    x, y = (x_ptr, stride_xn, stride_xc, stride_xs), (y_ptr, stride_yn, stride_yc, stride_ys)
    residual, mask = (residual_ptr, stride_rn, stride_rc, stride_rs), (mask_ptr, stride_mn, stride_mc, stride_mb)
    mean_hi, mean_lo, M2, _, values, end_values = _moments_of(
        x, channel, 0, tiles, walk, alpha, BLOCK_N, LANES, ROWS, FLAT, RESIDENT, MODE, GROUP, ACC
    )  # fmt: skip
    rstd = _finish(
        line(mean_hi), line(mean_lo), line(M2), alpha,
        mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip
    scale = rstd[None, :, None] * vector(gamma_ptr, channel, C, 1.0, ACC)
    affine = (mean_hi, mean_lo, scale, vector(beta_ptr, channel, C, 0.0, ACC))
    # placed anew by a number that the compiler does not know: addresses kept through the sums would spill
    at = place(c, tiles - 1, walk, BLOCK_N, LANES, FLAT, MODE, GROUP)
    _write(values, affine, residual, y, mask, c, at, walk, LANES, FLAT, RESIDUAL_MODE, Y_MODE, GROUP, ACC)
    if MODE == _tile.SHIFTED:
        _write_ends(end_values, affine, residual, y, mask, c, tiles - 1, walk, ROWS, GROUP, ACC)
    if not RESIDENT:
        for i in range(1, tiles):
            tile = tiles - 1 - i
            at = place(c, tile, walk, BLOCK_N, LANES, FLAT, MODE, GROUP)
            values = fetch(x, c, at, LANES, FLAT, MODE, GROUP, ACC)
            _write(values, affine, residual, y, mask, c, at, walk, LANES, FLAT, RESIDUAL_MODE, Y_MODE, GROUP, ACC)
            if MODE == _tile.SHIFTED:
                end_values = fetch_ends(x, c, ends_of(c, tile, walk, ROWS, GROUP), ACC)
                _write_ends(end_values, affine, residual, y, mask, c, tile, walk, ROWS, GROUP, ACC)
