"""The gradient of cross entropy, which the forward kernel can write too, and the kernel of the backward pass.

`cross_entropy.py` has the formulas, names and bytes.
"""

import triton
import triton.language as tl

from .. import _tile
from .._rows import as_acc, finite_base, log1p, rows_of_tile
from .tile import dense, dense_at, hard_target, logits, logits_at, product_or_0

OF_CALL = ["V", "S", "rows", "tiles", "columns", "per_program", "ignore_index"]
OF_CALL += ["smoothing_bits", "z_loss_bits", "cap_bits", "scale_bits"]


# ---------------------------------------------------------------------------------------------- formula
@triton.jit
def _slope(capped, cap) -> tl.tensor:
    """∂ cap tanh(z / cap) / ∂z = 1 - (capped / cap)², as (cap - capped)(cap + capped) / cap², which keeps its digits near 0."""
    return (cap - capped) * (cap + capped) / (cap * cap)


@triton.jit
def scale_of(g, known, bad, sum_exp_minus_1, W) -> tl.tensor:
    """g W / Σ exp(z - m), the factor of exp(z - m) in the gradient of the loss; 0, or NaN, in rows without a class."""
    return tl.where(known, g * W / (1.0 + sum_exp_minus_1), _otherwise(bad))


@triton.jit
def z_loss_scale_of(g, known, sum_exp_minus_1, lse, z_loss) -> tl.tensor:
    """2 g ζ lse / Σ exp(z - m), the factor of exp(z - m) in the gradient of the z-loss."""
    return tl.where(known, g * product_or_0(2.0 * z_loss, lse) / (1.0 + sum_exp_minus_1), 0.0)


@triton.jit
def at_target_of(
    g, known, bad, z_t, m, sum_exp_minus_1, lse, W, w_t, epsilon, z_loss, cap, V, CAPPED: tl.constexpr
) -> tl.tensor:
    """g ((W + 2 ζ lse) p_t - q_t), the gradient at the class t of a hard target.

    p_t - 1 is computed as -(sum_exp_minus_1 + (1 - exp(z_t - m))) / Σ exp(z - m): the difference itself loses its digits as
    p_t -> 1.
    """
    e_t, total = tl.exp(z_t - finite_base(m)), 1.0 + sum_exp_minus_1
    q_t = w_t * (1.0 - epsilon)
    dz = ((W - q_t) - W * ((sum_exp_minus_1 + (1.0 - e_t)) / total)) - w_t * (epsilon / V)
    if z_loss is not None:
        dz += product_or_0(2.0 * z_loss, lse) * (e_t / total)
    if CAPPED:
        dz *= _slope(z_t, cap)
    return tl.where(known, g * dz, _otherwise(bad))


@triton.jit
def _otherwise(bad) -> tl.tensor:
    """The gradient of a row without a class: 0, or NaN where its target is out of range."""
    if bad is None:
        value = 0.0
    else:
        value = tl.where(bad, float("nan"), 0.0)
    return value


@triton.jit
def gradient(z, m, scale, z_loss_scale, q, lane, first, t, at_target, cap, CAPPED: tl.constexpr) -> tl.tensor:
    """dz = (scale + z_loss_scale) exp(z - m) - q for the classes first + lane, and `at_target` at the hard target's class t.

    scale, z_loss_scale, q and at_target already have the factor g. None: z_loss_scale without a z-loss, q where nothing is
    dense, t for soft targets. z_loss_scale exp(z - m) is added last: where scale exp(z - m) and q cancel, it keeps its digits.
    """
    e = tl.exp(z - finite_base(m))
    dz = e * scale
    if q is not None:
        dz -= q
    if z_loss_scale is not None:
        dz += e * z_loss_scale
    if CAPPED:
        dz *= tl.where(z == float("-inf"), 0.0, _slope(z, cap))  # a row that is not read has no logits
    if t is not None:
        dz = tl.where(lane == t - first, at_target, dz)
    return dz


