"""Softmax along the middle axis of (N, V, S).

    forward   y_c  = exp(z_c - m) / Σ_k exp(z_k - m),   m = max_k z_k        docs/derivations.md, section 3
    backward  dz_c = y_c (dy_c - Σ_k dy_k y_k)
    bytes     forward: read z, write y.  backward: read dy, read y, write dz.  Of a row that does not fit one program,
              the part beyond KEEP lanes is read twice.

A program owns BLOCK_R rows, neighbours along s. A row that fits stays in registers. Of a longer one the first KEEP lanes do,
which come last in the first pass; the others are read again from the far end back, where the cache still holds them.
"""

import torch
import triton
import triton.language as tl

from . import _tile
from ._rows import ACC, excess_with, finite_base, online_max_excess, program_rows, rows_along_s, run_mode, warps
from .plan import cdiv, plan_rows


@triton.jit(do_not_specialize=["V", "S", "tiles"])
def _forward_kernel(
    z_ptr, y_ptr, V, S, tiles,
    stride_zn, stride_zv, stride_zs, stride_yn, stride_yv, stride_ys,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    NEG_INF: tl.constexpr = float("-inf")
    n, s = program_rows(S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    z_start = n * stride_zn + s * stride_zs
    y_start = n * stride_yn + s * stride_ys
    head = _tile.head_of(z_start, MODE, GROUP)

    m = tl.full([BLOCK_R, 1], NEG_INF, ACC)
    excess = tl.full([BLOCK_R, 1], -1.0, ACC)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            m, excess = online_max_excess(m, excess, z_tail)
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.reach(head, 0, V, live, KEEP, MODE, GROUP)
    z = _tile.load(z_ptr, z_start, head, 0, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    before = m
    m = tl.maximum(m, tl.max(z, axis=1)[:, None])
    e_ends = None
    if ENDS:
        c, inside = _tile.ends(_tile.lone(head), V, _tile.lone(live), GROUP)
        z_ends = tl.load(z_ptr + (_tile.lone(z_start) + c), mask=inside, other=NEG_INF).to(ACC)
        m = tl.maximum(m, _tile.max_ends(z_ends))
        e_ends = tl.exp(z_ends - _tile.lone(finite_base(m)))
    e = tl.exp(z - finite_base(m))
    scale = 1.0 / (1.0 + excess_with(before, excess, m, e, e_ends))

    if ENDS:
        tl.store(y_ptr + (_tile.lone(y_start) + c), e_ends * _tile.lone(scale), mask=inside)
    _tile.store(y_ptr, y_start, head, 0, lane, hi, e * scale, stride_yv, MODE, GROUP)
    if not FITS:
        for i in range(steps):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            y = tl.exp(z_tail - finite_base(m)) * scale
            _tile.store(y_ptr, y_start, head, offset, tail, t_hi, y, stride_yv, MODE, GROUP)


@triton.jit(do_not_specialize=["V", "S", "tiles"])
def _backward_kernel(
    dy_ptr, y_ptr, dz_ptr, V, S, tiles,
    stride_gn, stride_gv, stride_gs, stride_yn, stride_yv, stride_ys, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    n, s = program_rows(S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    g_start = n * stride_gn + s * stride_gs
    y_start = n * stride_yn + s * stride_ys
    d_start = n * stride_dn + s * stride_ds
    head = _tile.head_of(y_start, MODE, GROUP)

    inner = tl.zeros([BLOCK_R, 1], ACC)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
            dy_tail = _tile.load(dy_ptr, g_start, head, offset, tail, t_hi, stride_gv, 0.0, MODE, GROUP, ACC)
            y_tail = _tile.load(y_ptr, y_start, head, offset, tail, t_hi, stride_yv, 0.0, MODE, GROUP, ACC)
            inner += tl.sum(dy_tail * y_tail, axis=1)[:, None]
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.reach(head, 0, V, live, KEEP, MODE, GROUP)
    dy = _tile.load(dy_ptr, g_start, head, 0, lane, hi, stride_gv, 0.0, MODE, GROUP, ACC)
    y = _tile.load(y_ptr, y_start, head, 0, lane, hi, stride_yv, 0.0, MODE, GROUP, ACC)
    inner += tl.sum(dy * y, axis=1)[:, None]
    if ENDS:
        c, inside = _tile.ends(_tile.lone(head), V, _tile.lone(live), GROUP)
        dy_ends = tl.load(dy_ptr + (_tile.lone(g_start) + c), mask=inside, other=0.0).to(ACC)
        y_ends = tl.load(y_ptr + (_tile.lone(y_start) + c), mask=inside, other=0.0).to(ACC)
        inner += _tile.sum_ends(dy_ends * y_ends)
        tl.store(dz_ptr + (_tile.lone(d_start) + c), y_ends * (dy_ends - _tile.lone(inner)), mask=inside)
    _tile.store(dz_ptr, d_start, head, 0, lane, hi, y * (dy - inner), stride_dv, MODE, GROUP)
    if not FITS:
        for i in range(steps):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
            dy_tail = _tile.load(dy_ptr, g_start, head, offset, tail, t_hi, stride_gv, 0.0, MODE, GROUP, ACC)
            y_tail = _tile.load(y_ptr, y_start, head, offset, tail, t_hi, stride_yv, 0.0, MODE, GROUP, ACC)
            _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, y_tail * (dy_tail - inner), stride_dv, MODE, GROUP)


def forward(z: torch.Tensor, y: torch.Tensor) -> None:
    """y = softmax(z) along axis 1 of (N, V, S)."""
    if not z.numel():
        return
    z, y = rows_along_s(z), rows_along_s(y)
    N, V, S = z.shape
    mode = run_mode(1, z, y)
    plan = plan_rows(V, S, z.element_size(), mode, unit_s=z.stride(2) == 1 and z.stride(1) != 1)
    tiles = cdiv(S, plan.BLOCK_R)
    _forward_kernel[(N * tiles,)](
        z, y, V, S, tiles, *z.stride(), *y.stride(),
        BLOCK_R=plan.BLOCK_R, KEEP=plan.KEEP, BLOCK_V=plan.BLOCK_V, FITS=plan.FITS,
        MODE=mode, GROUP=16 // z.element_size(), ACC=ACC[z.dtype], num_warps=warps(plan.num_warps),
    )  # fmt: skip


def backward(dy: torch.Tensor, y: torch.Tensor, dz: torch.Tensor) -> None:
    """dz = y (dy - Σ dy y) along axis 1 of (N, V, S)."""
    if not y.numel():
        return
    dy, y, dz = (rows_along_s(x) for x in (dy, y, dz))
    N, V, S = y.shape
    mode = run_mode(1, y, dy, dz)
    plan = plan_rows(V, S, y.element_size(), mode, unit_s=y.stride(2) == 1 and y.stride(1) != 1, beside=1)
    tiles = cdiv(S, plan.BLOCK_R)
    _backward_kernel[(N * tiles,)](
        dy, y, dz, V, S, tiles, *dy.stride(), *y.stride(), *dz.stride(),
        BLOCK_R=plan.BLOCK_R, KEEP=plan.KEEP, BLOCK_V=plan.BLOCK_V, FITS=plan.FITS,
        MODE=mode, GROUP=16 // y.element_size(), ACC=ACC[y.dtype], num_warps=warps(plan.num_warps),
    )  # fmt: skip
