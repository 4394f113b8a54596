"""Softmax cross entropy along the middle axis of (N, V, S): loss, gradient, or both at once.

    q_c   = w_c ((1 - ε) y_c + ε/V),   W = Σ_c q_c            y one-hot for hard targets; w class weights, ε smoothing
    lse   = m + log Σ_c exp(z_c - m),                         m = max_c z_c
    loss  = W (lse - m) - Σ_c q_c (z_c - m) + ζ lse²,         ζ the z-loss's factor, 0·∞ = 0
    dz_c  = g ((W + 2 ζ lse) p_c - q_c),   p_c = exp(z_c - m) / Σ exp(z - m),   g = upstream / denominator
    softcap τ: z stands for τ tanh(z/τ) everywhere, and dz_c gains the factor 1 - (z_c/τ)²
    source: docs/derivations.md, section 3
    bytes   forward: read z.  backward: read z, write dz.  forward_backward: read z, write dz; of a row that does not fit one
            program, the part beyond KEEP lanes is read twice, the second time from the far end back.  Soft targets: y is
            read wherever z is.

`forward` saves three numbers a row, m, Σ exp(z - m) - 1 and W: logits near 1e4 would lose the digits of p in a rounded
lse, and where p -> 1 so would 1 - p in a Σ near 1. The 1 of a one-hot y is subtracted in float32 and the result rounded
once. A row whose target is `ignore_index` reads nothing and gives zeros; one whose target is out of range reads nothing, gives
NaN and leaves its number in `invalid`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _tile
from ._loss import (
    at_target_of,
    dense,
    dense_at,
    gradient,
    hard_target,
    logits,
    logits_at,
    no_sums,
    pull_of,
    scale_of,
    take,
    times,
)
from ._rows import ACC, finite_base, follower_mode, log_1_plus, program_rows, real, rows_along_s, run_mode, warps
from .plan import cdiv, float_and_bits, plan_columns, plan_reduce, plan_rows

OF_CALL = ["V", "S", "rows", "tiles", "columns", "ignore_index", "smoothing_bits", "z_loss_bits", "cap_bits"]


@triton.jit(do_not_specialize=OF_CALL)
def _forward_kernel(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, denominator_ptr, dz_ptr, invalid_ptr,
    V, S, rows, tiles, ignore_index, smoothing, smoothing_bits, z_loss, z_loss_bits, cap, cap_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr,
    SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr, Z_LOSS: tl.constexpr, MORE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    LOADED: tl.constexpr = SOFT or weight_ptr is not None
    n, s = program_rows(S, tiles, BLOCK_R)
    row = n * S + s
    epsilon = real(smoothing, smoothing_bits, ACC)
    zeta, cap = real(z_loss, z_loss_bits, ACC) if Z_LOSS else None, real(cap, cap_bits, ACC)

    # one number a row is read and written one-dimensionally: as a column of a tile, every thread of a row would do it
    live = (s < S)[:, None]
    t, known, bad, w_t, z_t = None, live, None, None, None
    q_t = tl.zeros([BLOCK_R, 1], ACC)
    if not SOFT:
        t, known, bad, w_t = hard_target(target_ptr, n * stride_tn + s * stride_ts, weight_ptr, s < S, V, ignore_index, ACC)
        z_t = logits_at(z_ptr, n * stride_zn + s * stride_zs + t * stride_zv, known, cap, CAPPED, ACC)
        tl.atomic_min(invalid_ptr + s * 0, row, mask=bad, sem="relaxed")
        t, known, bad, w_t, z_t = t[:, None].to(tl.int32), known[:, None], bad[:, None], w_t[:, None], z_t[:, None]
        q_t = w_t * (1.0 - epsilon)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    # one pass over z. The first KEEP lanes come last and stay.
    sums = no_sums(BLOCK_R, ACC)
    if not FITS:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        for i in range(steps):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z_tail = logits(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
            q_tail = dense(
                target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                SOFT, DENSE, MODE, TARGET_MODE, GROUP, ACC,
            )  # fmt: skip
            sums = take(sums, z_tail, q_tail, None, None, MORE, LOADED)
    lane = tl.arange(0, KEEP)[None, :]
    hi = _tile.reach(head, 0, V, known, KEEP, MODE, GROUP)
    z = logits(z_ptr, z_start, head, 0, lane, hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
    q = dense(
        target_ptr, t_start, weight_ptr, head, 0, lane, hi, stride_tv, V, epsilon, SOFT, DENSE, MODE, TARGET_MODE, GROUP, ACC
    )  # fmt: skip
    z_ends, q_ends = None, None
    if ENDS:
        c_ends, in_ends = _tile.ends(_tile.lone(head), V, _tile.lone(known), GROUP)
        z_ends = logits_at(z_ptr, _tile.lone(z_start) + c_ends, in_ends, cap, CAPPED, ACC)
        q_ends = dense_at(
            target_ptr, _tile.lone(t_start), weight_ptr, c_ends, in_ends, stride_tv, V, epsilon, SOFT, DENSE, ACC
        )  # fmt: skip
    m, excess, in_dense, inner, spread = take(sums, z, q, z_ends, q_ends, MORE, LOADED)

    W = q_t + in_dense
    log_total = log_1_plus(excess, ACC)
    lse = m + log_total
    loss = W * log_total - inner
    if Z_LOSS:
        loss += times(zeta, lse * lse)
    if not SOFT:
        loss -= times(q_t, z_t - finite_base(m))
        loss = tl.where(known, loss, tl.where(bad, float("nan"), 0.0))
    row = row[:, None]
    tl.store(loss_ptr + row, loss, mask=live)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, tl.where(known, m, 0.0), mask=live)
        tl.store(stats_ptr + (row + rows), tl.where(known, excess, 0.0), mask=live)
        tl.store(stats_ptr + (row + 2 * rows), tl.where(known, W, 0.0), mask=live)
        if MORE:
            below = tl.zeros_like(m)
            if not SOFT:
                below = tl.where(known, z_t - finite_base(m), 0.0)
            tl.store(stats_ptr + (row + 3 * rows), below, mask=live)
            entropy = log_total - spread / (1.0 + excess)
            tl.store(stats_ptr + (row + 4 * rows), tl.where(known, entropy, 0.0), mask=live)

    if dz_ptr is not None:
        g = tl.cast(1.0, ACC)
        if denominator_ptr is not None:
            g = 1.0 / tl.load(denominator_ptr).to(ACC)
        if DENSE:
            g = tl.where(known, g, 0.0)
            q *= g
            if ENDS:
                q_ends *= _tile.lone(g)
        scale = scale_of(g, known, bad, excess, W)
        pull = pull_of(g, known, excess, lse, zeta) if Z_LOSS else None
        at_target, t_ends, at_target_ends = None, None, None
        if not SOFT:
            at_target = at_target_of(g, known, bad, z_t, m, excess, lse, W, w_t, epsilon, zeta, cap, V, CAPPED)
            t_ends, at_target_ends = _tile.lone(t), _tile.lone(at_target)
        dz = gradient(z, m, scale, pull, q, lane, head, t, at_target, cap, CAPPED)
        hi = _tile.reach(head, 0, V, live, KEEP, MODE, GROUP)
        _tile.store(dz_ptr, d_start, head, 0, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
        if ENDS:
            of_row = _tile.lone(m), _tile.lone(scale), _tile.lone(pull) if Z_LOSS else None
            dz_ends = gradient(z_ends, *of_row, q_ends, c_ends, 0, t_ends, at_target_ends, cap, CAPPED)
            _, in_ends = _tile.ends(_tile.lone(head), V, _tile.lone(live), GROUP)
            tl.store(dz_ptr + (_tile.lone(d_start) + c_ends * stride_dv), dz_ends, mask=in_ends)
        if not FITS:
            for i in range(steps):
                offset = KEEP + (steps - 1 - i) * BLOCK_V
                t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
                z_tail = logits(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
                q_tail = dense(
                    target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                    SOFT, DENSE, MODE, TARGET_MODE, GROUP, ACC,
                )  # fmt: skip
                if DENSE:
                    q_tail *= g
                dz_tail = gradient(z_tail, m, scale, pull, q_tail, tail, head + offset, t, at_target, cap, CAPPED)
                t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
                _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, dz_tail, stride_dv, DZ_MODE, GROUP)


@triton.jit(do_not_specialize=OF_CALL)
def _backward_kernel(
    z_ptr, target_ptr, weight_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr,
    V, S, rows, tiles, columns, ignore_index, smoothing, smoothing_bits, z_loss, z_loss_bits, cap, cap_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds, stride_un, stride_us,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
    Z_LOSS: tl.constexpr, UNLESS_ONE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    pid = tl.program_id(0).to(tl.int64)
    offset = (pid % columns).to(tl.int32) * BLOCK_V
    pid = pid // columns
    n = pid // tiles
    s = (pid % tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = n * S + s
    live = s < S
    epsilon = real(smoothing, smoothing_bits, ACC)
    zeta, cap = real(z_loss, z_loss_bits, ACC) if Z_LOSS else None, real(cap, cap_bits, ACC)

    g = tl.load(upstream_ptr + (n * stride_un + s * stride_us), mask=live, other=1.0).to(ACC)
    if UNLESS_ONE:
        live = live & (g != 1.0)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr).to(ACC)
    t, known, bad, w_t, z_t = None, live, None, None, None
    if not SOFT:
        t, known, bad, w_t = hard_target(target_ptr, n * stride_tn + s * stride_ts, weight_ptr, live, V, ignore_index, ACC)
        z_t = logits_at(z_ptr, n * stride_zn + s * stride_zs + t * stride_zv, known, cap, CAPPED, ACC)
        t, bad, w_t, z_t = t[:, None].to(tl.int32), bad[:, None], w_t[:, None], z_t[:, None]
    m = tl.load(stats_ptr + row, mask=known, other=0.0)[:, None]
    excess = tl.load(stats_ptr + (row + rows), mask=known, other=0.0)[:, None]
    W = tl.load(stats_ptr + (row + 2 * rows), mask=known, other=0.0)[:, None]
    first = (live & (offset == 0))[:, None]  # the rows' ends are the first column's
    live, known, g = live[:, None], known[:, None], g[:, None]
    g = tl.where(known, g, 1.0)  # what is no class gives 0, or NaN, whatever the upstream gradient
    lse = m + log_1_plus(excess, ACC)
    scale = scale_of(g, known, bad, excess, W)
    pull = pull_of(g, known, excess, lse, zeta) if Z_LOSS else None
    at_target = None
    if not SOFT:
        at_target = at_target_of(g, known, bad, z_t, m, excess, lse, W, w_t, epsilon, zeta, cap, V, CAPPED)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    lane = tl.arange(0, BLOCK_V)[None, :]
    hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
    z = logits(z_ptr, z_start, head, offset, lane, hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
    q = dense(
        target_ptr, t_start, weight_ptr, head, offset, lane, hi, stride_tv, V, epsilon,
        SOFT, DENSE, MODE, TARGET_MODE, GROUP, ACC,
    )  # fmt: skip
    if DENSE:
        q *= g
    dz = gradient(z, m, scale, pull, q, lane, head + offset, t, at_target, cap, CAPPED)
    hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
    _tile.store(dz_ptr, d_start, head, offset, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
    if ENDS:
        c, inside = _tile.ends(head, V, known & first, GROUP)
        z = logits_at(z_ptr, z_start + c, inside, cap, CAPPED, ACC)
        q = dense_at(target_ptr, t_start, weight_ptr, c, inside, stride_tv, V, epsilon, SOFT, DENSE, ACC)
        if DENSE:
            q *= g
        dz = gradient(z, m, scale, pull, q, c, 0, t, at_target, cap, CAPPED)
        _, inside = _tile.ends(head, V, first, GROUP)
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
        if loss_ptr is not None:
            total += tl.load(loss_ptr + row, mask=live, other=0.0)
        if SOFT:
            weights += tl.where(live, 1.0, 0.0)
        else:
            at = (row // S) * stride_tn + (row % S) * stride_ts
            _, _, _, w_t = hard_target(target_ptr, at, weight_ptr, live, V, ignore_index, ACC)
            weights += w_t
    tl.store(partial_ptr + 2 * pid, tl.sum(total))
    tl.store(partial_ptr + 2 * pid + 1, tl.sum(weights))


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(partial_ptr, total_ptr, denominator_ptr, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(total_ptr, tl.sum(tl.load(partial_ptr + 2 * i, mask=i < count, other=0.0)))
    tl.store(denominator_ptr, tl.sum(tl.load(partial_ptr + 2 * i + 1, mask=i < count, other=0.0)))


def _call(z, target, dz, options):
    """(strides, what a call fixes, constants) as the kernels take them."""
    soft = target.ndim == z.ndim
    mode = run_mode(1, z)
    smoothing, cap = options["label_smoothing"], options["softcap"]
    constants = {
        "SOFT": soft,
        "DENSE": soft or smoothing != 0.0,
        "CAPPED": cap is not None,
        "Z_LOSS": options["z_loss"] != 0.0,
        "MODE": mode,
        "TARGET_MODE": follower_mode(1, z, target) if soft else _tile.STRIDED.value,
        "DZ_MODE": follower_mode(1, z, dz),
        "GROUP": 16 // z.element_size(),
        "ACC": ACC[z.dtype],
    }
    numbers = (smoothing, options["z_loss"], 1.0 if cap is None else cap)
    fixed = (options["ignore_index"], *(half for number in numbers for half in float_and_bits(number)))
    stride_t = target.stride() if soft else (target.stride(0), 0, target.stride(1))
    return (*z.stride(), *stride_t, *dz.stride()), fixed, constants


def _launch_forward(z, target, weight, loss, stats, denominator, dz, invalid, options):
    if not z.numel():
        return
    z, target = rows_along_s(z), rows_along_s(target)
    dz = None if dz is None else rows_along_s(dz)
    N, V, S = z.shape
    strides, fixed, constants = _call(z, target, z if dz is None else dz, options)
    unit_s = z.stride(2) == 1 and z.stride(1) != 1
    more = stats is not None and len(stats) > 3
    beside = constants["DENSE"] + (constants["CAPPED"] or (constants["DENSE"] and more))
    plan = plan_rows(V, S, z.element_size(), constants["MODE"], unit_s, beside, constants["DENSE"])
    tiles = cdiv(S, plan.BLOCK_R)
    _forward_kernel[(N * tiles,)](
        z, target, weight, loss, stats, denominator, dz, invalid,
        V, S, N * S, tiles, *fixed, *strides,
        BLOCK_R=plan.BLOCK_R, KEEP=plan.KEEP, BLOCK_V=plan.BLOCK_V, FITS=plan.FITS,
        MORE=more, **constants, num_warps=warps(plan.num_warps),
    )  # fmt: skip


def forward(
    z, target, weight, loss, stats, invalid, *,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Loss per row and stats, (3, N, S) or (5, N, S) and contiguous: m, Σ exp(z - m) - 1, W; z_target - m and entropy."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    _launch_forward(z, target, weight, loss, stats, None, None, invalid, options)


def forward_backward(
    z, target, weight, loss, dz, invalid, *, stats=None, denominator=None,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """Loss per row, stats where given, and the gradient for an upstream gradient of 1, over `denominator` where given."""
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    _launch_forward(z, target, weight, loss, stats, denominator, dz, invalid, options)


def backward(
    z, target, weight, stats, upstream, denominator, dz, *, unless_one: bool = False,
    ignore_index: int, label_smoothing: float, z_loss: float = 0.0, softcap: float | None = None,
) -> None:  # fmt: skip
    """dz from what `forward` saved, for any upstream gradient per row, divided by `denominator` where given.

    `unless_one` leaves the rows alone whose upstream gradient is 1: dz holds theirs already.
    """
    if not z.numel():
        return
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap}
    z, target, upstream, dz = (rows_along_s(x) for x in (z, target, upstream, dz))
    N, V, S = z.shape
    strides, fixed, constants = _call(z, target, dz, options)
    plan = plan_columns(V, S, z.element_size(), constants["MODE"], unit_s=z.stride(2) == 1 and z.stride(1) != 1)
    tiles, columns = cdiv(S, plan.BLOCK_R), plan.columns
    _backward_kernel[(N * tiles * columns,)](
        z, target, weight, stats, upstream, denominator, dz,
        V, S, N * S, tiles, columns, *fixed, *strides, *upstream.stride(),
        BLOCK_R=plan.BLOCK_R, BLOCK_V=plan.BLOCK_V, UNLESS_ONE=unless_one, **constants, num_warps=warps(plan.num_warps),
    )  # fmt: skip


def count(target, weight, denominator, *, ignore_index: int) -> None:
    """denominator = Σ w_target over the rows that count (hard targets), the number of rows (soft)."""
    _reduce(None, target, weight, torch.empty_like(denominator), denominator, ignore_index)


def reduce(loss, target, weight, total, denominator, *, ignore_index: int) -> None:
    """total = Σ loss; denominator as of `count`."""
    _reduce(loss, target, weight, total, denominator, ignore_index)


def _reduce(loss, target, weight, total, denominator, ignore_index):
    soft = target.ndim == 3
    N, S = target.shape[0], target.shape[-1]
    plan = plan_reduce(N * S)
    partial = torch.empty((plan.programs, 2), dtype=total.dtype, device=total.device)
    _reduce_kernel[(plan.programs,)](
        loss, target, weight, partial, 1 << 62, max(S, 1), N * S, plan.per_program, ignore_index,
        target.stride(0), target.stride(-1), BLOCK=plan.BLOCK, SOFT=soft, ACC=ACC[total.dtype], num_warps=4,
    )  # fmt: skip
    _merge_kernel[(1,)](partial, total, denominator, plan.programs, BLOCK=plan.MERGE, num_warps=4)
