"""The kernels of batch normalisation's forward pass; `batch_norm.py` has the formulas, bytes and launchers."""

import triton
import triton.language as tl

from .. import _tile
from .._rows import as_acc, quotient
from .activation import activated
from .mask import store_bits, store_edge_bits, unpacked
from .statistics import (
    as_vector,
    continued,
    finite_or_zero,
    first_mean,
    moments,
    over_splits,
    per_channel,
    per_channel_with_edges,
    renewed,
    splits_of,
    started,
)
from .tiles import (
    address_of,
    count_between,
    edges_of,
    inside_of,
    line,
    load_edges,
    load_tile,
    scalar_if_one,
    store_edges,
    store_tile,
    tile_after,
    tile_at,
    tile_before,
    vector,
)
from .valid import (
    bits_set,
    chosen,
    chosen_edges,
    count_of,
    first_is_valid,
    fullest_tile,
    load_valid,
    load_valid_bytes,
    load_valid_edges,
    tile_around,
    total_of,
)

COUNTS = ["N", "S", "lane_blocks", "row_lanes", "tiles", "per_split", "splits", "summed", "m", "eps_bits", "momentum_bits"]


@triton.jit
def _reciprocal_std(var, eps, ACC: tl.constexpr) -> tl.tensor:
    """rstd = 1/√(σ² + ε), each operation rounded to nearest."""
    if tl.float64 == ACC:
        rstd = 1.0 / tl.sqrt(var + eps)
    else:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    return rstd


