"""Log-probability of a class, entropy and log Σ exp along the middle axis of (N, V, S), and their gradient.

    d_c      = (z_c - m) / T,   m = max_c z_c,   T the temperature
    sum_exp_minus_1   = Σ exp(d) - 1,   mean = Σ exp(d) d / Σ exp(d)
    lse      = m / T + log Σ exp(d)
    log_prob = d_t - log Σ exp(d)
    entropy  = log Σ exp(d) - mean
    dz_c     = (p_c (g_lse - g_log_prob - g_entropy (d_c - mean)) + g_log_prob δ_ct) / T,   p = exp(d) / Σ exp(d)
    source: docs/derivations.md, section 3.8
    bytes   forward: read z.  backward: read z, write dz.

`forward` saves m, sum_exp_minus_1 and mean for the backward pass, and z_t - m. An lse rounded near 1e4 would lose the digits of
p, and a sum near 1 those of 1 - p. Differences of logits are taken before they are divided by T: dividing first would round
large logits. A row whose target is `ignore_index` reads nothing and gives zeros; one whose target is out of range reads
nothing, gives NaN and leaves its number in `invalid`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import _tile
from ._cross_entropy.tile import hard_target, product_or_0
from ._rows import (
    ACC,
    access_mode,
    as_acc,
    empty_lanes,
    finite_base,
    log1p,
    merge_lanes,
    merged_sum_exp_minus_1,
    operand_mode,
    plan_constants,
    rows_along_s,
    rows_of_tile,
    warps,
)
from .device import device_of
from .launch import launch
from .plan import cdiv, float_and_bits
from .row_plan import plan_columns, plan_rows


# ---------------------------------------------------------------------------------------------- the sums of a row
@triton.jit
def _accumulate_lanes(m, sum_exp_minus_1, spread, z, beta) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Each lane's m, Σ exp(d) - 1 and Σ exp(d) d, d = (z - m) beta, after one more value a lane; no thread waits."""
    d = (z - m) * beta
    e = tl.exp(-tl.abs(d))
    rises = z > m
    spread = tl.where(rises, product_or_0(e, spread - (1.0 + sum_exp_minus_1) * d), spread + product_or_0(e, d))
    return tl.maximum(m, z), tl.where(rises, sum_exp_minus_1 * e, sum_exp_minus_1) + e, spread


@triton.jit
def _merge(m, sum_exp_minus_1, spread, beta) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums of each row from those of its lanes."""
    top = tl.max(m, axis=1)[:, None]
    moved = (m - top) * beta
    of_top, total, shrunk = merge_lanes(moved, sum_exp_minus_1)
    in_spread = tl.sum(product_or_0(shrunk, spread + product_or_0(1.0 + sum_exp_minus_1, moved)), axis=1)[:, None]
    return tl.where(of_top == float("-inf"), of_top, top), total, in_spread


@triton.jit
def _accumulate(m, sum_exp_minus_1, spread, z, z_edges, beta) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The sums of rows after one more tile of logits z and the rows' edges z_edges; either may be None."""
    top = _tile.max_with_rows(m, z, z_edges)
    base = finite_base(top)
    d, d_edges, e, e_edges = None, None, None, None
    if z is not None:
        d = (z - base) * beta
        e = tl.exp(d)
        d = product_or_0(e, d)
    if z_edges is not None:
        d_edges = (z_edges - _tile.scalar_if_one(base)) * beta
        e_edges = tl.exp(d_edges)
        d_edges = product_or_0(e_edges, d_edges)
    moved = (m - base) * beta
    shrunk = tl.where(top > m, tl.exp(moved), 1.0)
    spread = _tile.add_row_sums(product_or_0(shrunk, spread + product_or_0(1.0 + sum_exp_minus_1, moved)), d, d_edges)
    return top, merged_sum_exp_minus_1(moved, sum_exp_minus_1, tl.zeros_like(m), e, e_edges), spread


