"""The kernel of cross entropy's forward pass, with or without the gradient. Formulas and names: `cross_entropy.py`."""

from typing import Any

import triton
import triton.language as tl

from .. import _tile
from .._rows import as_acc, finite_base, log1p, rows_of_tile
from .backward import at_target_of, gradient, scale_of, z_loss_scale_of
from .reduction import is_last, leave, reduce_rows
from .tile import (
    NO_CLASS,
    accumulate,
    accumulate_groups,
    accumulate_lanes,
    dense,
    dense_at,
    empty_sums,
    hard_target,
    logits,
    logits_at,
    merge,
    product_or_0,
)

OF_CALL = ["V", "S", "rows", "tiles", "ignore_index", "smoothing_bits", "z_loss_bits", "cap_bits", "scale_bits"]


@triton.jit(do_not_specialize=OF_CALL)
def _forward_kernel(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr, invalid_ptr,
    total_ptr, sum_of_weights_ptr, row_weight_ptr, arrived_ptr,
    V, S, rows, tiles, ignore_index, smoothing, smoothing_bits, z_loss, z_loss_bits, cap, cap_bits,
    logit_scale, scale_bits, if_none,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    LOOP: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr, SCALED: tl.constexpr,
    Z_LOSS: tl.constexpr, MORE: tl.constexpr, MEAN: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """loss = W (lse - m) - Σ q (z - m) + ζ lse² of each row, its statistics, and dz where dz_ptr is given.

    Grid: one program a tile of BLOCK_R rows, or (LOOP) fewer programs that take tile after tile.
    Reads z (and soft targets y) once; where dz is written too, what lies beyond KEEP lanes twice. Writes loss (rows,), stats
    (3 or 6, rows), dz. Where total_ptr is given, the last program to end adds up the losses of all rows, and their weights
    where row_weight_ptr is given.
    """
    of_gradient = upstream_ptr, denominator_ptr, dz_ptr
    pointers = z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, of_gradient, invalid_ptr, row_weight_ptr
    zeta, kappa = as_acc(z_loss, z_loss_bits, ACC) if Z_LOSS else None, as_acc(logit_scale, scale_bits, ACC) if SCALED else None
    cap = as_acc(cap, cap_bits, ACC)
    numbers = V, S, rows, tiles, ignore_index, as_acc(smoothing, smoothing_bits, ACC), zeta, cap, kappa
    strides = stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds
    if LOOP:  # the next tile's rows are loaded while this tile is computed
        zero = tl.zeros([BLOCK_R, 1], tl.int64)
        deferred = zero, zero.to(ACC), zero > 0
        for pid in tl.range(tl.program_id(0), rows // S * tiles, tl.num_programs(0), num_stages=STAGES):
            deferred = _forward_tile(
                pid, deferred, pointers, numbers, strides, BLOCK_R, KEEP, BLOCK_V, FITS, 1,
                SOFT, DENSE, CAPPED, Z_LOSS, MORE, MEAN, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
            )  # fmt: skip
        tl.debug_barrier()
        tl.store(dz_ptr + deferred[0], deferred[1], mask=deferred[2])
    else:
        _forward_tile(
            tl.program_id(0), None, pointers, numbers, strides, BLOCK_R, KEEP, BLOCK_V, FITS, STAGES,
            SOFT, DENSE, CAPPED, Z_LOSS, MORE, MEAN, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
        )  # fmt: skip
    if total_ptr is not None:
        last = is_last(arrived_ptr)
        if last:
            reduce_rows(
                loss_ptr, row_weight_ptr, denominator_ptr, total_ptr, sum_of_weights_ptr, rows, if_none, MEAN, ACC
            )  # fmt: skip
        leave(arrived_ptr, last)


@triton.jit
def _forward_tile(
    pid, deferred, pointers, numbers, strides,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr, Z_LOSS: tl.constexpr, MORE: tl.constexpr,
    MEAN: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> Any:  # fmt: skip
    """Loss, statistics and gradient of tile number `pid`: BLOCK_R rows.

    deferred: (offsets, values, mask) of the gradient at the target classes of the tile before. In a loop over tiles it is
    stored one tile later, over what the row's other lanes have written, after a reduction has brought the threads together: to
    select it among the lanes, every lane's number would have to stay in a register. The same of this tile is returned. None
    where there is no loop, and the value is selected.
    """
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, of_gradient, invalid_ptr, row_weight_ptr = pointers
    upstream_ptr, denominator_ptr, dz_ptr = of_gradient
    V, S, rows, tiles, ignore_index, epsilon, zeta, cap, kappa = numbers
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds = strides
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    LOADED: tl.constexpr = SOFT or weight_ptr is not None
    # 1. which rows, their targets, and the logits there. What has one number a row is read and stored as (R,): as a column of
    # a tile, (R, 1), every thread of the row would do it
    n, s = rows_of_tile(pid, S, tiles, BLOCK_R)
    row = n * S + s

    live = (s < S)[:, None]
    t, known, bad, w_t, z_t = None, live, None, None, None
    q_t = tl.zeros([BLOCK_R, 1], ACC)
    if not SOFT:
        t, known, bad, w_t = hard_target(target_ptr, n * stride_tn + s * stride_ts, weight_ptr, s < S, V, ignore_index, ACC)
        z_t = logits_at(z_ptr, n * stride_zn + s * stride_zs + t * stride_zv, known, cap, kappa, CAPPED, ACC)
        tl.atomic_min(invalid_ptr + s * 0, row, mask=bad, sem="relaxed")
        if row_weight_ptr is not None:
            tl.store(row_weight_ptr + row, w_t, mask=s < S)
        t, known, bad, w_t, z_t = t[:, None].to(tl.int32), known[:, None], bad[:, None], w_t[:, None], z_t[:, None]
        q_t = w_t * (1.0 - epsilon)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    # 2. one pass over z: the tail, each lane for itself, then the first KEEP lanes, which stay, and the row's edges
    z, q, c, z_edges, q_edges, c_edges = None, None, None, None, None, None
    if FITS:
        sums = empty_sums(BLOCK_R, 0, ACC)
    else:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        GROUPED: tl.constexpr = GROUP > 2 and MODE != _tile.STRIDED and not (DENSE or CAPPED or MORE)
        lanes = empty_sums(BLOCK_R, BLOCK_V // GROUP if GROUPED else BLOCK_V, ACC)
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z_tail = logits(
                z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, kappa, CAPPED, MODE, GROUP, ACC,
                0.0 if GROUPED else float("-inf"),  # a copy into shared memory fills up with 0 by itself
            )  # fmt: skip
            if GROUPED:
                lanes = accumulate_groups(lanes, z_tail, tl.arange(0, BLOCK_V // GROUP)[None, :] < t_hi // GROUP, GROUP)
            else:
                q_tail = None
                if DENSE:
                    q_tail = dense(
                        target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                        SOFT, MODE, TARGET_MODE, GROUP, ACC,
                    )  # fmt: skip
                lanes = accumulate_lanes(lanes, z_tail, q_tail, head + offset + tail, MORE, LOADED)
        sums = merge(lanes, DENSE, MORE)
    if KEEP:
        lane = tl.arange(0, KEEP)[None, :]
        c = head + lane
        hi = _tile.count_in_tile(head, 0, V, known, KEEP, MODE, GROUP)
        z = logits(z_ptr, z_start, head, 0, lane, hi, stride_zv, cap, kappa, CAPPED, MODE, GROUP, ACC)
        q = None
        if DENSE:
            q = dense(
                target_ptr, t_start, weight_ptr, head, 0, lane, hi, stride_tv, V, epsilon,
                SOFT, MODE, TARGET_MODE, GROUP, ACC,
            )  # fmt: skip
    if EDGES:
        c_edges, in_edges = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(known), GROUP)
        z_edges = logits_at(z_ptr, _tile.scalar_if_one(z_start) + c_edges, in_edges, cap, kappa, CAPPED, ACC)
        q_edges = None
        if DENSE:
            q_edges = dense_at(
                target_ptr, _tile.scalar_if_one(t_start), weight_ptr, c_edges, in_edges, stride_tv, V, epsilon, SOFT, ACC
            )  # fmt: skip
    if KEEP or EDGES:
        sums = accumulate(sums, z, q, c, z_edges, q_edges, c_edges, MORE, LOADED)
    m, sum_exp_minus_1, in_dense, inner, spread, argmax = sums

    # 3. loss and statistics
    W = q_t + in_dense
    log_total = log1p(sum_exp_minus_1, ACC)
    lse = m + log_total
    loss = W * log_total - inner
    if Z_LOSS:
        loss += product_or_0(zeta, lse * lse)
    if not SOFT:
        loss -= product_or_0(q_t, z_t - finite_base(m))
        loss = tl.where(known, loss, tl.where(bad, float("nan"), 0.0))
    row = row[:, None]
    tl.store(loss_ptr + row, loss, mask=live)
    if stats_ptr is not None:
        tl.store(stats_ptr + row, tl.where(known, m, 0.0), mask=live)
        tl.store(stats_ptr + (row + rows), tl.where(known, sum_exp_minus_1, 0.0), mask=live)
        tl.store(stats_ptr + (row + 2 * rows), tl.where(known, W, 0.0), mask=live)
        if MORE:
            below = tl.zeros_like(m)
            if not SOFT:
                below = tl.where(known, z_t - finite_base(m), 0.0)
            tl.store(stats_ptr + (row + 3 * rows), below, mask=live)
            entropy = log_total - spread / (1.0 + sum_exp_minus_1)
            tl.store(stats_ptr + (row + 4 * rows), tl.where(known, entropy, 0.0), mask=live)
            argmax = tl.where(known & (argmax != NO_CLASS), argmax, 0)
            tl.store(stats_ptr + (row + 5 * rows), argmax.to(ACC), mask=live)

    # 4. gradient: the KEEP lanes and the edges, then the tail again, from its end backwards
    if dz_ptr is not None:
        g = tl.cast(1.0, ACC)
        if denominator_ptr is not None:
            g = 1.0 / tl.load(denominator_ptr).to(ACC)
        elif MEAN:  # of soft targets every row counts 1
            g = 1.0 / tl.cast(rows, ACC)
        if kappa is not None:
            g *= kappa
        if upstream_ptr is not None:
            g *= tl.load(upstream_ptr + row, mask=live, other=0.0).to(ACC)
        if DENSE:
            g = tl.where(known, g, 0.0)
            q *= g
            if EDGES:
                q_edges *= _tile.scalar_if_one(g)
        scale = scale_of(g, known, bad, sum_exp_minus_1, W)
        z_loss_scale = z_loss_scale_of(g, known, sum_exp_minus_1, lse, zeta) if Z_LOSS else None
        at_target, t_edges, at_target_edges = None, None, None
        if not SOFT:
            at_target = at_target_of(g, known, bad, z_t, m, sum_exp_minus_1, lse, W, w_t, epsilon, zeta, cap, V, CAPPED)
            if deferred is None:
                t_edges, at_target_edges = _tile.scalar_if_one(t), _tile.scalar_if_one(at_target)
        dz = gradient(z, m, scale, z_loss_scale, q, lane, head, t if deferred is None else None, at_target, cap, CAPPED)
        hi = _tile.count_in_tile(head, 0, V, live, KEEP, MODE, GROUP)
        _tile.store(dz_ptr, d_start, head, 0, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
        if EDGES:
            of_row = _tile.scalar_if_one(m), _tile.scalar_if_one(scale), _tile.scalar_if_one(z_loss_scale) if Z_LOSS else None
            dz_edges = gradient(z_edges, *of_row, q_edges, c_edges, 0, t_edges, at_target_edges, cap, CAPPED)
            _, in_edges = _tile.edges(_tile.scalar_if_one(head), V, _tile.scalar_if_one(live), GROUP)
            tl.store(dz_ptr + (_tile.scalar_if_one(d_start) + c_edges * stride_dv), dz_edges, mask=in_edges)
        if not SOFT and deferred is not None:
            tl.store(dz_ptr + deferred[0], deferred[1], mask=deferred[2])
            deferred = d_start + t * stride_dv, at_target, known
        if not FITS:
            for i in tl.range(0, steps, num_stages=STAGES):
                offset = KEEP + (steps - 1 - i) * BLOCK_V
                t_hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
                z_tail = logits(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, kappa, CAPPED, MODE, GROUP, ACC)
                q_tail = None
                if DENSE:
                    q_tail = dense(
                        target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                        SOFT, MODE, TARGET_MODE, GROUP, ACC,
                    )  # fmt: skip
                if DENSE:
                    q_tail *= g
                dz_tail = gradient(z_tail, m, scale, z_loss_scale, q_tail, tail, head + offset, t, at_target, cap, CAPPED)
                t_hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
                _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, dz_tail, stride_dv, DZ_MODE, GROUP)
    if deferred is not None:
        return deferred
