"""The kernel of cross entropy's forward pass, with or without the gradient. Formulas and names: `cross_entropy.py`."""

import triton
import triton.language as tl

from .. import _tile
from .._rows import finite_base, log_1_plus, real, rows_of
from .backward import at_target_of, gradient, pull_of, scale_of
from .reduction import is_last, leave, reduce_rows
from .tile import (
    dense,
    dense_at,
    hard_target,
    logits,
    logits_at,
    merge,
    no_sums,
    take,
    take_lanes,
    times,
)

OF_CALL = ["V", "S", "rows", "tiles", "ignore_index", "smoothing_bits", "z_loss_bits", "cap_bits"]


@triton.jit(do_not_specialize=OF_CALL)
def _forward_kernel(
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, denominator_ptr, dz_ptr, invalid_ptr,
    total_ptr, sum_of_weights_ptr, row_weight_ptr, arrived_ptr,
    V, S, rows, tiles, ignore_index, smoothing, smoothing_bits, z_loss, z_loss_bits, cap, cap_bits, if_none,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    LOOP: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr, Z_LOSS: tl.constexpr,
    MORE: tl.constexpr, MEAN: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """loss = W (lse - m) - Σ q (z - m) + ζ lse² of each row, its statistics, and dz where dz_ptr is given.

    Grid: one program a tile of BLOCK_R rows, or (LOOP) fewer programs that take tile after tile.
    Reads z (and soft targets y) once; where dz is written too, what lies beyond KEEP lanes twice. Writes loss (rows,), stats
    (3 or 5, rows), dz. Where total_ptr is given, the last program to end adds up the losses of all rows, and their weights
    where row_weight_ptr is given.
    """
    pointers = z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, denominator_ptr, dz_ptr, invalid_ptr, row_weight_ptr
    zeta, cap = real(z_loss, z_loss_bits, ACC) if Z_LOSS else None, real(cap, cap_bits, ACC)
    numbers = V, S, rows, tiles, ignore_index, real(smoothing, smoothing_bits, ACC), zeta, cap
    strides = stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds
    if LOOP:  # the next tile's rows are loaded while this tile is computed
        zero = tl.zeros([BLOCK_R, 1], tl.int64)
        late = zero, zero.to(ACC), zero > 0
        for pid in tl.range(tl.program_id(0), rows // S * tiles, tl.num_programs(0), num_stages=STAGES):
            late = _forward_tile(
                pid, late, pointers, numbers, strides, BLOCK_R, KEEP, BLOCK_V, FITS, 1,
                SOFT, DENSE, CAPPED, Z_LOSS, MORE, MEAN, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
            )  # fmt: skip
        tl.debug_barrier()
        tl.store(dz_ptr + late[0], late[1], mask=late[2])
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
    pid, late, pointers, numbers, strides,
    BLOCK_R: tl.constexpr, KEEP: tl.constexpr, BLOCK_V: tl.constexpr, FITS: tl.constexpr, STAGES: tl.constexpr,
    SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr, Z_LOSS: tl.constexpr, MORE: tl.constexpr,
    MEAN: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss, statistics and gradient of tile number `pid`: BLOCK_R rows.

    late: (offsets, values, mask) of the gradient at the target classes of the tile before. In a loop over tiles it is stored
    one tile later, over what the row's other lanes have written, after a reduction has brought the threads together: to select
    it among the lanes, every lane's number would have to stay in a register. The same of this tile is returned. None where
    there is no loop, and the value is selected.
    """
    z_ptr, target_ptr, weight_ptr, loss_ptr, stats_ptr, denominator_ptr, dz_ptr, invalid_ptr, row_weight_ptr = pointers
    V, S, rows, tiles, ignore_index, epsilon, zeta, cap = numbers
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds = strides
    ENDS: tl.constexpr = MODE == _tile.SHIFTED
    LOADED: tl.constexpr = SOFT or weight_ptr is not None
    # 1. which rows, their targets, and the logits there. What has one number a row is read and stored as (R,): as a column of
    # a tile, (R, 1), every thread of the row would do it
    n, s = rows_of(pid, S, tiles, BLOCK_R)
    row = n * S + s

    live = (s < S)[:, None]
    t, known, bad, w_t, z_t = None, live, None, None, None
    q_t = tl.zeros([BLOCK_R, 1], ACC)
    if not SOFT:
        t, known, bad, w_t = hard_target(target_ptr, n * stride_tn + s * stride_ts, weight_ptr, s < S, V, ignore_index, ACC)
        z_t = logits_at(z_ptr, n * stride_zn + s * stride_zs + t * stride_zv, known, cap, CAPPED, ACC)
        tl.atomic_min(invalid_ptr + s * 0, row, mask=bad, sem="relaxed")
        if row_weight_ptr is not None:
            tl.store(row_weight_ptr + row, w_t, mask=s < S)
        t, known, bad, w_t, z_t = t[:, None].to(tl.int32), known[:, None], bad[:, None], w_t[:, None], z_t[:, None]
        q_t = w_t * (1.0 - epsilon)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    # 2. one pass over z: the tail, each lane for itself, then the first KEEP lanes, which stay, and the row's ends
    z, q, z_ends, q_ends = None, None, None, None
    if FITS:
        sums = no_sums(BLOCK_R, 0, ACC)
    else:
        tail = tl.arange(0, BLOCK_V)[None, :]
        steps = tl.cdiv(V - KEEP, BLOCK_V)
        lanes = no_sums(BLOCK_R, BLOCK_V, ACC)
        for i in tl.range(0, steps, num_stages=STAGES):
            offset = KEEP + i * BLOCK_V
            t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
            z_tail = logits(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
            q_tail = None
            if DENSE:
                q_tail = dense(
                    target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                    SOFT, MODE, TARGET_MODE, GROUP, ACC,
                )  # fmt: skip
            lanes = take_lanes(lanes, z_tail, q_tail, MORE, LOADED)
        sums = merge(lanes, DENSE, MORE)
    if KEEP:
        lane = tl.arange(0, KEEP)[None, :]
        hi = _tile.reach(head, 0, V, known, KEEP, MODE, GROUP)
        z = logits(z_ptr, z_start, head, 0, lane, hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
        q = None
        if DENSE:
            q = dense(
                target_ptr, t_start, weight_ptr, head, 0, lane, hi, stride_tv, V, epsilon,
                SOFT, MODE, TARGET_MODE, GROUP, ACC,
            )  # fmt: skip
    if ENDS:
        c_ends, in_ends = _tile.ends(_tile.lone(head), V, _tile.lone(known), GROUP)
        z_ends = logits_at(z_ptr, _tile.lone(z_start) + c_ends, in_ends, cap, CAPPED, ACC)
        q_ends = None
        if DENSE:
            q_ends = dense_at(
                target_ptr, _tile.lone(t_start), weight_ptr, c_ends, in_ends, stride_tv, V, epsilon, SOFT, ACC
            )  # fmt: skip
    if KEEP or ENDS:
        sums = take(sums, z, q, z_ends, q_ends, MORE, LOADED)
    m, excess, in_dense, inner, spread = sums

    # 3. loss and statistics
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

    # 4. gradient: the KEEP lanes and the ends, then the tail again, from its end backwards
    if dz_ptr is not None:
        g = tl.cast(1.0, ACC)
        if denominator_ptr is not None:
            g = 1.0 / tl.load(denominator_ptr).to(ACC)
        elif MEAN:  # of soft targets every row counts 1
            g = 1.0 / tl.cast(rows, ACC)
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
            if late is None:
                t_ends, at_target_ends = _tile.lone(t), _tile.lone(at_target)
        dz = gradient(z, m, scale, pull, q, lane, head, t if late is None else None, at_target, cap, CAPPED)
        hi = _tile.reach(head, 0, V, live, KEEP, MODE, GROUP)
        _tile.store(dz_ptr, d_start, head, 0, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
        if ENDS:
            of_row = _tile.lone(m), _tile.lone(scale), _tile.lone(pull) if Z_LOSS else None
            dz_ends = gradient(z_ends, *of_row, q_ends, c_ends, 0, t_ends, at_target_ends, cap, CAPPED)
            _, in_ends = _tile.ends(_tile.lone(head), V, _tile.lone(live), GROUP)
            tl.store(dz_ptr + (_tile.lone(d_start) + c_ends * stride_dv), dz_ends, mask=in_ends)
        if not SOFT and late is not None:
            tl.store(dz_ptr + late[0], late[1], mask=late[2])
            late = d_start + t * stride_dv, at_target, known
        if not FITS:
            for i in tl.range(0, steps, num_stages=STAGES):
                offset = KEEP + (steps - 1 - i) * BLOCK_V
                t_hi = _tile.reach(head, offset, V, known, BLOCK_V, MODE, GROUP)
                z_tail = logits(z_ptr, z_start, head, offset, tail, t_hi, stride_zv, cap, CAPPED, MODE, GROUP, ACC)
                q_tail = None
                if DENSE:
                    q_tail = dense(
                        target_ptr, t_start, weight_ptr, head, offset, tail, t_hi, stride_tv, V, epsilon,
                        SOFT, MODE, TARGET_MODE, GROUP, ACC,
                    )  # fmt: skip
                if DENSE:
                    q_tail *= g
                dz_tail = gradient(z_tail, m, scale, pull, q_tail, tail, head + offset, t, at_target, cap, CAPPED)
                t_hi = _tile.reach(head, offset, V, live, BLOCK_V, MODE, GROUP)
                _tile.store(dz_ptr, d_start, head, offset, tail, t_hi, dz_tail, stride_dv, DZ_MODE, GROUP)
    if late is not None:
        return late
