"""The kernels of batch normalisation's backward pass; `batch_norm.py` has the formulas, bytes and launchers."""

import triton
import triton.language as tl

from .. import _tile
from .activation import let_through
from .mask import load_bits, load_edge_bits
from .statistics import as_vector, compensated_add, halved_lanes, over_splits, per_channel, per_channel_with_edges, splits_of
from .tiles import (
    address_of,
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
from .valid import chosen, chosen_edges, divisor_of

COUNTS = ["N", "S", "lane_blocks", "row_lanes", "tiles", "per_split", "splits", "summed", "m"]


@triton.jit
def _fetch_dy(
    dy, mask, valid, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr, DY_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Loads a tile of dy; 0 where a mask is given and not set, and where a position does not count."""
    values = load_tile(dy, c, at, 0.0, LANES, FLAT, DY_MODE, GROUP, ACC)
    if mask[0] is not None:
        values = tl.where(load_bits(mask, c, at, layout, LANES, FLAT), values, 0.0)
    return chosen(valid, values, 0.0, at, layout, LANES, FLAT, MODE)


@triton.jit
def _fetch_x(
    x, valid, mean_hi, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Loads a tile of x; the mean where a position does not count: a NaN there must not reach a sum."""
    values = load_tile(x, c, at, 0.0, LANES, FLAT, MODE, GROUP, ACC)
    return chosen(valid, values, mean_hi, at, layout, LANES, FLAT, MODE)


@triton.jit
def _load_edges(
    dy, x, mask, valid, mean_hi, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """dy and x at the edges of the rows that begin in the tile, as `_fetch_dy` and `_fetch_x` load them."""
    edges = edges_of(c, tile, layout, ROWS, GROUP)
    values = load_edges(dy, c, edges, 0.0, ACC)
    if mask[0] is not None:
        values = tl.where(load_edge_bits(mask, c, tile, layout, ROWS, GROUP), values, 0.0)
    values = chosen_edges(valid, values, 0.0, edges, layout)
    return values, chosen_edges(valid, load_edges(x, c, edges, 0.0, ACC), scalar_if_one(mean_hi), edges, layout)


@triton.jit
def _passed(
    dy, x, gate, valid, mean_hi, mean_lo, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr, MODE: tl.constexpr,
    RESIDUAL_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """dy a'(p) of a tile, p = γ x̂ + β + residual computed again; 0 in lanes without a value, and where a position does not
    count. gate = (γ rstd, β, residual)."""
    if ACT:
        p = ((x - mean_hi) - mean_lo) * gate[0] + gate[1]
        if gate[2][0] is not None:
            p += load_tile(gate[2], c, at, 0.0, LANES, FLAT, RESIDUAL_MODE, GROUP, ACC)
        dy = tl.where(inside_of(at, LANES, MODE, GROUP), let_through(dy, p, ACT), 0.0)
        dy = chosen(valid, dy, 0.0, at, layout, LANES, FLAT, MODE)
    return dy


@triton.jit
def _passed_edges(
    dy, x, gate, valid, mean_hi, mean_lo, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    ACT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`_passed` for the edges of the rows that begin in the tile."""
    if ACT:
        edges = edges_of(c, tile, layout, ROWS, GROUP)
        p = ((x - scalar_if_one(mean_hi)) - scalar_if_one(mean_lo)) * scalar_if_one(gate[0]) + scalar_if_one(gate[1])
        if gate[2][0] is not None:
            p += load_edges(gate[2], c, edges, 0.0, ACC)
        dy = chosen_edges(valid, tl.where(edges[2], let_through(dy, p, ACT), 0.0), 0.0, edges, layout)
    return dy


@triton.jit
def _started(dy, x, mean_hi, mean_lo, HALVINGS: tl.constexpr, MODE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """Σ dy and Σ dy (x - μ) of a first tile, lane by lane, each with its lost part; dy is 0 in lanes without a value."""
    dbeta, dgamma = halved_lanes(dy, HALVINGS, MODE), halved_lanes(dy * ((x - mean_hi) - mean_lo), HALVINGS, MODE)
    return dbeta, tl.zeros_like(dbeta), dgamma, tl.zeros_like(dbeta)


@triton.jit
def _continued(sums, dy, x, mean_hi, mean_lo, HALVINGS: tl.constexpr, MODE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums after one more tile."""
    total, lost, total_dgamma, lost_dgamma = sums
    total, lost = compensated_add(total, lost, halved_lanes(dy, HALVINGS, MODE))
    total_dgamma, lost_dgamma = compensated_add(
        total_dgamma, lost_dgamma, halved_lanes(dy * ((x - mean_hi) - mean_lo), HALVINGS, MODE)
    )
    return total, lost, total_dgamma, lost_dgamma


@triton.jit
def _ended(sums) -> tuple[tl.tensor, ...]:
    """The two sums of each lane as (hi, lo) each: what Kahan's step has lost is to be subtracted."""
    return sums[0], -sums[1], sums[2], -sums[3]


@triton.jit
def _sums_of(
    dy, x, mask, gate, valid, mean_hi, mean_lo, c, first, stop, layout,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr, ONE: tl.constexpr,
    STAGES: tl.constexpr, HALVINGS: tl.constexpr, MODE: tl.constexpr, DY_MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """(hi, lo) of Σ dy and of Σ dy (x - μ) over the tiles first…stop-1, and dy and x of the first tile and of its rows' edges.

    ONE: there is one tile, with the whole channel. Where hi is infinite or NaN, lo is 0.
    """
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    tile = tile_at(first, layout, BLOCK_N)
    dy_edges, x_edges = c, c  # not used: Triton 3.6 cannot return None
    at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
    x_tile = _fetch_x(x, valid, mean_hi, c, at, layout, LANES, FLAT, MODE, GROUP, ACC)
    dy_tile = _fetch_dy(dy, mask, valid, c, at, layout, LANES, FLAT, MODE, DY_MODE, GROUP, ACC)
    dy_tile = _passed(
        dy_tile, x_tile, gate, valid, mean_hi, mean_lo, c, at, layout,
        LANES, FLAT, MODE, RESIDUAL_MODE, GROUP, ACC, ACT,
    )  # fmt: skip
    sums = _started(dy_tile, x_tile, mean_hi, mean_lo, HALVINGS, MODE)
    if EDGES:
        dy_edges, x_edges = _load_edges(dy, x, mask, valid, mean_hi, c, tile, layout, ROWS, GROUP, ACC)
        dy_edges = _passed_edges(
            dy_edges, x_edges, gate, valid, mean_hi, mean_lo, c, tile, layout, ROWS, GROUP, ACC, ACT
        )  # fmt: skip
        edge_sums = _started(dy_edges, x_edges, scalar_if_one(mean_hi), scalar_if_one(mean_lo), 0, MODE)
    if not ONE:
        for _ in tl.range(first + 1, stop, num_stages=STAGES):
            tile = tile_after(tile, layout, BLOCK_N)
            at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
            x_more = _fetch_x(x, valid, mean_hi, c, at, layout, LANES, FLAT, MODE, GROUP, ACC)
            dy_more = _fetch_dy(dy, mask, valid, c, at, layout, LANES, FLAT, MODE, DY_MODE, GROUP, ACC)
            dy_more = _passed(
                dy_more, x_more, gate, valid, mean_hi, mean_lo, c, at, layout,
                LANES, FLAT, MODE, RESIDUAL_MODE, GROUP, ACC, ACT,
            )  # fmt: skip
            sums = _continued(sums, dy_more, x_more, mean_hi, mean_lo, HALVINGS, MODE)
            if EDGES:
                dy_more, x_more = _load_edges(dy, x, mask, valid, mean_hi, c, tile, layout, ROWS, GROUP, ACC)
                dy_more = _passed_edges(
                    dy_more, x_more, gate, valid, mean_hi, mean_lo, c, tile, layout, ROWS, GROUP, ACC, ACT
                )  # fmt: skip
                edge_sums = _continued(edge_sums, dy_more, x_more, scalar_if_one(mean_hi), scalar_if_one(mean_lo), 0, MODE)
    if EDGES:
        sums = per_channel_with_edges(_ended(sums), _ended(edge_sums))
    else:
        sums = per_channel(_ended(sums))
    dbeta_hi, dbeta_lo, dgamma_hi, dgamma_lo = sums
    dbeta_lo = tl.where(tl.abs(dbeta_hi) < float("inf"), dbeta_lo, 0.0)
    dgamma_lo = tl.where(tl.abs(dgamma_hi) < float("inf"), dgamma_lo, 0.0)
    return dbeta_hi, dbeta_lo, dgamma_hi, dgamma_lo, dy_tile, x_tile, dy_edges, x_edges


@triton.jit
def _write(
    dy_tile, x_tile, slope, dx, dresidual, valid, c, at, layout, LANES: tl.constexpr, FLAT: tl.constexpr,
    MODE: tl.constexpr, DX_MODE: tl.constexpr, DRESIDUAL_MODE: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """Stores dx, and dresidual where there is one, of a tile."""
    out = chosen(valid, _dx(dy_tile, x_tile, slope), 0.0, at, layout, LANES, FLAT, MODE)
    store_tile(dx, out, c, at, LANES, FLAT, DX_MODE, GROUP)
    if dresidual[0] is not None:
        store_tile(dresidual, dy_tile, c, at, LANES, FLAT, DRESIDUAL_MODE, GROUP)


@triton.jit
def _write_edges(
    dy_edges, x_edges, slope, dx, dresidual, valid, c, tile, layout, ROWS: tl.constexpr, GROUP: tl.constexpr
) -> None:
    """`_write` for the edges of the rows that begin in the tile."""
    edges = edges_of(c, tile, layout, ROWS, GROUP)
    slope = (
        scalar_if_one(slope[0]),
        scalar_if_one(slope[1]),
        scalar_if_one(slope[2]),
        scalar_if_one(slope[3]),
        scalar_if_one(slope[4]),
    )
    store_edges(dx, chosen_edges(valid, _dx(dy_edges, x_edges, slope), 0.0, edges, layout), c, edges)
    if dresidual[0] is not None:
        store_edges(dresidual, dy_edges, c, edges)


@triton.jit
def _dx(dy, x, slope) -> tl.tensor:
    """dx = γ rstd (dy - dβ/m - x̂ dγ/m), or γ rstd dy where the statistics were constants (x None).

    slope = (γ rstd, dβ/m, rstd dγ/m, mean hi, mean lo).
    """
    a, b, k, mean_hi, mean_lo = slope
    if x is not None:
        dy = (dy - b) - ((x - mean_hi) - mean_lo) * k
    return dy * a


@triton.jit(do_not_specialize=COUNTS)
def _backward_reduce_kernel(
    dy_ptr, x_ptr, mask_ptr, valid_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, partial_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, per_split, splits,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_mn, stride_mc, stride_mb,
    stride_pn, stride_pc, stride_ps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    STAGES: tl.constexpr, HALVINGS: tl.constexpr, MODE: tl.constexpr, DY_MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr,
    GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """Σ dy (x - μ) and Σ dy of each split of each channel.

    Grid: one program a split of a block of BLOCK_C channels, `per_split` tiles each. Reads dy and x (and the mask) once. Writes
    partial (4, splits, C): hi and lo of either sum. With ACT dy counts as `_passed` has it; the residual is read too.
    """
    pid = tl.program_id(0).to(tl.int64)
    split = pid % splits
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    first = split * per_split
    mean_hi, mean_lo = vector(mean_ptr, channel, C, 0.0, ACC), vector(mean_ptr + C, channel, C, 0.0, ACC)
    gate = (mean_hi, mean_hi, (residual_ptr, stride_pn, stride_pc, stride_ps))
    if ACT:
        scale = vector(rstd_ptr, channel, C, 0.0, ACC) * vector(gamma_ptr, channel, C, 1.0, ACC)
        gate = (scale, vector(beta_ptr, channel, C, 0.0, ACC), (residual_ptr, stride_pn, stride_pc, stride_ps))
    dbeta_hi, dbeta_lo, dgamma_hi, dgamma_lo, _, _, _, _ = _sums_of(
        (dy_ptr, stride_gn, stride_gc, stride_gs), (x_ptr, stride_xn, stride_xc, stride_xs),
        (mask_ptr, stride_mn, stride_mc, stride_mb), gate, valid_ptr, mean_hi, mean_lo,
        c, first, tl.minimum(first + per_split, tiles), (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs),
        BLOCK_N, LANES, ROWS, FLAT, False, STAGES, HALVINGS, MODE, DY_MODE, RESIDUAL_MODE, GROUP, ACC, ACT,
    )  # fmt: skip
    out = partial_ptr + (split * C + c)
    step = splits.to(tl.int64) * C
    tl.store(out, dgamma_hi, mask=c < C)
    tl.store(out + step, dgamma_lo, mask=c < C)
    tl.store(out + 2 * step, dbeta_hi, mask=c < C)
    tl.store(out + 3 * step, dbeta_lo, mask=c < C)


@triton.jit
def _merged(partial_ptr, channel, C, splits, rstd, SPLITS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(dγ, dβ) of channels (BLOCK_C,) from their splits."""
    dgamma, dgamma_lo, dbeta, dbeta_lo = over_splits(*splits_of(partial_ptr, channel, C, splits, SPLITS))
    dgamma += tl.where(tl.abs(dgamma) < float("inf"), dgamma_lo, 0.0)
    dbeta += tl.where(tl.abs(dbeta) < float("inf"), dbeta_lo, 0.0)
    return as_vector(dgamma, channel) * rstd, as_vector(dbeta, channel)


@triton.jit(do_not_specialize=["splits"])
def _backward_merge_kernel(
    partial_ptr, rstd_ptr, dgamma_ptr, dbeta_ptr, C, splits, SPLITS: tl.constexpr, BLOCK_C: tl.constexpr
) -> None:  # fmt: skip
    """dγ = rstd Σ dy (x - μ) and dβ = Σ dy of each channel from its splits.

    Grid: one program a block of BLOCK_C channels. Reads partial (4, splits, C), at most SPLITS splits.
    """
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    rstd = tl.load(rstd_ptr + channel, mask=channel < C, other=0.0)
    dgamma, dbeta = _merged(partial_ptr, channel, C, splits, rstd, SPLITS)
    tl.store(dgamma_ptr + channel, dgamma, mask=channel < C)
    tl.store(dbeta_ptr + channel, dbeta, mask=channel < C)


@triton.jit(do_not_specialize=COUNTS)
def _backward_apply_kernel(
    dy_ptr, x_ptr, mask_ptr, valid_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, dgamma_ptr, dbeta_ptr,
    dx_ptr, dresidual_ptr, partial_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, per_split, splits, summed, m,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_mn, stride_mc, stride_mb,
    stride_dn, stride_dc, stride_ds, stride_rn, stride_rc, stride_rs, stride_pn, stride_pc, stride_ps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, TRAINED: tl.constexpr, MODE: tl.constexpr, DY_MODE: tl.constexpr,
    DX_MODE: tl.constexpr, DRESIDUAL_MODE: tl.constexpr, RESIDUAL_MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """dx = γ rstd (dy - dβ/m - x̂ dγ/m) of the batch's own statistics (TRAINED), or γ rstd dy of constant ones.

    Grid: one program a split of a block of BLOCK_C channels, the last ones first: the cache still holds what the sums have read
    last. Reads dy and x (and the mask), writes dx (and dresidual). Where partial_ptr is given, each program merges the `summed`
    splits of its channels, SPLITS or fewer, and the first program of each channel writes dγ and dβ. With ACT dy counts as
    `_passed` has it; x and the residual are read for that too.
    """
    pid = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    first = (pid % splits) * per_split
    channel = (pid // splits) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    layout = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    dy, x = (dy_ptr, stride_gn, stride_gc, stride_gs), (x_ptr, stride_xn, stride_xc, stride_xs)
    dx, dresidual = (dx_ptr, stride_dn, stride_dc, stride_ds), (dresidual_ptr, stride_rn, stride_rc, stride_rs)
    mask = (mask_ptr, stride_mn, stride_mc, stride_mb)
    rstd = vector(rstd_ptr, channel, C, 0.0, ACC)
    a = rstd * vector(gamma_ptr, channel, C, 1.0, ACC)
    b, k, mean_hi, mean_lo, beta = a, a, a, a, a
    if ACT:
        beta = vector(beta_ptr, channel, C, 0.0, ACC)
    if TRAINED or ACT:
        mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
        mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
    if TRAINED:
        if partial_ptr is None:
            dgamma, dbeta = vector(dgamma_ptr, channel, C, 0.0, ACC), vector(dbeta_ptr, channel, C, 0.0, ACC)
        else:
            dgamma, dbeta = _merged(partial_ptr, channel, C, summed, line(rstd), SPLITS)
            write = channel < tl.where(first == 0, C, 0)
            tl.store(dgamma_ptr + channel, dgamma, mask=write)
            tl.store(dbeta_ptr + channel, dbeta, mask=write)
            dgamma, dbeta = dgamma[None, :, None], dbeta[None, :, None]
        count = divisor_of(m, ACC)
        k = rstd * (dgamma / count)
        b = dbeta / count
    slope = (a, b, k, mean_hi, mean_lo)
    gate = (a, beta, (residual_ptr, stride_pn, stride_pc, stride_ps))
    stop = tl.minimum(first + per_split, tiles)
    tile = tile_at(stop - 1, layout, BLOCK_N)
    for _ in tl.range(first, stop, num_stages=STAGES):
        at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
        dy_tile = _fetch_dy(dy, mask, valid_ptr, c, at, layout, LANES, FLAT, MODE, DY_MODE, GROUP, ACC)
        x_tile = None
        if TRAINED or ACT:
            x_tile = _fetch_x(x, valid_ptr, mean_hi, c, at, layout, LANES, FLAT, MODE, GROUP, ACC)
        dy_tile = _passed(
            dy_tile, x_tile, gate, valid_ptr, mean_hi, mean_lo, c, at, layout,
            LANES, FLAT, MODE, RESIDUAL_MODE, GROUP, ACC, ACT,
        )  # fmt: skip
        if not TRAINED:
            x_tile = None
        _write(
            dy_tile, x_tile, slope, dx, dresidual, valid_ptr, c, at, layout, LANES, FLAT, MODE, DX_MODE, DRESIDUAL_MODE, GROUP
        )
        if MODE == _tile.SHIFTED:
            dy_edges, x_edges = _load_edges(dy, x, mask, valid_ptr, mean_hi, c, tile, layout, ROWS, GROUP, ACC)
            dy_edges = _passed_edges(
                dy_edges, x_edges, gate, valid_ptr, mean_hi, mean_lo, c, tile, layout, ROWS, GROUP, ACC, ACT
            )  # fmt: skip
            if not TRAINED:
                x_edges = None
            _write_edges(dy_edges, x_edges, slope, dx, dresidual, valid_ptr, c, tile, layout, ROWS, GROUP)
        tile = tile_before(tile, layout, BLOCK_N)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kernel(
    dy_ptr, x_ptr, mask_ptr, valid_ptr, mean_ptr, rstd_ptr, gamma_ptr, beta_ptr, residual_ptr, dx_ptr, dresidual_ptr,
    dgamma_ptr, dbeta_ptr,
    N, C, S, lane_blocks, row_lanes, tiles, m,
    stride_gn, stride_gc, stride_gs, stride_xn, stride_xc, stride_xs, stride_mn, stride_mc, stride_mb,
    stride_dn, stride_dc, stride_ds, stride_rn, stride_rc, stride_rs, stride_pn, stride_pc, stride_ps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr,
    HALVINGS: tl.constexpr, MODE: tl.constexpr, DY_MODE: tl.constexpr, DX_MODE: tl.constexpr, DRESIDUAL_MODE: tl.constexpr,
    RESIDUAL_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
) -> None:  # fmt: skip
    """dγ, dβ and dx of channels that fit one tile, which stays in registers: formulas as in the kernels above.

    Grid: one program a block of BLOCK_C channels. Reads dy and x (and the mask) once, writes dx (and dresidual).
    """
    # 1. which channels, and their statistics
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = channel[None, :, None]
    layout = (N, C, S, lane_blocks, row_lanes, stride_xn, stride_xc, stride_xs)
    dy, x = (dy_ptr, stride_gn, stride_gc, stride_gs), (x_ptr, stride_xn, stride_xc, stride_xs)
    dx, dresidual = (dx_ptr, stride_dn, stride_dc, stride_ds), (dresidual_ptr, stride_rn, stride_rc, stride_rs)
    mask = (mask_ptr, stride_mn, stride_mc, stride_mb)
    mean_hi = vector(mean_ptr, channel, C, 0.0, ACC)
    mean_lo = vector(mean_ptr + C, channel, C, 0.0, ACC)
    rstd = vector(rstd_ptr, channel, C, 0.0, ACC)
    gate = (rstd, rstd, (residual_ptr, stride_pn, stride_pc, stride_ps))
    if ACT:
        scale = rstd * vector(gamma_ptr, channel, C, 1.0, ACC)
        gate = (scale, vector(beta_ptr, channel, C, 0.0, ACC), (residual_ptr, stride_pn, stride_pc, stride_ps))
    # 2. dβ and dγ; program_id(1) is 0, which the compiler does not know (see 3)
    dbeta, dbeta_lo, dgamma, dgamma_lo, dy_tile, x_tile, dy_edges, x_edges = _sums_of(
        dy, x, mask, gate, valid_ptr, mean_hi, mean_lo, c, tl.program_id(1), tiles, layout,
        BLOCK_N, LANES, ROWS, FLAT, True, 1, HALVINGS, MODE, DY_MODE, RESIDUAL_MODE, GROUP, ACC, ACT,
    )  # fmt: skip
    dbeta += dbeta_lo
    dgamma = (dgamma + dgamma_lo) * rstd
    tl.store(dgamma_ptr + c, dgamma, mask=c < C)
    tl.store(dbeta_ptr + c, dbeta, mask=c < C)
    a = rstd * vector(gamma_ptr, channel, C, 1.0, ACC)
    count = divisor_of(m, ACC)
    slope = (a, dbeta / count, rstd * (dgamma / count), mean_hi, mean_lo)
    # 3. dx. The tile's addresses are computed again, from a number that the compiler does not know: kept through the sums they
    # would spill
    tile = (tl.cast(tiles - 1, tl.int64), tiles - 1)
    at = address_of(c, tile, layout, BLOCK_N, LANES, FLAT, MODE, GROUP)
    _write(dy_tile, x_tile, slope, dx, dresidual, valid_ptr, c, at, layout, LANES, FLAT, MODE, DX_MODE, DRESIDUAL_MODE, GROUP)
    if MODE == _tile.SHIFTED:
        _write_edges(dy_edges, x_edges, slope, dx, dresidual, valid_ptr, c, tile, layout, ROWS, GROUP)
