"""Softmax along the middle axis of (N, V, S).

    forward   y_c  = exp(z_c - m) / Σ_k exp(z_k - m),   m = max_k z_k        docs/derivations.md, section 3
    backward  dz_c = y_c (dy_c - Σ_k dy_k y_k)
    bytes     forward: read z, write y.  backward: read dy, read y, write dz.  Of a row that does not fit one program,
              the part beyond KEEP lanes is read twice.

A program owns BLOCK_R rows, neighbours along s. A row that fits stays in registers. Of a longer one the first KEEP lanes do;
the others are read a second time from the far end back, where the cache still holds them.
"""

import torch
import triton
import triton.language as tl

from . import _tile
from ._rows import ACC, end_of, finite_base, online_max_sum, program_rows, rows_along_s, run_mode, sum_apart, warps
from .plan import cdiv, plan_rows


@triton.jit(do_not_specialize=["V", "S", "tiles", "z_end"])
def _forward_kernel(
    z_ptr, y_ptr, V, S, tiles, z_end,
    stride_zn, stride_zv, stride_zs, stride_yn, stride_yv, stride_ys,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, s = program_rows(S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    z_start = n * stride_zn + s * stride_zs
    y_start = n * stride_yn + s * stride_ys
    shift = _tile.row_shift(z_start, MODE, GROUP)
    z_base = _tile.lane_zero(z_start, shift, 0, stride_zv, MODE, GROUP)
    y_base = _tile.lane_zero(y_start, shift, 0, stride_yv, MODE, GROUP)

    lane = tl.arange(0, KEEP)[None, :]
    lo, hi = _tile.span(shift, 0, V, live, KEEP)
    z = _tile.load(z_ptr, z_base, lane, lo, hi, z_end, stride_zv, float("-inf"), MODE, GROUP, ACC)
    m = tl.max(z, axis=1)[:, None]
    e = tl.exp(z - finite_base(m))
    rest, ones = sum_apart(e)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V + GROUP - 1 - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_lo, t_hi = _tile.span(shift, offset, V, live, BLOCK_V)
            base = _tile.lane_zero(z_start, shift, offset, stride_zv, MODE, GROUP)
            more = _tile.load(z_ptr, base, tail, t_lo, t_hi, z_end, stride_zv, float("-inf"), MODE, GROUP, ACC)
            m, rest, ones = online_max_sum(m, rest, ones, more)
        total = rest + ones
        for i in range(steps):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_lo, t_hi = _tile.span(shift, offset, V, live, BLOCK_V)
            base = _tile.lane_zero(z_start, shift, offset, stride_zv, MODE, GROUP)
            more = _tile.load(z_ptr, base, tail, t_lo, t_hi, z_end, stride_zv, float("-inf"), MODE, GROUP, ACC)
            y = tl.exp(more - finite_base(m)) / total
            base = _tile.lane_zero(y_start, shift, offset, stride_yv, MODE, GROUP)
            _tile.store(y_ptr, base, tail, t_lo, t_hi, y, stride_yv, MODE, GROUP)
        e = tl.exp(z - finite_base(m))
    _tile.store(y_ptr, y_base, lane, lo, hi, e / (rest + ones), stride_yv, MODE, GROUP)


@triton.jit(do_not_specialize=["V", "S", "tiles", "dy_end", "y_end"])
def _backward_kernel(
    dy_ptr, y_ptr, dz_ptr, V, S, tiles, dy_end, y_end,
    stride_gn, stride_gv, stride_gs, stride_yn, stride_yv, stride_ys, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n, s = program_rows(S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    g_start = n * stride_gn + s * stride_gs
    y_start = n * stride_yn + s * stride_ys
    d_start = n * stride_dn + s * stride_ds
    shift = _tile.row_shift(y_start, MODE, GROUP)
    g_base = _tile.lane_zero(g_start, shift, 0, stride_gv, MODE, GROUP)
    y_base = _tile.lane_zero(y_start, shift, 0, stride_yv, MODE, GROUP)
    d_base = _tile.lane_zero(d_start, shift, 0, stride_dv, MODE, GROUP)

    lane = tl.arange(0, KEEP)[None, :]
    lo, hi = _tile.span(shift, 0, V, live, KEEP)
    dy = _tile.load(dy_ptr, g_base, lane, lo, hi, dy_end, stride_gv, 0.0, MODE, GROUP, ACC)
    y = _tile.load(y_ptr, y_base, lane, lo, hi, y_end, stride_yv, 0.0, MODE, GROUP, ACC)
    inner = tl.sum(dy * y, axis=1)[:, None]
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V + GROUP - 1 - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_lo, t_hi = _tile.span(shift, offset, V, live, BLOCK_V)
            base = _tile.lane_zero(g_start, shift, offset, stride_gv, MODE, GROUP)
            dy_t = _tile.load(dy_ptr, base, tail, t_lo, t_hi, dy_end, stride_gv, 0.0, MODE, GROUP, ACC)
            base = _tile.lane_zero(y_start, shift, offset, stride_yv, MODE, GROUP)
            y_t = _tile.load(y_ptr, base, tail, t_lo, t_hi, y_end, stride_yv, 0.0, MODE, GROUP, ACC)
            inner += tl.sum(dy_t * y_t, axis=1)[:, None]
        for i in range(steps):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_lo, t_hi = _tile.span(shift, offset, V, live, BLOCK_V)
            base = _tile.lane_zero(g_start, shift, offset, stride_gv, MODE, GROUP)
            dy_t = _tile.load(dy_ptr, base, tail, t_lo, t_hi, dy_end, stride_gv, 0.0, MODE, GROUP, ACC)
            base = _tile.lane_zero(y_start, shift, offset, stride_yv, MODE, GROUP)
            y_t = _tile.load(y_ptr, base, tail, t_lo, t_hi, y_end, stride_yv, 0.0, MODE, GROUP, ACC)
            base = _tile.lane_zero(d_start, shift, offset, stride_dv, MODE, GROUP)
            _tile.store(dz_ptr, base, tail, t_lo, t_hi, y_t * (dy_t - inner), stride_dv, MODE, GROUP)
    dz = y * (dy - inner)
    _tile.store(dz_ptr, d_base, lane, lo, hi, dz, stride_dv, MODE, GROUP)


def forward(z: torch.Tensor, y: torch.Tensor) -> None:
    """y = softmax(z) along axis 1 of (N, V, S)."""
    if not z.numel():
        return
    z, y = rows_along_s(z), rows_along_s(y)
    N, V, S = z.shape
    mode = run_mode(1, z, y)
    plan = plan_rows(V, S, z.element_size(), mode, unit_s=z.stride(2) == 1 and z.stride(1) != 1, heavy=V > 32768)
    tiles = cdiv(S, plan.BLOCK_R)
    _forward_kernel[(N * tiles,)](
        z, y, V, S, tiles, end_of(z), *z.stride(), *y.stride(),
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
    plan = plan_rows(V, S, y.element_size(), mode, unit_s=y.stride(2) == 1 and y.stride(1) != 1, heavy=True)
    tiles = cdiv(S, plan.BLOCK_R)
    _backward_kernel[(N * tiles,)](
        dy, y, dz, V, S, tiles, end_of(dy), end_of(y), *dy.stride(), *y.stride(), *dz.stride(),
        BLOCK_R=plan.BLOCK_R, KEEP=plan.KEEP, BLOCK_V=plan.BLOCK_V, FITS=plan.FITS,
        MODE=mode, GROUP=16 // y.element_size(), ACC=ACC[y.dtype], num_warps=warps(plan.num_warps),
    )  # fmt: skip
