"""Softmax cross entropy along the middle axis of (N, V, S): loss, gradient, or both at once.

    q_c   = w_c ((1 - ε) y_c + ε/V),   W = Σ_c q_c            y one-hot for hard targets; w class weights, ε smoothing
    loss  = W log Σ_c exp(z_c - m) - Σ_c q_c (z_c - m),       m = max_c z_c, 0·∞ = 0
    dz_c  = g (W p_c - q_c),   p_c = exp(z_c - m) / Σ exp(z - m),   g = upstream / denominator
    source: docs/derivations.md, section 3
    bytes   forward: read z.  backward: read z, write dz.  forward_backward: read z, write dz; of a row that does not fit one
            program, the part beyond KEEP lanes is read twice, the second time from the far end back.  Soft targets: y is
            read wherever z is.

`forward` saves three numbers a row, m, Σ exp(z - m) - 1 and W: logits near 1e4 would lose the digits of p in a rounded
m + log Σ, and where p -> 1 so would 1 - p in a Σ near 1. The 1 of a one-hot y is subtracted in float32 and the result rounded
once. A row whose target is `ignore_index` reads nothing and gives zeros; one whose target is out of range reads nothing, gives
NaN and leaves its number in `invalid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tile
from ._rows import (
    ACC,
    excess_with,
    finite_base,
    follower_mode,
    log_1_plus,
    online_max_excess,
    program_rows,
    real,
    rows_along_s,
    run_mode,
    warps,
)
from .plan import cdiv, float_and_bits, plan_columns, plan_reduce, plan_rows


@triton.jit
def _hard_target(target_ptr, at, weight_ptr, z_ptr, z_start, stride_zv, live, V, ignore_index, ACC: tl.constexpr):
    """(t, known, bad, w_t, z_t) of each row, all one-dimensional; t, w_t and z_t are 0 where the target is not a class."""
    t = tl.load(target_ptr + at, mask=live, other=0).to(tl.int64)
    ignored = t == ignore_index
    bad = live & (ignored == 0) & ((t < 0) | (t >= V))
    known = live & (ignored == 0) & (bad == 0)
    t = tl.where(known, t, 0)
    if weight_ptr is None:
        w_t = tl.where(known, 1.0, 0.0).to(ACC)
    else:
        w_t = tl.load(weight_ptr + t, mask=known, other=0.0).to(ACC)
    z_t = w_t
    if z_ptr is not None:
        z_t = tl.load(z_ptr + (z_start + t * stride_zv), mask=known, other=0.0).to(ACC)
    return t, known, bad, w_t, z_t


@triton.jit
def _dense(y, weight_ptr, c, inside, V, epsilon, ACC: tl.constexpr):
    """The part of q that every class c has: w_c ((1 - ε) y_c + ε/V) for soft targets, w_c ε/V for hard ones (y None)."""
    q = epsilon / V
    if y is not None:
        q += y * (1.0 - epsilon)
    if weight_ptr is not None:
        q *= tl.load(weight_ptr + c, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, q, 0.0)


@triton.jit
def _dense_body(
    target_ptr, t_start, weight_ptr, head, offset, lane, hi, stride_tv, V, epsilon,
    SOFT: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    y = None
    if SOFT:
        y = _tile.load(target_ptr, t_start, head, offset, lane, hi, stride_tv, 0.0, MODE, GROUP, ACC)
    return _dense(y, weight_ptr, head + offset + lane, lane < hi, V, epsilon, ACC)


@triton.jit
def _dense_ends(
    target_ptr, t_start, weight_ptr, c, inside, stride_tv, V, epsilon, SOFT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    y = None
    if SOFT:
        y = tl.load(target_ptr + (t_start + c * stride_tv), mask=inside, other=0.0).to(ACC)
    return _dense(y, weight_ptr, c, inside, V, epsilon, ACC)


@triton.jit
def _at_target(z_t, m, excess, W, q_t, weight_t, epsilon, V):
    """W p_t - q_t - w_t ε/V without the difference p_t - 1, whose digits are lost where p_t -> 1."""
    e_t = tl.exp(z_t - finite_base(m))
    return ((W - q_t) - W * ((excess + (1.0 - e_t)) / (1.0 + excess))) - weight_t * (epsilon / V)


@triton.jit
def _weighted(q, z):
    """q z with 0·∞ = 0."""
    return q * tl.where(q == 0.0, 0.0, z)


@triton.jit
def _gradient(e, scale, q, lane, first, t, at_target):
    """scale e - q, `at_target` at the hard target's class t. The classes are first + lane; q is None where nothing is dense,
    t for soft targets."""
    dz = e * scale
    if q is not None:
        dz -= q
    if t is not None:
        dz = tl.where(lane == t - first, at_target, dz)
    return dz


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "ignore_index", "smoothing_bits"])
def _forward_kernel(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, dz_ptr, invalid_ptr,
    V, S, rows, tiles, ignore_index, smoothing, smoothing_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    SOFT: tl.constexpr, DENSE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    NEG_INF: tl.constexpr = float("-inf")
    n, s = program_rows(S, tiles, BLOCK_R)
    row = n * S + s
    in_range = s < S
    epsilon = real(smoothing, smoothing_bits, ACC)

    # one number a row is read and written one-dimensionally: as a column of a tile, every thread of a row would do it
    live = in_range[:, None]
    known = live
    t, q, q_ends, at_target = None, None, None, None
    q_t = tl.zeros([BLOCK_R, 1], ACC)
    if not SOFT:
        t, known, bad, w_t, z_t = _hard_target(
            target_ptr, n * stride_tn + s * stride_ts, weight_ptr, z_ptr, n * stride_zn + s * stride_zs, stride_zv,
            in_range, V, ignore_index, ACC,
        )  # fmt: skip
        tl.atomic_min(invalid_ptr + s * 0, row, mask=bad, sem="relaxed")
        t, known, bad, w_t, z_t = t[:, None].to(tl.int32), known[:, None], bad[:, None], w_t[:, None], z_t[:, None]
        q_t = w_t * (1.0 - epsilon)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    # one pass over z: m, excess = Σ exp(z - m) - 1, W = Σ q, inner = Σ q (z - m). The first KEEP lanes come last and stay.
    m = tl.full([BLOCK_R, 1], NEG_INF, ACC)
    excess = tl.full([BLOCK_R, 1], -1.0, ACC)
    W = q_t
    inner = tl.zeros([BLOCK_R, 1], ACC)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
            before = finite_base(m)
            m, excess = online_max_excess(m, excess, z_tail)
            if DENSE:
                q_tail = _dense_body(
                    target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                    SOFT, TARGET_MODE, GROUP, ACC,
                )  # fmt: skip
                inner += (W - q_t) * (before - finite_base(m))
                inner += tl.sum(_weighted(q_tail, z_tail - finite_base(m)), axis=1)[:, None]
                W += tl.sum(q_tail, axis=1)[:, None]
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.reach(head, 0, V, known, KEEP, MODE, GROUP)
    z = _tile.load(z_ptr, z_start, head, 0, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    before = m
    m = tl.maximum(m, tl.max(z, axis=1)[:, None])
    d_ends, e_ends = None, None
    if ENDS:
        c_ends, in_ends = _tile.ends(head, V, known, GROUP)
        z_ends = tl.load(z_ptr + (z_start + c_ends), mask=in_ends, other=NEG_INF).to(ACC)
        m = tl.maximum(m, tl.max(z_ends, axis=1)[:, None])
        d_ends = z_ends - finite_base(m)
        e_ends = tl.exp(d_ends)
    d = z - finite_base(m)
    if DENSE:
        if not FITS:
            inner += (W - q_t) * (finite_base(before) - finite_base(m))
        q = _dense_body(
            target_ptr, t_start, weight_ptr, head, 0, lane, hi, stride_tv, V, epsilon, SOFT, TARGET_MODE, GROUP, ACC
        )  # fmt: skip
        W += tl.sum(q, axis=1)[:, None]
        inner += tl.sum(_weighted(q, d), axis=1)[:, None]
        if ENDS:
            q_ends = _dense_ends(target_ptr, t_start, weight_ptr, c_ends, in_ends, stride_tv, V, epsilon, SOFT, ACC)
            W += tl.sum(q_ends, axis=1)[:, None]
            inner += tl.sum(_weighted(q_ends, d_ends), axis=1)[:, None]
    e = tl.exp(d)
    excess = excess_with(before, excess, m, e, e_ends)

    loss = W * log_1_plus(excess, ACC) - inner
    if not SOFT:
        loss -= _weighted(q_t, z_t - finite_base(m))
        loss = tl.where(known, loss, tl.where(bad, float("nan"), 0.0))
    row = row[:, None]
    tl.store(loss_ptr + row, loss, mask=live)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, m, mask=live)
        tl.store(stats_ptr + (row + rows), excess, mask=live)
        tl.store(stats_ptr + (row + 2 * rows), W, mask=live)

    if dz_ptr is not None:
        scale = W / (1.0 + excess)
        if not SOFT:
            otherwise = tl.where(bad, float("nan"), 0.0)
            at_target = tl.where(known, _at_target(z_t, m, excess, W, q_t, w_t, epsilon, V), otherwise)
            scale = tl.where(known, scale, otherwise)
        if ENDS:
            dz_ends = _gradient(e_ends, scale, q_ends, c_ends, 0, t, at_target)
            _, in_ends = _tile.ends(head, V, live, GROUP)
            tl.store(dz_ptr + (d_start + c_ends * stride_dv), dz_ends, mask=in_ends)
        dz = _gradient(e, scale, q, lane, head, t, at_target)
        hi = _tile.reach(head, 0, V, live, KEEP, MODE, GROUP)
        _tile.store(dz_ptr, d_start, head, 0, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
        if not FITS:
            for i in range(steps):
                offset = KEEP + (steps - 1 - i) * BLOCK_V
                t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
                z_tail = _tile.load(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
                q_tail = None
                if DENSE:
                    q_tail = _dense_body(
                        target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                        SOFT, TARGET_MODE, GROUP, ACC,
                    )  # fmt: skip
                dz_tail = _gradient(tl.exp(z_tail - finite_base(m)), scale, q_tail, tail, head + offset, t, at_target)
                t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
                _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, dz_tail, stride_dv, DZ_MODE, GROUP)


@triton.jit(do_not_specialize=["V", "S", "rows", "tiles", "columns", "ignore_index", "smoothing_bits"])
def _backward_kernel(
    z_ptr, target_ptr, weight_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr,
    V, S, rows, tiles, columns, ignore_index, smoothing, smoothing_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds, stride_un, stride_us,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    NEG_INF: tl.constexpr = float("-inf")
    pid = tl.program_id(0).to(tl.int64)
    offset = (pid % columns).to(tl.int32) * BLOCK_V
    pid = pid // columns
    n = pid // tiles
    s = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = n * S + s
    in_range = s < S
    epsilon = real(smoothing, smoothing_bits, ACC)

    known = in_range
    t, q, at_target = None, None, None
    if not SOFT:
        at = n * stride_tn + s * stride_ts
        t, known, bad, w_t, z_t = _hard_target(
            target_ptr, at, weight_ptr, z_ptr, n * stride_zn + s * stride_zs, stride_zv, in_range, V, ignore_index, ACC
        )
        t, bad, w_t, z_t = t[:, None].to(tl.int32), bad[:, None], w_t[:, None], z_t[:, None]
    g = tl.load(upstream_ptr + (n * stride_un + s * stride_us), mask=known, other=0.0).to(ACC)[:, None]
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr).to(ACC)
    m = tl.load(stats_ptr + row, mask=known, other=0.0)[:, None]
    excess = tl.load(stats_ptr + (row + rows), mask=known, other=0.0)[:, None]
    W = tl.load(stats_ptr + (row + 2 * rows), mask=known, other=0.0)[:, None]
    live = in_range[:, None]
    known = known[:, None]
    scale = W / (1.0 + excess)
    if not SOFT:
        otherwise = tl.where(bad, float("nan"), 0.0)
        at_target = tl.where(known, _at_target(z_t, m, excess, W, w_t * (1.0 - epsilon), w_t, epsilon, V), otherwise)
        scale = tl.where(known, scale, otherwise)
        g = tl.where(known, g, 1.0)  # what is no class gives 0, or NaN, whatever the upstream gradient
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    lane = tl.arange(0, BLOCK_V)[None, :]
    hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
    z = _tile.load(z_ptr, z_start, head, offset, lane, hi, stride_zv, NEG_INF, MODE, GROUP, ACC)
    if DENSE:
        q = _dense_body(
            target_ptr, t_start, weight_ptr, head, offset, lane, hi, stride_tv, V, epsilon, SOFT, TARGET_MODE, GROUP, ACC
        )  # fmt: skip
    e = tl.exp(z - finite_base(m))
    dz = g * _gradient(e, scale, q, lane, head + offset, t, at_target)
    hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
    _tile.store(dz_ptr, d_start, head, offset, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
    if ENDS:
        first = (s < tl.where(offset == 0, S, 0))[:, None]  # the rows' ends are the first column's
        c, inside = _tile.ends(head, V, known & first, GROUP)
        z = tl.load(z_ptr + (z_start + c), mask=inside, other=NEG_INF).to(ACC)
        if DENSE:
            q = _dense_ends(target_ptr, t_start, weight_ptr, c, inside, stride_tv, V, epsilon, SOFT, ACC)
        dz = g * _gradient(tl.exp(z - finite_base(m)), scale, q, c, 0, t, at_target)
        _, inside = _tile.ends(head, V, live & first, GROUP)
        tl.store(dz_ptr + (d_start + c * stride_dv), dz, mask=inside)


@triton.jit(do_not_specialize=["S", "rows", "per_program", "ignore_index"])
def _reduce_kernel(
    loss_ptr, target_ptr, weight_ptr, partial_ptr, V, S, rows, per_program, ignore_index, stride_tn, stride_ts,
    BLOCK: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ loss and Σ w_target over this program's rows, each lane in order, the lanes by a tree."""
    pid = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    weights = tl.zeros([BLOCK], ACC)
    for i in range(0, per_program, BLOCK):
        row = pid * per_program + i + tl.arange(0, BLOCK)
        live = row < rows
        total += tl.load(loss_ptr + row, mask=live, other=0.0)
        if SOFT:
            weights += tl.where(live, 1.0, 0.0)
        else:
            at = (row // S) * stride_tn + (row % S) * stride_ts
            _, _, _, w_t, _ = _hard_target(target_ptr, at, weight_ptr, None, at, 0, live, V, ignore_index, ACC)
            weights += w_t
    tl.store(partial_ptr + 2 * pid, tl.sum(total))
    tl.store(partial_ptr + 2 * pid + 1, tl.sum(weights))


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(partial_ptr, total_ptr, denominator_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(total_ptr, tl.sum(tl.load(partial_ptr + 2 * i, mask=i < count, other=0.0)))
    tl.store(denominator_ptr, tl.sum(tl.load(partial_ptr + 2 * i + 1, mask=i < count, other=0.0)))


def _call(z, target, dz, label_smoothing):
    """(strides, smoothing pair, constants) as the kernels take them."""
    soft = target.ndim == z.ndim
    mode = run_mode(1, z)
    constants = {
        "SOFT": soft,
        "DENSE": soft or label_smoothing != 0.0,
        "MODE": mode,
        "TARGET_MODE": follower_mode(1, z, target) if soft else _tile.STRIDED.value,
        "DZ_MODE": follower_mode(1, z, dz),
        "GROUP": 16 // z.element_size(),
        "ACC": ACC[z.dtype],
    }
    stride_t = target.stride() if soft else (target.stride(0), 0, target.stride(1))
    return (*z.stride(), *stride_t, *dz.stride()), float_and_bits(label_smoothing), constants


def _launch_forward(z, target, weight, loss, stats, dz, invalid, ignore_index, label_smoothing):
    if not z.numel():
        return
    z, target = rows_along_s(z), rows_along_s(target)
    dz = None if dz is None else rows_along_s(dz)
    N, V, S = z.shape
    strides, smoothing, constants = _call(z, target, z if dz is None else dz, label_smoothing)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    keeps = "exp y" if constants["SOFT"] else "exp q" if constants["DENSE"] else "exp"
    plan = plan_rows(V, S, z.element_size(), constants["MODE"], unit_s, keeps)
    tiles = cdiv(S, plan.BLOCK_R)
    _forward_kernel[(N * tiles,)](
        z, target, weight, loss, stats, dz, invalid,
        V, S, N * S, tiles, ignore_index, *smoothing, *strides,
        BLOCK_R=plan.BLOCK_R, KEEP=plan.KEEP, BLOCK_V=plan.BLOCK_V, FITS=plan.FITS, **constants,
        num_warps=warps(plan.num_warps),
    )  # fmt: skip


def forward(z, target, weight, loss, stats, invalid, *, ignore_index: int, label_smoothing: float) -> None:
    """Loss per row and stats = (m, Σ exp(z - m) - 1, W), all (N, S) and contiguous."""
    _launch_forward(z, target, weight, loss, stats, None, invalid, ignore_index, label_smoothing)


def forward_backward(z, target, weight, loss, dz, invalid, *, ignore_index: int, label_smoothing: float) -> None:
    """Loss per row and its gradient for an upstream gradient of 1, in one launch."""
    _launch_forward(z, target, weight, loss, None, dz, invalid, ignore_index, label_smoothing)


def backward(z, target, weight, stats, upstream, denominator, dz, *, ignore_index: int, label_smoothing: float) -> None:
    """dz from what `forward` saved, for any upstream gradient per row, divided by `denominator` where given."""
    if not z.numel():
        return
    z, target, upstream, dz = (rows_along_s(x) for x in (z, target, upstream, dz))
    N, V, S = z.shape
    strides, smoothing, constants = _call(z, target, dz, label_smoothing)
    plan = plan_columns(V, S, z.element_size(), constants["MODE"], unit_s=z.stride(2) == 1 and z.stride(1) != 1)
    tiles, columns = cdiv(S, plan.BLOCK_R), plan.columns
    _backward_kernel[(N * tiles * columns,)](
        z, target, weight, stats, upstream, denominator, dz,
        V, S, N * S, tiles, columns, ignore_index, *smoothing, *strides, *upstream.stride(),
        BLOCK_R=plan.BLOCK_R, BLOCK_V=plan.BLOCK_V, **constants, num_warps=warps(plan.num_warps),
    )  # fmt: skip


def reduce(loss, target, weight, total, denominator, *, ignore_index: int) -> None:
    """total = Σ loss; denominator = Σ w_target over the rows that count (hard targets), the number of rows (soft)."""
    soft = target.ndim == 3
    rows = loss.numel()
    plan = plan_reduce(rows)
    partial = torch.empty((plan.programs, 2), dtype=loss.dtype, device=loss.device)
    S = loss.shape[1]
    _reduce_kernel[(plan.programs,)](
        loss, target, weight, partial, 1 << 62, max(S, 1), rows, plan.per_program, ignore_index,
        target.stride(0), target.stride(-1), BLOCK=plan.BLOCK, SOFT=soft, ACC=ACC[loss.dtype], num_warps=4,
    )  # fmt: skip
    _merge_kernel[(1,)](partial, total, denominator, plan.programs, BLOCK=plan.MERGE, num_warps=4)