# ---------------------------------------------------------------------------------------------- kernel
@triton.jit(do_not_specialize=OF_CALL)
def _backward_kernel(
    z_ptr, target_ptr, weight_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr,
    V, S, rows, tiles, columns, per_program, ignore_index, smoothing, smoothing_bits, z_loss, z_loss_bits, cap, cap_bits,
    logit_scale, scale_bits,
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds, stride_un, stride_us,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
    SCALED: tl.constexpr, Z_LOSS: tl.constexpr, UNLESS_ONE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """dz_c = g ((W + 2 ζ lse) p_c - q_c) of each row, g = upstream / denominator, from the statistics of the forward pass.

    Grid: one program a tile of BLOCK_R rows and BLOCK_V classes, `columns` of them to a row; with UNLESS_ONE fewer programs, of
    `per_program` tiles of rows each. Reads z (and soft targets y), three numbers a row; writes dz.
    UNLESS_ONE: dz holds the gradient for an upstream of 1, and only the rows with another upstream are computed again.
    """
    pointers = z_ptr, target_ptr, weight_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr
    zeta, kappa = as_acc(z_loss, z_loss_bits, ACC) if Z_LOSS else None, as_acc(logit_scale, scale_bits, ACC) if SCALED else None
    cap = as_acc(cap, cap_bits, ACC)
    numbers = V, S, rows, tiles, ignore_index, as_acc(smoothing, smoothing_bits, ACC), zeta, cap, kappa
    strides = stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds
    strides_u = stride_un, stride_us
    pid = tl.program_id(0).to(tl.int64)
    if UNLESS_ONE:  # as a rule every upstream is 1: a few programs check all rows, and end
        first = pid * per_program
        last = tl.minimum(first + per_program, rows // S * tiles)
        if _any_but_one(upstream_ptr, first, last, S, tiles, strides_u, BLOCK_R):
            _rewrite(
                first * columns, last * columns, columns, pointers, numbers, strides, strides_u,
                BLOCK_R, BLOCK_V, SOFT, DENSE, CAPPED, Z_LOSS, UNLESS_ONE, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
            )  # fmt: skip
    else:
        _backward_tile(
            pid // columns, (pid % columns).to(tl.int32) * BLOCK_V, pointers, numbers, strides, strides_u,
            BLOCK_R, BLOCK_V, SOFT, DENSE, CAPPED, Z_LOSS, UNLESS_ONE, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
        )  # fmt: skip


@triton.jit(noinline=True)
def _rewrite(
    first, last, columns, pointers, numbers, strides, strides_u,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
    Z_LOSS: tl.constexpr, UNLESS_ONE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """The tiles first…last-1; a function of its own (noinline), so that its registers are not those of the check."""
    for i in range(first, last):
        _backward_tile(
            i // columns, (i % columns).to(tl.int32) * BLOCK_V, pointers, numbers, strides, strides_u,
            BLOCK_R, BLOCK_V, SOFT, DENSE, CAPPED, Z_LOSS, UNLESS_ONE, MODE, TARGET_MODE, DZ_MODE, GROUP, ACC,
        )  # fmt: skip


@triton.jit
def _any_but_one(upstream_ptr, first, last, S, tiles, strides, BLOCK_R: tl.constexpr) -> tl.tensor:
    """Whether any row of the tiles first…last-1 has an upstream gradient other than 1."""
    found = tl.zeros([256], tl.int32)
    for i in range(first * BLOCK_R, last * BLOCK_R, 256):
        of_tiles = i + tl.arange(0, 256)
        n = of_tiles // BLOCK_R // tiles
        s = of_tiles // BLOCK_R % tiles * BLOCK_R + of_tiles % BLOCK_R
        inside = (of_tiles < last * BLOCK_R) & (s < S)
        found |= (tl.load(upstream_ptr + (n * strides[0] + s * strides[1]), mask=inside, other=1.0) != 1.0).to(tl.int32)
    return tl.max(found, axis=0) > 0


@triton.jit
def _backward_tile(
    tile, offset, pointers, numbers, strides, strides_u,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, SOFT: tl.constexpr, DENSE: tl.constexpr, CAPPED: tl.constexpr,
    Z_LOSS: tl.constexpr, UNLESS_ONE: tl.constexpr,
    MODE: tl.constexpr, TARGET_MODE: tl.constexpr, DZ_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of tile number `tile`: BLOCK_R rows, BLOCK_V lanes of each from lane `offset` on."""
    z_ptr, target_ptr, weight_ptr, stats_ptr, upstream_ptr, denominator_ptr, dz_ptr = pointers
    V, S, rows, tiles, ignore_index, epsilon, zeta, cap, kappa = numbers
    stride_zn, stride_zv, stride_zs, stride_tn, stride_tv, stride_ts, stride_dn, stride_dv, stride_ds = strides
    stride_un, stride_us = strides_u
    EDGES: tl.constexpr = MODE == _tile.SHIFTED
    # 1. which rows, their upstream gradients, targets and statistics
    n, s = rows_of_tile(tile, S, tiles, BLOCK_R)
    row = n * S + s
    live = s < S
    g = tl.load(upstream_ptr + (n * stride_un + s * stride_us), mask=live, other=1.0).to(ACC)
    if UNLESS_ONE:
        live = live & (g != 1.0)
    if denominator_ptr is not None:
        g = g / tl.load(denominator_ptr).to(ACC)
    if kappa is not None:
        g *= kappa
    t, known, bad, w_t, z_t = None, live, None, None, None
    if not SOFT:
        t, known, bad, w_t = hard_target(target_ptr, n * stride_tn + s * stride_ts, weight_ptr, live, V, ignore_index, ACC)
        z_t = logits_at(z_ptr, n * stride_zn + s * stride_zs + t * stride_zv, known, cap, kappa, CAPPED, ACC)
        t, bad, w_t, z_t = t[:, None].to(tl.int32), bad[:, None], w_t[:, None], z_t[:, None]
    m = tl.load(stats_ptr + row, mask=known, other=0.0)[:, None]
    sum_exp_minus_1 = tl.load(stats_ptr + (row + rows), mask=known, other=0.0)[:, None]
    W = tl.load(stats_ptr + (row + 2 * rows), mask=known, other=0.0)[:, None]
    first = (live & (offset == 0))[:, None]  # the program of a row's first lanes writes its edges
    live, known, g = live[:, None], known[:, None], g[:, None]
    g = tl.where(known, g, 1.0)  # a row without a class gives 0, or NaN, whatever its upstream
    # 2. the factors of each row
    lse = m + log1p(sum_exp_minus_1, ACC)
    scale = scale_of(g, known, bad, sum_exp_minus_1, W)
    z_loss_scale = z_loss_scale_of(g, known, sum_exp_minus_1, lse, zeta) if Z_LOSS else None
    at_target = None
    if not SOFT:
        at_target = at_target_of(g, known, bad, z_t, m, sum_exp_minus_1, lse, W, w_t, epsilon, zeta, cap, V, CAPPED)
    z_start = n * stride_zn + s[:, None] * stride_zs
    t_start = n * stride_tn + s[:, None] * stride_ts
    d_start = n * stride_dn + s[:, None] * stride_ds
    head = _tile.head_of(z_start, MODE, GROUP)

    # 3. read z, compute and store dz; the first column does the rows' edges too
    lane = tl.arange(0, BLOCK_V)[None, :]
    hi = _tile.count_in_tile(head, offset, V, known, BLOCK_V, MODE, GROUP)
    z = logits(z_ptr, z_start, head, offset, lane, hi, stride_zv, cap, kappa, CAPPED, MODE, GROUP, ACC)
    q = None
    if DENSE:
        q = dense(
            target_ptr, t_start, weight_ptr, head, offset, lane, hi, stride_tv, V, epsilon,
            SOFT, MODE, TARGET_MODE, GROUP, ACC,
        )  # fmt: skip
    if DENSE:
        q *= g
    dz = gradient(z, m, scale, z_loss_scale, q, lane, head + offset, t, at_target, cap, CAPPED)
    hi = _tile.count_in_tile(head, offset, V, live, BLOCK_V, MODE, GROUP)
    _tile.store(dz_ptr, d_start, head, offset, lane, hi, dz, stride_dv, DZ_MODE, GROUP)
    if EDGES:
        c, inside = _tile.edges(head, V, known & first, GROUP)
        z = logits_at(z_ptr, z_start + c, inside, cap, kappa, CAPPED, ACC)
        q = None
        if DENSE:
            q = dense_at(target_ptr, t_start, weight_ptr, c, inside, stride_tv, V, epsilon, SOFT, ACC)
        if DENSE:
            q *= g
        dz = gradient(z, m, scale, z_loss_scale, q, c, 0, t, at_target, cap, CAPPED)
        _, inside = _tile.edges(head, V, first, GROUP)
        tl.store(dz_ptr + (d_start + c * stride_dv), dz, mask=inside)
