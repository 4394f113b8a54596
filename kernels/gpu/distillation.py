"""Divergences of a teacher's and a student's softmax along the middle axis of (N, V, S), and their gradients.

    p = softmax(teacher / T),  q = softmax(student / T),  u = log q - log p,  φ(x) = e^x - 1 - x
    forward           KL(p‖q) = Σ p φ(u)
    reverse           KL(q‖p)
    jensen_shannon    β KL(p‖M) + (1 - β) KL(q‖M),  M = β p + (1 - β) q
    dstudent, dteacher of KL(p‖q): (q - p) / T, -p (u + KL) / T; of KL(q‖p) with p and q exchanged
    of jensen_shannon: -(1 - β) q (log(M/q) + KL(q‖M)) / T, -β p (log(M/p) + KL(p‖M)) / T
    source: docs/derivations.md, section 3.9
    bytes   forward: read student and teacher; jensen_shannon a second time what does not fit one program.
            backward: read both, write the gradients that are asked for.

A sum of p φ(u) has no terms of two signs: of nearly equal rows it keeps its digits. For the backward pass `forward` saves
the maximum m and the sum Z of the exponentials of both rows, s, κ and two divergences, where
u = ((student - teacher) / T - s) - κ: s is a rounded number, κ what it lacks. A row that the mask leaves out reads nothing
and gives zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _tile
from ._cross_entropy.tile import product_or_0
from ._distillation.sums import accumulate_lanes, empty_sums, terms, terms_of_lanes, totals
from ._distillation.terms import by_size, log1p, minus_one, mixed, mixed_logs, phi_near
from ._rows import ACC, access_mode, as_acc, finite_base, operand_mode, plan_constants, rows_along_s, rows_of_tile, warps
from .device import device_of
from .launch import launch
from .plan import cdiv, float_and_bits
from .row_plan import plan_columns, plan_rows


# ---------------------------------------------------------------------------------------------- forward
@triton.jit
def _rows_and_starts(
    pid, S, tiles, mask_ptr, strides, MODE: tl.constexpr, GROUP: tl.constexpr, BLOCK_R: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """(row, live, known, start in base, in other, head) of a tile's rows, columns (R, 1); known: those that count."""
    stride_bn, stride_bs, stride_on, stride_os, stride_mn, stride_ms = strides
    n, s = rows_of_tile(pid, S, tiles, BLOCK_R)
    live = s < S
    known = live
    if mask_ptr is not None:
        known = live & (tl.load(mask_ptr + (n * stride_mn + s * stride_ms), mask=live, other=0) != 0)
    row, s, live, known = (n * S + s)[:, None], s[:, None], live[:, None], known[:, None]
    start = n * stride_bn + s * stride_bs
    return row, live, known, start, n * stride_on + s * stride_os, _tile.head_of(start, MODE, GROUP)


