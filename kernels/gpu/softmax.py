"""Softmax along the middle axis of (N, V, S).

    forward   y_c  = exp(z_c - m) / Σ_k exp(z_k - m),   m = max_k z_k        docs/derivations.md, section 3
    backward  dz_c = y_c (dy_c - Σ_k dy_k y_k)
    bytes     forward: read z, write y.  backward: read dy, read y, write dz.  Of a row that does not fit one program,
              the part beyond KEEP lanes is read twice.

A program owns BLOCK_R rows, neighbours along s. A row that fits stays in registers between the two passes over it. Of a longer
row the first KEEP lanes stay; the others, its tail, are read twice. The first pass reads the tail first and the KEEP lanes
last; the second pass reads the tail from its end backwards, because the cache still holds what was read last.
"""

import torch
import triton
import triton.language as tl

from . import _tile
from ._rows import (
    ACC,
    access_mode,
    empty_lanes,
    finite_base,
    merge_lanes,
    merged_sum_exp_minus_1,
    plan_constants,
    rows_along_s,
    rows_of_tile,
    update_lanes,
)
from .device import device_of
from .launch import launch
from .plan import cdiv
from .row_plan import plan_rows


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles"])
def _forward_kernel(
    z_ptr, y_ptr, V, S, rows, tiles,
    stride_zn, stride_zv, stride_zs, stride_yn, stride_yv, stride_ys,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    LOOP: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """y_c = exp(z_c - m) / Σ_k exp(z_k - m) of each row.

    Grid: one program a tile of BLOCK_R rows, or (LOOP) fewer programs that take tile after tile.
    Reads z, once, and what lies beyond KEEP lanes twice; writes y.
    """
    pointers = z_ptr, y_ptr
    strides = stride_zn, stride_zv, stride_zs, stride_yn, stride_yv, stride_ys
    if LOOP:  # the next tile's rows are loaded while this tile is computed
        for pid in tl.range(tl.program_id(0), rows // S * tiles, tl.num_programs(0), num_stages=STAGES):
            _forward_tile(pid, pointers, V, S, tiles, strides, BLOCK_R, KEEP, BLOCK_V, FITS, 1, MODE, GROUP, ACC)
    else:
        _forward_tile(
            tl.program_id(0), pointers, V, S, tiles, strides, BLOCK_R, KEEP, BLOCK_V, FITS, STAGES, MODE, GROUP, ACC
        )  # fmt: skip


@triton.jit
def _forward_tile(
    pid, pointers, V, S, tiles, strides,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """Softmax of tile number `pid`: BLOCK_R rows."""
    z_ptr, y_ptr = pointers
    stride_zn, stride_zv, stride_zs, stride_yn, stride_yv, stride_ys = strides
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    NEG_INF: tl.constexpr = float("-inf")
    # 1. which rows, and where they begin
    n, s = rows_of_tile(pid, S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    z_start = n * stride_zn + s * stride_zs
    y_start = n * stride_yn + s * stride_ys
    head = _tile.head_of(z_start, MODE, GROUP)

    # 2. the tail: each lane's running maximum and sum, joined once at the end
    if FITS:
        m, sum_exp_minus_1 = tl.full([BLOCK_R, 1], NEG_INF, ACC), tl.full([BLOCK_R, 1], -1.0, ACC)
    else:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        m, sum_exp_minus_1 = empty_lanes(BLOCK_R, BLOCK_V, ACC)
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            m, sum_exp_minus_1 = update_lanes(m, sum_exp_minus_1, z_tail)
        m, sum_exp_minus_1, _ = merge_lanes(m, sum_exp_minus_1)
    # 3. the KEEP lanes that stay, and the row's edges: maximum and sum of the whole row
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.count_in_tile(head, 0, V, live, KEEP, MODE, GROUP)
    z = _tile.load(z_ptr, z_start, head, 0, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    before = m
    z_edges, e_edges = None, None
    if EDGES:
        c, inside = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(live), GROUP)
        z_edges = tl.load(z_ptr + (_tile.scalar_if_one(z_start) + c), mask=inside, other=NEG_INF).to(ACC)
    m = _tile.max_with_rows(m, z, z_edges)
    if EDGES:
        e_edges = tl.exp(z_edges - _tile.scalar_if_one(finite_base(m)))
    e = tl.exp(z - finite_base(m))
    scale = 1.0 / (1.0 + merged_sum_exp_minus_1(before, sum_exp_minus_1, m, e, e_edges))

    # 4. write what stayed; read the tail again, backwards, and write it
    if EDGES:
        tl.store(y_ptr + (_tile.scalar_if_one(y_start) + c), e_edges * _tile.scalar_if_one(scale), mask=inside)
    _tile.store(y_ptr, y_start, head, 0, lane, hi, e * scale, stride_yv, MODE, GROUP)
    if not FITS:
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            y = tl.exp(z_tail - finite_base(m)) * scale
            _tile.store(y_ptr, y_start, head, offset, tail, t_hi, y, stride_yv, MODE, GROUP)


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles"])
def _backward_kernel(
    dy_ptr, y_ptr, dz_ptr, V, S, rows, tiles,
    stride_gn, stride_gv, stride_gs, stride_yn, stride_yv, stride_ys, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    LOOP: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """dz_c = y_c (dy_c - Σ_k dy_k y_k) of each row.

    Grid: as `_forward_kernel`. Reads dy and y, once, and what lies beyond KEEP lanes twice; writes dz.
    """
    pointers = dy_ptr, y_ptr, dz_ptr
    strides = stride_gn, stride_gv, stride_gs, stride_yn, stride_yv, stride_ys, stride_dn, stride_dv, stride_ds
    if LOOP:  # the next tile's rows are loaded while this tile is computed
        for pid in tl.range(tl.program_id(0), rows // S * tiles, tl.num_programs(0), num_stages=STAGES):
            _backward_tile(pid, pointers, V, S, tiles, strides, BLOCK_R, KEEP, BLOCK_V, FITS, 1, MODE, GROUP, ACC)
    else:
        _backward_tile(
            tl.program_id(0), pointers, V, S, tiles, strides, BLOCK_R, KEEP, BLOCK_V, FITS, STAGES, MODE, GROUP, ACC
        )  # fmt: skip


@triton.jit
def _backward_tile(
    pid, pointers, V, S, tiles, strides,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """Gradient of tile number `pid`: BLOCK_R rows."""
    dy_ptr, y_ptr, dz_ptr = pointers
    stride_gn, stride_gv, stride_gs, stride_yn, stride_yv, stride_ys, stride_dn, stride_dv, stride_ds = strides
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    # 1. which rows, and where they begin
    n, s = rows_of_tile(pid, S, tiles, BLOCK_R)
    s = s[:, None]
    live = s < S
    g_start = n * stride_gn + s * stride_gs
    y_start = n * stride_yn + s * stride_ys
    d_start = n * stride_dn + s * stride_ds
    head = _tile.head_of(y_start, MODE, GROUP)

    # 2. Σ dy y: the tail, each lane for itself, then the KEEP lanes that stay and the row's edges
    inner = tl.zeros([BLOCK_R, 1], ACC)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        lanes = tl.zeros([BLOCK_R, BLOCK_V], ACC)
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
            dy_tail = _tile.load(dy_ptr, g_start, head, offset, tail, t_hi, stride_gv, 0.0, MODE, GROUP, ACC)
            y_tail = _tile.load(y_ptr, y_start, head, offset, tail, t_hi, stride_yv, 0.0, MODE, GROUP, ACC)
            lanes += dy_tail * y_tail
        inner = tl.sum(lanes, axis=1)[:, None]
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.count_in_tile(head, 0, V, live, KEEP, MODE, GROUP)
    dy = _tile.load(dy_ptr, g_start, head, 0, lane, hi, stride_gv, 0.0, MODE, GROUP, ACC)
    y = _tile.load(y_ptr, y_start, head, 0, lane, hi, stride_yv, 0.0, MODE, GROUP, ACC)
    inner += tl.sum(dy * y, axis=1)[:, None]
    if EDGES:
        c, inside = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(live), GROUP)
        dy_edges = tl.load(dy_ptr + (_tile.scalar_if_one(g_start) + c), mask=inside, other=0.0).to(ACC)
        y_edges = tl.load(y_ptr + (_tile.scalar_if_one(y_start) + c), mask=inside, other=0.0).to(ACC)
        inner = _tile.add_row_sums(inner, None, dy_edges * y_edges)
        tl.store(dz_ptr + (_tile.scalar_if_one(d_start) + c), y_edges * (dy_edges - _tile.scalar_if_one(inner)), mask=inside)
    _tile.store(dz_ptr, d_start, head, 0, lane, hi, y * (dy - inner), stride_dv, MODE, GROUP)
    if not FITS:
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + (steps - 1 - i) * BLOCK_V
            t_hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
            dy_tail = _tile.load(dy_ptr, g_start, head, offset, tail, t_hi, stride_gv, 0.0, MODE, GROUP, ACC)
            y_tail = _tile.load(y_ptr, y_start, head, offset, tail, t_hi, stride_yv, 0.0, MODE, GROUP, ACC)
            _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, y_tail * (dy_tail - inner), stride_dv, MODE, GROUP)


def forward(z: torch.Tensor, y: torch.Tensor) -> None:
    """y = softmax(z) along axis 1 of (N, V, S)."""
    if not z.numel():
        return
    z, y = rows_along_s(z), rows_along_s(y)
    N, V, S = z.shape
    mode = access_mode(1, z, y)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    plan = plan_rows(V, S, z.element_size(), mode, unit_s, device=device_of(z))
    tiles = cdiv(S, plan.BLOCK_R)
    launch(
        _forward_kernel, plan.grid(N * tiles),
        z, y, V, S, N * S, tiles, *z.stride(), *y.stride(),
        plan=plan, reads=("z",), writes=("y",), again=plan.again(V),
        MODE=mode, GROUP=16 // z.element_size(), ACC=ACC[z.dtype], **plan_constants(plan),
    )  # fmt: skip


def backward(dy: torch.Tensor, y: torch.Tensor, dz: torch.Tensor) -> None:
    """dz = y (dy - Σ dy y) along axis 1 of (N, V, S)."""
    if not y.numel():
        return
    dy, y, dz = (rows_along_s(x) for x in (dy, y, dz))
    N, V, S = y.shape
    mode = access_mode(1, y, dy, dz)
    unit_s = y.stride(2) == 1 and y.stride(1) != 1
    plan = plan_rows(V, S, y.element_size(), mode, unit_s, extra_per_lane=1, tensors=2, device=device_of(y))
    tiles = cdiv(S, plan.BLOCK_R)
    launch(
        _backward_kernel, plan.grid(N * tiles),
        dy, y, dz, V, S, N * S, tiles, *dy.stride(), *y.stride(), *dz.stride(),
        plan=plan, reads=("dy", "y"), writes=("dz",), again=plan.again(V),
        MODE=mode, GROUP=16 // y.element_size(), ACC=ACC[y.dtype], **plan_constants(plan),
    )  # fmt: skip