# ---------------------------------------------------------------------------------------------- kernels
@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "ignore_index", "beta_bits"])
def _forward_kernel(
    z_ptr, target_ptr, log_prob_ptr, entropy_ptr, lse_ptr, stats_ptr, invalid_ptr,
    V, S, rows, tiles, ignore_index, beta, beta_bits, stride_zn, stride_zv, stride_zs, stride_tn, stride_ts,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """log_prob, entropy and lse of each row, and what the backward pass needs. beta = 1/T.

    Grid: one program a tile of BLOCK_R rows. Reads z once; writes three numbers a row, and four more where stats_ptr is given.
    """
    NEG_INF: tl.constexpr = float("-inf")
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    beta = as_acc(beta, beta_bits, ACC)
    # 1. which rows, their targets, and the logits there: as (R,), for as (R, 1) every thread of a row would read them
    n, s = rows_of_tile(tl.program_id(0), S, tiles, BLOCK_R)
    row = n * S + s
    t, known, bad, _ = hard_target(target_ptr, n * stride_tn + s * stride_ts, None, s < S, V, ignore_index, ACC)
    z_t = tl.load(z_ptr + (n * stride_zn + s * stride_zs + t * stride_zv), mask=known, other=NEG_INF).to(ACC)
    tl.atomic_min(invalid_ptr + s * 0, row, mask=bad, sem="relaxed")
    row, live, known, bad, z_t = row[:, None], (s < S)[:, None], known[:, None], bad[:, None], z_t[:, None]
    start = n * stride_zn + s[:, None] * stride_zs
    head = _tile.head_of(start, MODE, GROUP)

    # 2. one pass over z: the tail, each lane for itself, then the first KEEP lanes and the row's edges
    z, z_edges = None, None
    zero = tl.zeros([BLOCK_R, 1], ACC)
    if FITS:
        m, sum_exp_minus_1, spread = zero + NEG_INF, zero - 1.0, zero
    else:
        tail = tl.arange(0, BLOCK_V)[None, :]
        m, sum_exp_minus_1 = empty_lanes(BLOCK_R, BLOCK_V, ACC)
        spread = tl.zeros([BLOCK_R, BLOCK_V], ACC)
        for i in tl.range(0, tl.cdiv(V - KEEP, BLOCK_V), num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, start, head, offset, tail, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            m, sum_exp_minus_1, spread = _accumulate_lanes(m, sum_exp_minus_1, spread, z_tail, beta)
        m, sum_exp_minus_1, spread = _merge(m, sum_exp_minus_1, spread, beta)
    if KEEP:
        lane = tl.arange(0, KEEP)[None, :]
        hi = _tile.count_in_tile(head, 0, V, known, KEEP, MODE, GROUP)
        z = _tile.load(z_ptr, start, head, 0, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    if EDGES:
        c, inside = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(known), GROUP)
        z_edges = tl.load(z_ptr + (_tile.scalar_if_one(start) + c), mask=inside, other=NEG_INF).to(ACC)
    if KEEP or EDGES:
        m, sum_exp_minus_1, spread = _accumulate(m, sum_exp_minus_1, spread, z, z_edges, beta)

    # 3. the three numbers
    log_total = log1p(sum_exp_minus_1, ACC)
    mean = spread / (1.0 + sum_exp_minus_1)
    otherwise = tl.where(bad, float("nan"), 0.0)
    tl.store(log_prob_ptr + row, tl.where(known, (z_t - finite_base(m)) * beta - log_total, otherwise), mask=live)
    tl.store(entropy_ptr + row, tl.where(known, log_total - mean, otherwise), mask=live)
    tl.store(lse_ptr + row, tl.where(known, m * beta + log_total, otherwise), mask=live)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, tl.where(known, m, 0.0), mask=live)
        tl.store(stats_ptr + (row + rows), tl.where(known, sum_exp_minus_1, 0.0), mask=live)
        tl.store(stats_ptr + (row + 2 * rows), tl.where(known, mean, 0.0), mask=live)
        tl.store(stats_ptr + (row + 3 * rows), tl.where(known, z_t - finite_base(m), 0.0), mask=live)


@triton.jit
def _upstream(ptr, at, known, ACC: tl.constexpr) -> tl.tensor:
    """The upstream gradient of one of the three outputs, (R, 1); 0 where ptr is None."""
    if ptr is None:
        g = tl.zeros(at.shape, ACC)
    else:
        g = tl.load(ptr + at, mask=known, other=0.0).to(ACC)
    return g[:, None]


@triton.jit
def _gradient(z, m, mean, over, z_loss_scale, g_entropy, beta) -> tl.tensor:
    """p (pull - g_entropy (d - mean)), p = exp(d) over, and 0 for a class with p = 0, whose d is -inf."""
    d = (z - finite_base(m)) * beta
    return product_or_0(tl.exp(d) * over, z_loss_scale - g_entropy * (d - mean))


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "columns", "ignore_index", "beta_bits"])
def _backward_kernel(
    z_ptr, target_ptr, stats_ptr, g_log_prob_ptr, g_entropy_ptr, g_lse_ptr, dz_ptr,
    V, S, rows, tiles, columns, ignore_index, beta, beta_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_ts, stride_dn, stride_dv, stride_ds,
    stride_pn, stride_ps, stride_en, stride_es, stride_ln, stride_ls,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr,
) -> None:  # fmt: skip
    """dz of each row from what the forward pass saved. beta = 1/T.

    Grid: one program a tile of BLOCK_R rows and BLOCK_V classes, `columns` of them to a row. Reads z, and of each row three
    saved numbers and three upstream gradients; writes dz.
    """
    NEG_INF: tl.constexpr = float("-inf")
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    beta = as_acc(beta, beta_bits, ACC)
    # 1. which rows, their targets, saved numbers and upstream gradients
    pid = tl.program_id(0).to(tl.int64)
    offset = (pid % columns).to(tl.int32) * BLOCK_V
    n, s = rows_of_tile(pid // columns, S, tiles, BLOCK_R)
    row = n * S + s
    live = s < S
    t, known, bad, _ = hard_target(target_ptr, n * stride_tn + s * stride_ts, None, live, V, ignore_index, ACC)
    z_t = tl.load(z_ptr + (n * stride_zn + s * stride_zs + t * stride_zv), mask=known, other=NEG_INF).to(ACC)
    m = tl.load(stats_ptr + row, mask=known, other=0.0)[:, None]
    sum_exp_minus_1 = tl.load(stats_ptr + (row + rows), mask=known, other=0.0)[:, None]
    mean = tl.load(stats_ptr + (row + 2 * rows), mask=known, other=0.0)[:, None]
    g_log_prob = _upstream(g_log_prob_ptr, n * stride_pn + s * stride_ps, known, ACC) * beta
    g_entropy = _upstream(g_entropy_ptr, n * stride_en + s * stride_es, known, ACC) * beta
    g_lse = _upstream(g_lse_ptr, n * stride_ln + s * stride_ls, known, ACC) * beta
    first = (live & (offset == 0))[:, None]  # the program of a row's first lanes writes its edges
    live, known, bad, t, z_t = live[:, None], known[:, None], bad[:, None], t[:, None].to(tl.int32), z_t[:, None]
    otherwise = tl.where(bad, float("nan"), 0.0)
    over = tl.where(known, 1.0 / (1.0 + sum_exp_minus_1), otherwise)
    z_loss_scale = g_lse - g_log_prob
    # 2. the gradient at the target: without the difference 1 - p_t, which loses its digits as p_t -> 1
    at_target = g_log_prob * ((sum_exp_minus_1 + (1.0 - tl.exp((z_t - finite_base(m)) * beta))) * over)
    at_target += _gradient(z_t, m, mean, over, g_lse, g_entropy, beta)
    at_target = tl.where(known, at_target, otherwise)
    start = n * stride_zn + s[:, None] * stride_zs
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(start, MODE, GROUP)

    # 3. read z, compute and store dz; the first column does the rows' edges too
    lane = tl.arange(0, BLOCK_V)[None, :]
    hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
    z = _tile.load(z_ptr, start, head, offset, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    dz = _gradient(z, m, mean, over, z_loss_scale, g_entropy, beta)
    dz = tl.where(lane == t - (head + offset), at_target, dz)
    hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
    _tile.store(dz_ptr, d_start, head, offset, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
    if EDGES:
        c, inside = _tile.edges(head, V, known & first, GROUP)
        z = tl.load(z_ptr + (start + c), mask=inside, other=NEG_INF).to(ACC)
        dz = tl.where(c == t, at_target, _gradient(z, m, mean, over, z_loss_scale, g_entropy, beta))
        _, inside = _tile.edges(head, V, first, GROUP)
        tl.store(dz_ptr + (d_start + c * stride_dv), dz, mask=inside)


# ---------------------------------------------------------------------------------------------- launchers
def forward(z, target, log_prob, entropy, lse, stats, invalid, *, ignore_index: int, temperature: float) -> None:
    """The three numbers of each row, (N, S) and contiguous, and stats, (4, N, S) or None: m, Σ exp(d) - 1, mean, z_t - m."""
    if not z.numel():
        return
    z, target = rows_along_s(z), rows_along_s(target)
    N, V, S = z.shape
    mode = access_mode(1, z)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    plan = plan_rows(V, S, z.element_size(), mode, unit_s, row_reused=False, rows_ahead=0, device=device_of(z))
    tiles = cdiv(S, plan.BLOCK_R)
    of_rows = plan_constants(plan)
    assert not of_rows.pop("LOOP"), plan  # ahead = 0: no program takes tile after tile
    launch(
        _forward_kernel, plan.grid(N * tiles),
        z, target, log_prob, entropy, lse, stats, invalid,
        V, S, N * S, tiles, ignore_index, *float_and_bits(1.0 / temperature), *z.stride(), *target.stride(),
        plan=plan, reads=("z", "target"), writes=("log_prob", "entropy", "lse", "stats"),
        MODE=mode, GROUP=16 // z.element_size(), ACC=ACC[z.dtype], **of_rows,
    )  # fmt: skip


def backward(
    z, target, stats, g_log_prob, g_entropy, g_lse, dz, *, ignore_index: int, temperature: float
) -> None:  # fmt: skip
    """dz from what `forward` saved; an upstream gradient is (N, S), of any strides, or None for one of zeros."""
    if not z.numel():
        return
    upstream = [g if g is None else rows_along_s(g) for g in (g_log_prob, g_entropy, g_lse)]
    z, target, dz = (rows_along_s(x) for x in (z, target, dz))
    N, V, S = z.shape
    mode = access_mode(1, z)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    plan = plan_columns(V, S, z.element_size(), mode, unit_s, light=True, device=device_of(z))
    tiles = cdiv(S, plan.BLOCK_R)
    strides = [stride for g in upstream for stride in ((0, 0) if g is None else g.stride())]
    launch(
        _backward_kernel, N * tiles * plan.columns,
        z, target, stats, *upstream, dz,
        V, S, N * S, tiles, plan.columns, ignore_index, *float_and_bits(1.0 / temperature),
        *z.stride(), *target.stride(), *dz.stride(), *strides,
        plan=plan, reads=("z", "target", "stats", "g_log_prob", "g_entropy", "g_lse"), writes=("dz",),
        BLOCK_R=plan.BLOCK_R, BLOCK_V=plan.BLOCK_V, MODE=mode, DZ_MODE=operand_mode(1, z, dz),
        GROUP=16 // z.element_size(), ACC=ACC[z.dtype], num_warps=warps(plan.num_warps),
    )  # fmt: skip