@triton.jit
def _pair(base_ptr, other_ptr, starts, head, offset, lane, hi, stride_b, stride_o,
          MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """A tile of both rows' bodies."""
    NEG_INF: tl.constexpr = float("-inf")
    start, start_o = starts
    base = _tile.load(base_ptr, start, head, offset, lane, hi, stride_b, NEG_INF, MODE, GROUP, ACC)
    return base, _tile.load(other_ptr, start_o, head, offset, lane, hi, stride_o, NEG_INF, MODE, GROUP, ACC)


@triton.jit
def _shift(m, Z, m_o, Z_o, scale) -> tuple[tl.tensor, tl.tensor]:
    """s, about lse(other / T) - lse(base / T), and what its rounding left out."""
    of_tops, of_sums = (m_o - m) * scale, tl.log(Z_o / Z)
    s = of_tops + of_sums
    tops_are_larger = tl.abs(of_tops) > tl.abs(of_sums)
    large, small = tl.where(tops_are_larger, of_tops, of_sums), tl.where(tops_are_larger, of_sums, of_tops)
    return s, (large - s) + small


@triton.jit
def _store_stats(stats_ptr, row, rows, live, known, m, Z, m_o, Z_o, s, kappa, of_base, of_other) -> None:
    tl.store(stats_ptr + row, tl.where(known, m, 0.0), mask=live)
    tl.store(stats_ptr + (row + rows), tl.where(known, Z, 1.0), mask=live)
    tl.store(stats_ptr + (row + 2 * rows), tl.where(known, m_o, 0.0), mask=live)
    tl.store(stats_ptr + (row + 3 * rows), tl.where(known, Z_o, 1.0), mask=live)
    tl.store(stats_ptr + (row + 4 * rows), tl.where(known, s, 0.0), mask=live)
    tl.store(stats_ptr + (row + 5 * rows), tl.where(known, kappa, 0.0), mask=live)
    tl.store(stats_ptr + (row + 6 * rows), tl.where(known, of_base, 0.0), mask=live)
    tl.store(stats_ptr + (row + 7 * rows), tl.where(known, of_other, 0.0), mask=live)


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "scale_bits"])
def _divergence_kernel(
    base_ptr, other_ptr, mask_ptr, loss_ptr, stats_ptr, V, S, rows, tiles, scale, scale_bits,
    stride_bn, stride_bv, stride_bs, stride_on, stride_ov, stride_os, stride_mn, stride_ms,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """KL(base‖other) = A - φ(κ) of each row, and what the backward pass needs. scale = 1/T.

    Grid: one program a tile of BLOCK_R rows. Reads both rows once; writes one number a row, and eight more where stats_ptr is
    given.
    """
    NEG_INF: tl.constexpr = float("-inf")
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    scale = as_acc(scale, scale_bits, ACC)
    strides = stride_bn, stride_bs, stride_on, stride_os, stride_mn, stride_ms
    row, live, known, start, start_o, head = _rows_and_starts(
        tl.program_id(0), S, tiles, mask_ptr, strides, MODE, GROUP, BLOCK_R
    )
    starts = start, start_o

    # 1. the sums of each lane of what lies beyond the first KEEP lanes
    sums = empty_sums(BLOCK_R, 1, ACC)
    base, other, base_edges, other_edges = None, None, None, None
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        sums = empty_sums(BLOCK_R, BLOCK_V, ACC)
        for i in tl.range(0, tl.cdiv(V - KEEP, BLOCK_V), num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z, z_o = _pair(base_ptr, other_ptr, starts, head, offset, tail, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
            sums = accumulate_lanes(sums, z, z_o, scale, ACC)
    # 2. the first lanes, and the edges of rows off 16 bytes
    if KEEP:
        lane = tl.arange(0, KEEP)[None, :]
        hi = _tile.count_in_tile(head, 0, V, known, KEEP, MODE, GROUP)
        base, other = _pair(base_ptr, other_ptr, starts, head, 0, lane, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
    if EDGES:
        c, inside = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(known), GROUP)
        base_edges = tl.load(base_ptr + (_tile.scalar_if_one(start) + c), mask=inside, other=NEG_INF).to(ACC)
        other_edges = tl.load(other_ptr + (_tile.scalar_if_one(start_o) + c), mask=inside, other=NEG_INF).to(ACC)

    zero = tl.zeros([BLOCK_R, 1], ACC)
    m, Z = totals(zero + NEG_INF, zero, sums[0], sums[1], base, base_edges, scale, not FITS)
    m_o, Z_o = totals(zero + NEG_INF, zero, sums[5], sums[6], other, other_edges, scale, not FITS)
    s, rest = _shift(m, Z, m_o, Z_o, scale)
    # 3. all of them about the row's s
    A, B, F = zero, zero, zero
    if not FITS:
        in_A, in_B, in_F = terms_of_lanes(sums, m, m_o, s, scale, ACC)
        A, B, F = tl.sum(in_A, axis=1)[:, None], tl.sum(in_B, axis=1)[:, None], tl.sum(in_F, axis=1)[:, None]
    if KEEP:
        in_A, in_B, in_F = terms(base, other, m, m_o, s, scale, ACC)
        A, B, F = _tile.add_row_sums(A, in_A, None), _tile.add_row_sums(B, in_B, None), _tile.add_row_sums(F, in_F, None)
    if EDGES:
        in_A, in_B, in_F = terms(
            base_edges, other_edges, _tile.scalar_if_one(m), _tile.scalar_if_one(m_o), _tile.scalar_if_one(s), scale, ACC
        )  # fmt: skip
        A, B, F = _tile.add_row_sums(A, None, in_A), _tile.add_row_sums(B, None, in_B), _tile.add_row_sums(F, None, in_F)

    A = A / Z + F / Z_o
    B = A + B / Z
    kappa = tl.where((A < 0.5) & (tl.abs(B) < 0.25), log1p(B, 1.0 + B, ACC), rest)  # the sums of far rows are no small numbers
    loss = A - phi_near(kappa, ACC)
    tl.store(loss_ptr + row, tl.where(known, loss, 0.0), mask=live)
    if stats_ptr is not None:
        _store_stats(stats_ptr, row, rows, live, known, m, Z, m_o, Z_o, s, kappa, loss, zero)


@triton.jit
def _take_mass(m, Z, z, scale) -> tuple[tl.tensor, tl.tensor]:
    """Each lane's maximum m and Σ exp((z - m) / T) after one more value."""
    e = tl.exp(-tl.abs((z - m) * scale))
    return tl.maximum(m, z), tl.where(z > m, Z * e + 1.0, Z + e)


@triton.jit
def _mixed_terms(base, other, row_stats, scale, beta, gamma, ACC: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What each class adds to KL(p‖M), to KL(q‖M) and to Σ p (e^y - 1)."""
    m, Z, m_o, Z_o, s = row_stats
    p, q = tl.exp((base - m) * scale) / Z, tl.exp((other - m_o) * scale) / Z_o
    y = (other - base) * scale - s
    of_p, of_q = mixed(p, q, y, beta, gamma, ACC)
    return of_p, of_q, minus_one(y, p, q, ACC)


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "scale_bits", "beta_bits", "gamma_bits"])
def _jensen_shannon_kernel(
    base_ptr, other_ptr, mask_ptr, loss_ptr, stats_ptr,
    V, S, rows, tiles, scale, scale_bits, beta, beta_bits, gamma, gamma_bits,
    stride_bn, stride_bv, stride_bs, stride_on, stride_ov, stride_os, stride_mn, stride_ms,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """β KL(p‖M) + γ KL(q‖M) of each row, p of base, q of other, γ = 1 - β, and what the backward pass needs. scale = 1/T.

    M is known when both rows have been read. Grid: one program a tile of BLOCK_R rows. Reads both rows, and once more, from the
    far end, what lies beyond the first KEEP lanes; writes one number a row, and eight more where stats_ptr is given.
    """
    NEG_INF: tl.constexpr = float("-inf")
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    scale = as_acc(scale, scale_bits, ACC)
    beta, gamma = as_acc(beta, beta_bits, ACC), as_acc(gamma, gamma_bits, ACC)
    strides = stride_bn, stride_bs, stride_on, stride_os, stride_mn, stride_ms
    row, live, known, start, start_o, head = _rows_and_starts(
        tl.program_id(0), S, tiles, mask_ptr, strides, MODE, GROUP, BLOCK_R
    )
    starts = start, start_o

    # 1. the maxima and sums of exponentials, of what lies beyond the first KEEP lanes and of these
    lanes = empty_sums(BLOCK_R, 1, ACC)
    m_l, Z_l, m_lo, Z_lo = lanes[0], lanes[1], lanes[5], lanes[6]
    base_edges, other_edges = None, None
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        lanes = empty_sums(BLOCK_R, BLOCK_V, ACC)
        m_l, Z_l, m_lo, Z_lo = lanes[0], lanes[1], lanes[5], lanes[6]
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z, z_o = _pair(base_ptr, other_ptr, starts, head, offset, tail, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
            m_l, Z_l = _take_mass(m_l, Z_l, z, scale)
            m_lo, Z_lo = _take_mass(m_lo, Z_lo, z_o, scale)
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.count_in_tile(head, 0, V, known, KEEP, MODE, GROUP)
    base, other = _pair(base_ptr, other_ptr, starts, head, 0, lane, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
    if EDGES:
        c, inside = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(known), GROUP)
        base_edges = tl.load(base_ptr + (_tile.scalar_if_one(start) + c), mask=inside, other=NEG_INF).to(ACC)
        other_edges = tl.load(other_ptr + (_tile.scalar_if_one(start_o) + c), mask=inside, other=NEG_INF).to(ACC)

    zero = tl.zeros([BLOCK_R, 1], ACC)
    m, Z = totals(zero + NEG_INF, zero, m_l, Z_l, base, base_edges, scale, not FITS)
    m_o, Z_o = totals(zero + NEG_INF, zero, m_lo, Z_lo, other, other_edges, scale, not FITS)
    s, rest = _shift(m, Z, m_o, Z_o, scale)
    # 2. what each class adds, from the first lanes to the last ones
    of_p, of_q, drift = _mixed_terms(base, other, (m, Z, m_o, Z_o, s), scale, beta, gamma, ACC)
    in_p, in_q, D = (
        _tile.add_row_sums(zero, of_p, None),
        _tile.add_row_sums(zero, of_q, None),
        _tile.add_row_sums(zero, drift, None),
    )
    if EDGES:
        of_row = (
            _tile.scalar_if_one(m),
            _tile.scalar_if_one(Z),
            _tile.scalar_if_one(m_o),
            _tile.scalar_if_one(Z_o),
            _tile.scalar_if_one(s),
        )
        of_p, of_q, drift = _mixed_terms(base_edges, other_edges, of_row, scale, beta, gamma, ACC)
        in_p, in_q, D = (
            _tile.add_row_sums(in_p, None, of_p), _tile.add_row_sums(in_q, None, of_q), _tile.add_row_sums(D, None, drift)
        )  # fmt: skip
    if not FITS:
        in_lanes, in_lanes_o = tl.zeros([BLOCK_R, BLOCK_V], ACC), tl.zeros([BLOCK_R, BLOCK_V], ACC)
        drifts = tl.zeros([BLOCK_R, BLOCK_V], ACC)
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z, z_o = _pair(base_ptr, other_ptr, starts, head, offset, tail, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
            more_p, more_q, more_drift = _mixed_terms(z, z_o, (m, Z, m_o, Z_o, s), scale, beta, gamma, ACC)
            in_lanes, in_lanes_o, drifts = in_lanes + more_p, in_lanes_o + more_q, drifts + more_drift
        in_p += tl.sum(in_lanes, axis=1)[:, None]
        in_q += tl.sum(in_lanes_o, axis=1)[:, None]
        D += tl.sum(drifts, axis=1)[:, None]

    kappa = tl.where((in_p + in_q < 0.25) & (tl.abs(D) < 0.25), log1p(D, 1.0 + D, ACC), rest)
    # both are about s, and about K smaller by half of these squares
    in_p -= 0.5 * (gamma * kappa) * (gamma * kappa)
    in_q -= 0.5 * (beta * kappa) * (beta * kappa)
    tl.store(loss_ptr + row, tl.where(known, beta * in_p + gamma * in_q, 0.0), mask=live)
    if stats_ptr is not None:
        _store_stats(stats_ptr, row, rows, live, known, m, Z, m_o, Z_o, s, kappa, in_p, in_q)


# ---------------------------------------------------------------------------------------------- backward
@triton.jit
def _gradients(
    base, other, row_stats, g, scale, beta, gamma, MIXED: tl.constexpr, ACC: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The gradients of base and other, 0 for a class without probability in both."""
    m, over, m_o, over_o, s, kappa, of_base, of_other = row_stats
    p, q = tl.exp((base - m) * scale) * over, tl.exp((other - m_o) * scale) * over_o
    u = ((other - base) * scale - s) - kappa
    if MIXED:
        falls, x, ratio, b, c = by_size(p, q, u, beta, gamma)
        of_large, of_small = mixed_logs(x, ratio, b, c, ACC)
        v, w = tl.where(falls, of_large, of_small), tl.where(falls, of_small, of_large)
        d_base, d_other = -beta * product_or_0(p, v + of_base), -gamma * product_or_0(q, w + of_other)
    else:
        d_base, d_other = -product_or_0(p, u + of_base), minus_one(u, p, q, ACC)
    return product_or_0(g, d_base), product_or_0(g, d_other)


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "columns", "scale_bits", "beta_bits", "gamma_bits"])
def _backward_kernel(
    base_ptr, other_ptr, mask_ptr, stats_ptr, g_ptr, d_base_ptr, d_other_ptr,
    V, S, rows, tiles, columns, scale, scale_bits, beta, beta_bits, gamma, gamma_bits,
    stride_bn, stride_bv, stride_bs, stride_on, stride_ov, stride_os, stride_mn, stride_ms, stride_gn, stride_gs,
    stride_cn, stride_cv, stride_cs, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, MODE: tl.constexpr, BASE_MODE: tl.constexpr, OTHER_MODE: tl.constexpr,
    GROUP: tl.constexpr, MIXED: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """d_base and d_other, either may be None: of β KL(p‖M) + γ KL(q‖M) where MIXED, else of KL(base‖other). scale = 1/T.

    Grid: one program a tile of BLOCK_R rows × BLOCK_V lanes. Reads both rows and nine numbers a row; writes the gradients.
    """
    NEG_INF: tl.constexpr = float("-inf")
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    scale = as_acc(scale, scale_bits, ACC)
    beta, gamma = as_acc(beta, beta_bits, ACC), as_acc(gamma, gamma_bits, ACC)
    pid = tl.program_id(0).to(tl.int64)
    offset = (pid % columns).to(tl.int32) * BLOCK_V
    n, s = rows_of_tile(pid // columns, S, tiles, BLOCK_R)
    row = n * S + s
    live = s < S
    known = live
    if mask_ptr is not None:
        known = live & (tl.load(mask_ptr + (n * stride_mn + s * stride_ms), mask=live, other=0) != 0)
    # one number a row is read one-dimensionally: as a column of a tile, every thread of a row would do it
    g = tl.load(g_ptr + (n * stride_gn + s * stride_gs), mask=known, other=0.0).to(ACC) * scale
    m = finite_base(tl.load(stats_ptr + row, mask=known, other=0.0))[:, None]
    over = (1.0 / tl.load(stats_ptr + (row + rows), mask=known, other=1.0))[:, None]
    m_o = finite_base(tl.load(stats_ptr + (row + 2 * rows), mask=known, other=0.0))[:, None]
    over_o = (1.0 / tl.load(stats_ptr + (row + 3 * rows), mask=known, other=1.0))[:, None]
    shift = tl.load(stats_ptr + (row + 4 * rows), mask=known, other=0.0)[:, None]
    kappa = tl.load(stats_ptr + (row + 5 * rows), mask=known, other=0.0)[:, None]
    of_base = tl.load(stats_ptr + (row + 6 * rows), mask=known, other=0.0)[:, None]
    of_other = tl.load(stats_ptr + (row + 7 * rows), mask=known, other=0.0)[:, None]
    row_stats = m, over, m_o, over_o, shift, kappa, of_base, of_other
    first = (live & (offset == 0))[:, None]  # the rows' edges are the first column's
    live, known, g = live[:, None], known[:, None], g[:, None]
    start, start_o = n * stride_bn + s[:, None] * stride_bs, n * stride_on + s[:, None] * stride_os
    c_start, d_start = n * stride_cn + s[:, None] * stride_cs, n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(start, MODE, GROUP)

    lane = tl.arange(0, BLOCK_V)[None, :]
    hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
    base, other = _pair(base_ptr, other_ptr, (start, start_o), head, offset, lane, hi, stride_bv, stride_ov, MODE, GROUP, ACC)
    d_base, d_other = _gradients(base, other, row_stats, g, scale, beta, gamma, MIXED, ACC)
    hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
    if d_base_ptr is not None:
        _tile.store(d_base_ptr, c_start, head, offset, lane, hi, d_base, stride_cv, BASE_MODE, GROUP)
    if d_other_ptr is not None:
        _tile.store(d_other_ptr, d_start, head, offset, lane, hi, d_other, stride_dv, OTHER_MODE, GROUP)
    if EDGES:
        c, inside = _tile.edges(head, V, known & first, GROUP)
        base = tl.load(base_ptr + (start + c), mask=inside, other=NEG_INF).to(ACC)
        other = tl.load(other_ptr + (start_o + c), mask=inside, other=NEG_INF).to(ACC)
        d_base, d_other = _gradients(base, other, row_stats, g, scale, beta, gamma, MIXED, ACC)
        _, inside = _tile.edges(head, V, first, GROUP)
        if d_base_ptr is not None:
            tl.store(d_base_ptr + (c_start + c * stride_cv), d_base, mask=inside)
        if d_other_ptr is not None:
            tl.store(d_other_ptr + (d_start + c * stride_dv), d_other, mask=inside)


# ---------------------------------------------------------------------------------------------- launchers
def _lead(base: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The one with the smaller elements, by whose 16 bytes lanes are counted, and the MODE of both."""
    pair = (other, base) if other.element_size() < base.element_size() else (base, other)
    return pair[0], access_mode(1, *pair)


def forward(student, teacher, mask, loss, stats, *, kind: str, beta: float, temperature: float) -> None:
    """The divergence of each row, (N, S) and contiguous, and stats, (8, N, S) or None. mask: (N, S) of uint8, or None."""
    if not student.numel():
        return
    mixed_kind = kind == "jensen_shannon"
    base, other = (student, teacher) if kind == "reverse" else (teacher, student)
    base, other = rows_along_s(base), rows_along_s(other)
    mask = None if mask is None else rows_along_s(mask)
    N, V, S = base.shape
    lead, mode = _lead(base, other)
    itemsize, unit_s = lead.element_size(), lead.stride(2) == 1 and lead.stride(1) != 1
    plan = plan_rows(
        V, S, itemsize, mode, unit_s, extra_per_lane=3, dense=mixed_kind, tensors=2, row_reused=mixed_kind, rows_ahead=0,
        device=device_of(lead),
    )  # fmt: skip
    tiles = cdiv(S, plan.BLOCK_R)
    of_rows = plan_constants(plan)
    assert not of_rows.pop("LOOP"), plan  # ahead = 0: no program takes tile after tile
    strides = *base.stride(), *other.stride(), *((0, 0) if mask is None else mask.stride())
    given = base, other, mask, loss, stats, V, S, N * S, tiles, *float_and_bits(1.0 / temperature)
    mixture = *float_and_bits(beta), *float_and_bits(1.0 - beta)
    constants = {"MODE": mode, "GROUP": 16 // itemsize, "ACC": ACC[base.dtype], **of_rows}
    moves: Any = {"plan": plan, "reads": ("base", "other", "mask"), "writes": ("loss", "stats")}
    grid = plan.grid(N * tiles)
    if mixed_kind:
        launch(_jensen_shannon_kernel, grid, *given, *mixture, *strides, again=plan.again(V), **moves, **constants)
    else:
        launch(_divergence_kernel, grid, *given, *strides, **moves, **constants)


def backward(
    student, teacher, mask, stats, upstream, dstudent, dteacher, *, kind: str, beta: float, temperature: float
) -> None:  # fmt: skip
    """The gradients from what `forward` saved, either None; upstream: (N, S), of any strides."""
    if not student.numel():
        return
    pairs = (student, dstudent), (teacher, dteacher)
    (base, d_base), (other, d_other) = pairs if kind == "reverse" else pairs[::-1]
    base, other, upstream = (rows_along_s(x) for x in (base, other, upstream))
    mask, d_base, d_other = (None if x is None else rows_along_s(x) for x in (mask, d_base, d_other))
    N, V, S = base.shape
    lead, mode = _lead(base, other)
    unit_s = lead.stride(2) == 1 and lead.stride(1) != 1
    plan = plan_columns(V, S, lead.element_size(), mode, unit_s, tensors=2)
    tiles = cdiv(S, plan.BLOCK_R)
    strides = *base.stride(), *other.stride(), *((0, 0) if mask is None else mask.stride()), *upstream.stride()
    out_strides = [stride for d in (d_base, d_other) for stride in ((0, 0, 0) if d is None else d.stride())]
    modes = [mode if d is None else operand_mode(1, lead, d) for d in (d_base, d_other)]
    launch(
        _backward_kernel, N * tiles * plan.columns,
        base, other, mask, stats, upstream, d_base, d_other,
        V, S, N * S, tiles, plan.columns, *float_and_bits(1.0 / temperature),
        *float_and_bits(beta), *float_and_bits(1.0 - beta), *strides, *out_strides,
        plan=plan, reads=("base", "other", "mask", "stats", "g"), writes=("d_base", "d_other"),
        BLOCK_R=plan.BLOCK_R, BLOCK_V=plan.BLOCK_V, MODE=mode, BASE_MODE=modes[0], OTHER_MODE=modes[1],
        GROUP=16 // lead.element_size(), MIXED=kind == "jensen_shannon", ACC=ACC[base.dtype], num_warps=warps(plan.num_warps),
    )  # fmt: skip