@triton.jit
def _finish(
    hi, lo, M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, c, C, end,
    m, eps, eps_bits, momentum, momentum_bits, ACC: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Writes mean, var and rstd of the channels c (BLOCK_C,) below `end`, updates the running statistics, and returns rstd.

    m: a number, or a pointer to one that may be 0; the running statistics then stay as they are.
    """
    count, M2 = count_of(m, ACC), tl.where(M2 < 0.0, 0.0, M2)
    if m.dtype.is_ptr():
        kept, count = tl.where(count > 0.0, end, 0), tl.maximum(count, 1.0)
    else:
        kept = end
    var = quotient(M2, alpha * alpha * count, ACC)
    rstd = _reciprocal_std(var, as_acc(eps, eps_bits, ACC), ACC)
    tl.store(mean_ptr + c, hi, mask=c < end)
    tl.store(mean_ptr + (C + c), lo, mask=c < end)
    tl.store(var_ptr + c, var, mask=c < end)
    tl.store(rstd_ptr + c, rstd, mask=c < end)
    weight = as_acc(momentum, momentum_bits, ACC)
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c, mask=c < kept, other=0.0).to(ACC)
        tl.store(running_mean_ptr + c, old * (1.0 - weight) + weight * hi, mask=c < kept)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + c, mask=c < kept, other=0.0).to(ACC)
        new = quotient(M2, alpha * alpha * tl.maximum(count - 1.0, 1.0), ACC)
        tl.store(running_var_ptr + c, old * (1.0 - weight) + weight * new, mask=c < kept)
    return rstd


@triton.jit
def _moments_of(
    x, valid, m, channel, first, stop, layout, alpha,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr,
    STAGES: tl.constexpr, HALVINGS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """(mean hi, mean lo, alpha² M2, count) of the tiles first…stop-1, and the values of the first tile and of its rows' edges.

    ONE: there is one tile, with the whole channel. valid: the positions that count, m then a pointer to their number; or None.
    The first tile is then one in which many do, and the others follow it around.
    """
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    N, C, S, _, _, stride_n, stride_c, stride_s = layout
    c = channel[None, :, None]
    number = first
    if valid is not None and not ONE:
        number = fullest_tile(valid, c, first, stop, layout, BLOCK_N, LANES, MODE, GROUP)
    tile = tile_at(number, layout, BLOCK_N)
    if EDGES:
        edges = edges_of(c, tile, layout, ROWS, GROUP)
        edges_inside = edges[2]
        edge_values = load_edges(x, c, edges, 0.0, ACC)
    at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
    values = load_tile(x, c, at, 0.0, LANES, FLAT, MODE, GROUP, ACC)
    start = tile[0] * stride_n + tl.minimum(tile[1].to(tl.int64) * LANES, S - 1) * stride_s
    one = tl.load(x[0] + (start + channel * stride_c), mask=channel < C, other=0.0).to(ACC)[None, :, None]
    inside = inside_of(at, LANES, MODE, GROUP)
    after = tile_after(tile, layout, BLOCK_N)
    counted_edges = None
    if valid is not None:
        one = tl.where(first_is_valid(valid, tile, layout, LANES), one, 0.0)
        inside = inside & load_valid(valid, at, layout, LANES, FLAT, MODE)
        if EDGES:
            edges_inside = load_valid_edges(valid, edges, layout)
    if valid is not None and ONE:
        count = tl.zeros(c.shape, ACC) + count_of(m, ACC)
    elif valid is not None:
        counted = bits_set(load_valid_bytes(valid, at, layout, LANES, MODE))
        if EDGES:
            counted_edges = edges_inside.to(tl.int32)
        count = total_of(counted, counted_edges, c, ACC)
    elif ONE:
        count = tl.zeros(c.shape, ACC) + tl.cast(N * S, ACC)
    else:
        count = count_between(tile, after, c, layout, BLOCK_N, LANES, FLAT, MODE, GROUP).to(ACC)
    if EDGES:
        origin = first_mean(values, inside, edge_values, edges_inside, count, one)
    else:
        origin = first_mean(values, inside, None, None, count, one)
    origin = origin.to(x[0].dtype.element_ty)  # as it is read in lanes outside
    shift = alpha * origin.to(ACC)
    sums = started(tl.where(inside, alpha * values - shift, 0.0), HALVINGS, MODE)
    if EDGES:
        edge_shift = scalar_if_one(shift)
        edge_sums = started(tl.where(edges_inside, alpha * edge_values - edge_shift, 0.0), 0, MODE)
    if not ONE:
        if valid is not None:
            around = tile_around(tile, number, first, stop, layout, BLOCK_N)
            after, number = (around[0], around[1]), around[2]
        for _ in tl.range(first + 1, stop, num_stages=STAGES):
            at = address_of(c, after, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
            more = load_tile(x, c, at, origin, LANES, FLAT, MODE, GROUP, ACC)
            difference = alpha * more - shift
            if valid is not None:
                packed = load_valid_bytes(valid, at, layout, LANES, MODE)
                counted += bits_set(packed)
                difference = tl.where(unpacked(packed, 8 if LANES >= 8 else LANES), difference, 0.0)
            sums = continued(sums, difference, HALVINGS, MODE)
            if EDGES:
                edges = edges_of(c, after, layout, ROWS, GROUP)
                more = load_edges(x, c, edges, scalar_if_one(origin), ACC)
                difference = alpha * more - edge_shift
                if valid is not None:
                    edges_inside = load_valid_edges(valid, edges, layout)
                    counted_edges += edges_inside.to(tl.int32)
                    difference = tl.where(edges_inside, difference, 0.0)
                edge_sums = continued(edge_sums, difference, 0, MODE)
            if valid is not None:
                around = tile_around(after, number, first, stop, layout, BLOCK_N)
                after, number = (around[0], around[1]), around[2]
            else:
                after = tile_after(after, layout, BLOCK_N)
        if valid is not None:
            count = total_of(counted, counted_edges, c, ACC)
        else:
            count = count_between(tile, after, c, layout, BLOCK_N, LANES, FLAT, MODE, GROUP).to(ACC)
    if EDGES:
        sums = per_channel_with_edges(
            (sums[0], sums[1], sums[2], -sums[3]), (edge_sums[0], edge_sums[1], edge_sums[2], -edge_sums[3])
        )
    else:
        edge_values = c  # not used: Triton 3.6 cannot return None
        sums = per_channel((sums[0], sums[1], sums[2], -sums[3]))
    hi, lo, M2 = moments(sums, count, origin.to(ACC), alpha)
    return hi, lo, M2, count, values, edge_values


@triton.jit
def _activated(values, affine, residual, RELU: tl.constexpr, ACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(y, mask of y > 0 or NaN) of values of x: y = γ x̂ + β + residual, after relu where RELU, or ACT; NaN stays NaN."""
    mean_hi, mean_lo, scale, beta = affine
    y = ((values - mean_hi) - mean_lo) * scale + beta
    if residual is not None:
        y += residual
    on = (y <= 0.0) == 0
    if RELU:
        y = tl.where(on, y, 0.0)
    if ACT:
        y = activated(y, ACT)
    return y, on


@triton.jit
def _write(
    values, affine, residual, y, mask, valid, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr,
    RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Stores y, 0 where a position does not count, and the mask where there is one, of a tile's values of x."""
    more = None
    if residual[0] is not None:
        more = load_tile(residual, c, at, 0.0, LANES, FLAT, RESIDUAL_MODE, GROUP, ACC)
    out, on = _activated(values, affine, more, mask[0] is not None, ACT)
    out = chosen(valid, out, 0.0, at, layout, LANES, FLAT, MODE)
    store_tile(y, out, c, at, LANES, FLAT, Y_MODE, GROUP)
    if mask[0] is not None:
        store_bits(mask, on, c, at, layout, LANES, FLAT)


@triton.jit
def _write_edges(
    values, affine, residual, y, mask, valid, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    ACT: tl.constexpr,
) -> None:  # fmt: skip
    """`_write` for the edges of the rows that begin in the tile."""
    edges = edges_of(c, tile, layout, ROWS, GROUP)
    more = None
    if residual[0] is not None:
        more = load_edges(residual, c, edges, 0.0, ACC)
    affine = scalar_if_one(affine[0]), scalar_if_one(affine[1]), scalar_if_one(affine[2]), scalar_if_one(affine[3])
    out, on = _activated(values, affine, more, mask[0] is not None, ACT)
    store_edges(y, chosen_edges(valid, out, 0.0, edges, layout), c, edges)
    if mask[0] is not None:
        store_edge_bits(mask, on, c, tile, layout, ROWS, GROUP)


@triton.jit(do_not_specialize=COUNTS)
def _statistics_kernel(
    x_ptr, valid_ptr, partial_ptr, N, C, S, lane_blocks, row_lanes, tiles, per_split, splits, alpha,
    stride_xn, stride_xc, stride_xs,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    STAGES: tl.constexpr, HALVINGS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """μ and M2 = Σ (x - μ)² of each split of each channel.

    Grid: one program a split of a block of BLOCK_C channels, `per_split` tiles each. Reads x once. Writes partial (4, splits,
    C): mean hi and lo, alpha² M2 and count.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    first = split * per_split
    layout = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    mean_hi, mean_lo, M2, count, _, _ = _moments_of(
        (x_ptr, stride_xn, stride_xc, stride_xs), valid_ptr, None, channel, first, tl.minimum(first + per_split, tiles), layout,
        alpha,
        BLOCK_N, LANES, ROWS, FLAT, False, STAGES, HALVINGS, MODE, GROUP, ACC,
    )  # fmt: skip
    out = partial_ptr + (split * C + c)
    tl.store(out, mean_hi, mask=c < C)
    tl.store(out + splits * C, mean_lo, mask=c < C)
    tl.store(out + 2 * splits * C, M2, mask=c < C)
    tl.store(out + 3 * splits * C, count, mask=c < C)


@triton.jit
def _merged(partial_ptr, channel, C, splits, m, alpha, SPLITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(mean hi, mean lo, alpha² M2) of channels (BLOCK_C,) from their splits, by Chan's formulas: first the means, as
    differences from the first split's, then the squares about the common mean.

    m: a pointer where some values do not count; the first split may then have none, and a mean of another is taken."""
    hi, lo, M2, count = splits_of(partial_ptr, channel, C, splits, SPLITS)
    if m.dtype.is_ptr():
        first = as_vector(finite_or_zero(tl.max(tl.where(count > 0.0, hi, float("-inf")), axis=0)), channel)
    else:
        first = finite_or_zero(tl.load(partial_ptr + channel, mask=channel < C, other=0.0))
    if channel.shape[0] == 1:
        origin = tl.max(first, axis=0)
    else:
        origin = first[None, :]
    delta = (hi - origin) + lo
    none = tl.zeros_like(delta)
    # a split that is not there counts as none; its 0 - origin is finite
    u, _, total, _ = over_splits(delta * count, none, count, none)
    u /= tl.maximum(total, 1.0)
    d = alpha * (delta - u) if channel.shape[0] == 1 else alpha * (delta - u[None, :])
    M2, more, _, _ = over_splits(M2, count * d * d, none, none)
    hi, lo = renewed(first, as_vector(u, channel))
    return hi, lo, as_vector(M2 + more, channel)


@triton.jit(do_not_specialize=COUNTS)
def _merge_kernel(
    partial_ptr, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, C, splits, alpha,
    m, eps, eps_bits, momentum, momentum_bits,
    SPLITS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """mean, var, rstd and the running statistics of each channel from its splits.

    Grid: one program a block of BLOCK_C channels. Reads partial (4, splits, C), at most SPLITS splits.
    """
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    hi, lo, M2 = _merged(partial_ptr, channel, C, splits, m, alpha, SPLITS)
    _finish(
        hi, lo, M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _normalize_kernel(
    x_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, y_ptr, mask_ptr, valid_ptr,
    partial_ptr, var_ptr, running_mean_ptr, running_var_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, per_split, splits, summed, alpha, m, eps, eps_bits, momentum, momentum_bits,
    stride_xn, stride_xc, stride_xs, stride_rn, stride_rc, stride_rs, stride_yn, stride_yc, stride_ys,
    stride_mn, stride_mc, stride_mb,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """y = (x - μ) (rstd γ) + β + residual, with relu and its mask where mask_ptr is given, or through ACT; 0 where valid_ptr is
    given and a position does not count.

    Grid: one program a split of a block of BLOCK_C channels, the last ones first: the cache still holds what the statistics
    have read last. Reads x (and the residual), writes y (and the mask). Where partial_ptr is given, each program merges the
    `summed` splits of its channels, SPLITS or fewer, and the first program of each channel writes mean, var and rstd.
    """
    pid = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = (pid % splits) * per_split
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    layout = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    x, y = (x_ptr, stride_xn, stride_xc, stride_xs), (y_ptr, stride_yn, stride_yc, stride_ys)
    residual, mask = (residual_ptr, stride_rn, stride_rc, stride_rs), (mask_ptr, stride_mn, stride_mc, stride_mb)
    gamma, beta = vector(gamma_ptr, channel, C, 1.0, ACC), vector(beta_ptr, channel, C, 0.0, ACC)
    if partial_ptr is None:
        mean_hi, mean_lo = vector(mean_ptr, channel, C, 0.0, ACC), vector(mean_ptr + C, channel, C, 0.0, ACC)
        rstd = vector(rstd_ptr, channel, C, 0.0, ACC)
    else:
        mean_hi, mean_lo, M2 = _merged(partial_ptr, channel, C, summed, m, alpha, SPLITS)
        rstd = _finish(
            mean_hi, mean_lo, M2, alpha, mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
            channel, C, tl.where(first == 0, C, 0), m, eps, eps_bits, momentum, momentum_bits, ACC,
        )[None, :, None]  # fmt: skip
        mean_hi, mean_lo = mean_hi[None, :, None], mean_lo[None, :, None]
    # from the last tile of the split to its first
    affine = (mean_hi, mean_lo, rstd * gamma, beta)
    stop = tl.minimum(first + per_split, tiles)
    tile = tile_at(stop - 1, layout, BLOCK_N)
    for _ in tl.range(first, stop, num_stages=STAGES):
        at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
        values = load_tile(x, c, at, 0.0, LANES, FLAT, MODE, GROUP, ACC)
        _write(
            values, affine, residual, y, mask, valid_ptr, c, at, layout,
            LANES, FLAT, MODE, RESIDUAL_MODE, Y_MODE, GROUP, ACC, ACT,
        )  # fmt: skip
        if MODE == _tile.SHIFTED:
            edge_values = load_edges(x, c, edges_of(c, tile, layout, ROWS, GROUP), 0.0, ACC)
            _write_edges(edge_values, affine, residual, y, mask, valid_ptr, c, tile, layout, ROWS, GROUP, ACC, ACT)
        tile = tile_before(tile, layout, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    x_ptr, gamma_ptr, beta_ptr, residual_ptr, y_ptr, mask_ptr, valid_ptr,
    mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, alpha, m, eps, eps_bits, momentum, momentum_bits,
    stride_xn, stride_xc, stride_xs, stride_rn, stride_rc, stride_rs, stride_yn, stride_yc, stride_ys,
    stride_mn, stride_mc, stride_mb,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    HALVINGS: tl.constexpr, MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr, Y_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Statistics and y of channels that fit one tile, which stays in registers: formulas as in the kernels above.

    Grid: one program a block of BLOCK_C channels. Reads x (and the residual) once, writes y (and the mask).
    """
    # 1. which channels
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    layout = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    x, y = (x_ptr, stride_xn, stride_xc, stride_xs), (y_ptr, stride_yn, stride_yc, stride_ys)
    residual, mask = (residual_ptr, stride_rn, stride_rc, stride_rs), (mask_ptr, stride_mn, stride_mc, stride_mb)
    # 2. statistics; program_id(1) is 0, which the compiler does not know (see 3)
    mean_hi, mean_lo, M2, _, values, edge_values = _moments_of(
        x, valid_ptr, m, channel, tl.program_id(1), tiles, layout, alpha,
        BLOCK_N, LANES, ROWS, FLAT, True, 1, HALVINGS, MODE, GROUP, ACC,
    )  # fmt: skip
    rstd = _finish(
        line(mean_hi), line(mean_lo), line(M2), alpha,
        mean_ptr, var_ptr, rstd_ptr, running_mean_ptr, running_var_ptr, channel, C, C,
        m, eps, eps_bits, momentum, momentum_bits, ACC,
    )  # fmt: skip
    scale = rstd[None, :, None] * vector(gamma_ptr, channel, C, 1.0, ACC)
    affine = (mean_hi, mean_lo, scale, vector(beta_ptr, channel, C, 0.0, ACC))
    # 3. y. The tile's addresses are computed again, from a number that the compiler does not know: kept through the sums they
    # would spill
    tile = (tl.cast(tiles - 1, tl.int64), tiles - 1)
    at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
    _write(
        values, affine, residual, y, mask, valid_ptr, c, at, layout, LANES, FLAT, MODE, RESIDUAL_MODE, Y_MODE, GROUP, ACC, ACT
    )
    if MODE == _tile.SHIFTED:
        _write_edges(edge_values, affine, residual, y, mask, valid_ptr, c, tile, layout, ROWS, GROUP, ACC, ACT)
