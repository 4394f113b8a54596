"""What the kernels of cross entropy do with a tile of logits: read targets, and add up the sums of a row.

The sums of a row are a tuple (m, sum_exp_minus_1, dense, inner, spread, argmax) of columns (R, 1), or of (R, L) while each
lane has its own:

    m                max z
    sum_exp_minus_1  Σ exp(z - m) - 1
    dense            Σ q             q: the dense part of the target, which every class has (smoothing, soft targets)
    inner            Σ q (z - m)
    spread           Σ exp(z - m) (z - m)            for the entropy
    argmax           the first class whose logit is m

Constants of the kernel (DENSE, MORE) say which of them are computed. The gradient is in `backward.py`.
"""

import triton
import triton.language as tl

from .. import _tile
from .._rows import empty_lanes, finite_base, merge_lanes, merged_sum_exp_minus_1

NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def hard_target(target_ptr, at, weight_ptr, live, V, ignore_index, ACC: tl.constexpr) -> tuple[tl.tensor, ...]:
    """(t, known, bad, w_t) of each row, all (R,): the class, whether it is one, whether it is out of range, and its weight.

    A row of `ignore_index` is neither known nor bad. t and w_t are 0 in rows that are not known.
    """
    t = tl.load(target_ptr + at, mask=live, other=0).to(tl.int64)
    ignored = t == ignore_index
    bad = live & (ignored == 0) & ((t < 0) | (t >= V))
    known = live & (ignored == 0) & (bad == 0)
    t = tl.where(known, t, 0)
    if weight_ptr is None:
        w_t = tl.where(known, 1.0, 0.0).to(ACC)
    else:
        w_t = tl.load(weight_ptr + t, mask=known, other=0.0).to(ACC)
    return t, known, bad, w_t


@triton.jit
def soft_cap(z, cap, ACC: tl.constexpr) -> tl.tensor:
    """cap tanh(z / cap), within a few units in the last place. Near 0, 1 - exp(-2 |x|) would lose digits: a series there."""
    x = z / cap
    y = -2.0 * tl.abs(x)
    u = tl.exp(y)
    if tl.float64 == ACC:
        below = tl.where(u == 1.0, y, (u - 1.0) * (y / tl.log(u)))  # exp(y) - 1, after Kahan
        t = tl.where(u > 0.5, -below / (2.0 + below), 1.0 - 2.0 * u / (1.0 + u))
    else:
        x2 = x * x
        series = 1.0 - x2 * (1 / 3 - x2 * (2 / 15 - x2 * (17 / 315 - x2 * (62 / 2835 - x2 * (1382 / 155925)))))
        far = u < 0.25  # 1 less a little has one rounding
        t = tl.where(far, 1.0, 0.0) + tl.where(far, -2.0 * u, 1.0 - u) / (1.0 + u)
        t = tl.where(x2 < 0.0625, tl.abs(x) * series, t)
    return cap * tl.where(x < 0.0, -t, t)


@triton.jit
def logits(
    z_ptr, start, head, offset, lane, hi, stride, cap, kappa,
    CAPPED: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
    OTHER: tl.constexpr = float("-inf"),
) -> tl.tensor:  # fmt: skip
    """A tile of the logits of each row's body; OTHER in lanes without a class, and -inf after the cap."""
    z = _tile.load(z_ptr, start, head, offset, lane, hi, stride, OTHER, MODE, GROUP, ACC)
    if kappa is not None:
        z *= kappa
    if CAPPED:
        z = tl.where(_tile.inside(lane, hi, MODE, GROUP), soft_cap(z, cap, ACC), float("-inf"))
    return z


@triton.jit
def logits_at(z_ptr, at, inside, cap, kappa, CAPPED: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """The logits at the offsets `at`; -inf where `inside` is false."""
    z = tl.load(z_ptr + at, mask=inside, other=float("-inf")).to(ACC)
    if kappa is not None:
        z *= kappa
    if CAPPED:
        z = tl.where(inside, soft_cap(z, cap, ACC), float("-inf"))
    return z


@triton.jit
def _dense(y, weight_ptr, first, lane, inside, V, epsilon, ACC: tl.constexpr) -> tl.tensor:
    """q_c for the classes c = first + lane: w_c ((1 - ε) y_c + ε/V) of soft targets y, w_c ε/V of hard ones (y None)."""
    q = epsilon / V
    if y is not None:
        q += y * (1.0 - epsilon)
    if weight_ptr is not None:
        q *= tl.load(weight_ptr + first + lane, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, q, 0.0)


@triton.jit
def dense(
    target_ptr, start, weight_ptr, head, offset, lane, hi, stride, V, epsilon,
    SOFT: tl.constexpr, MODE: tl.constexpr, TARGET_MODE: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """q of a tile of each row's body. MODE: how the logits are accessed, TARGET_MODE: how the soft targets are."""
    y = None
    if SOFT:
        y = _tile.load(target_ptr, start, head, offset, lane, hi, stride, 0.0, TARGET_MODE, GROUP, ACC)
    return _dense(y, weight_ptr, head + offset, lane, _tile.inside(lane, hi, MODE, GROUP), V, epsilon, ACC)


@triton.jit
def dense_at(
    target_ptr, start, weight_ptr, c, inside, stride, V, epsilon, SOFT: tl.constexpr, ACC: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """q of the classes c."""
    y = None
    if SOFT:
        y = tl.load(target_ptr + (start + c * stride), mask=inside, other=0.0).to(ACC)
    return _dense(y, weight_ptr, 0, c, inside, V, epsilon, ACC)


@triton.jit
def product_or_0(q, d) -> tl.tensor:
    """q d, and 0 where q is 0: 0·∞ = 0."""
    return q * tl.where(q == 0.0, 0.0, d)


@triton.jit
def empty_sums(R: tl.constexpr, L: tl.constexpr, ACC: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums before anything is read: (R, L), or (R, 1) where L is 0."""
    if L:
        zero = tl.zeros([R, L], ACC)
        m, sum_exp_minus_1 = empty_lanes(R, L, ACC)
    else:
        zero = tl.zeros([R, 1], ACC)
        m, sum_exp_minus_1 = zero + float("-inf"), zero - 1.0
    return m, sum_exp_minus_1, zero, zero, zero, tl.full(zero.shape, NO_CLASS, tl.int32)


@triton.jit
def accumulate_lanes(sums, z, q, c, MORE: tl.constexpr, LOADED: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of each lane after one more logit a lane, of the classes c; lanes do not meet, so no thread waits. LOADED: as in
    `accumulate`."""
    m, sum_exp_minus_1, dense, inner, spread, argmax = sums
    d = z - m
    e = tl.exp(-tl.abs(d))
    rises = z > m
    if q is not None:
        inner += tl.where(rises, -product_or_0(dense, d), product_or_0(q, d))
        dense += q if LOADED else tl.where(d == d, q, 0.0)
    if MORE:
        spread = tl.where(rises, product_or_0(e, spread - (1.0 + sum_exp_minus_1) * d), spread + product_or_0(e, d))
        argmax = tl.where(rises, c, argmax)
    return tl.maximum(m, z), tl.where(rises, sum_exp_minus_1 * e, sum_exp_minus_1) + e, dense, inner, spread, argmax


@triton.jit
def accumulate_groups(sums, z, inside, GROUP: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of hard targets without options after GROUP more logits a lane, neighbours in z.

    The logits of a lane play a tournament. Its winner meets m, and the losers of all games are what Σ exp(z - m) - 1 gets: a
    maximum is compared once for a group, and still no 1 is added that would have to be subtracted again.
    inside: the lanes whose logits count.
    """
    m, sum_exp_minus_1, dense, inner, spread, argmax = sums
    top, losers = tl.reshape(z, [m.shape[0], m.shape[1], GROUP]), ()
    for _ in tl.static_range(4):
        if top.shape[2] > 1:
            a, b = tl.split(tl.reshape(top, [m.shape[0], m.shape[1], top.shape[2] // 2, 2]))
            top = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
            losers += (tl.minimum(a, b),)  # type: ignore[assignment]  # Triton unrolls the loop
    top = tl.where(inside, tl.reshape(top, m.shape), float("-inf"))
    e = tl.exp(-tl.abs(top - m))
    sum_exp_minus_1 = tl.where(top > m, sum_exp_minus_1 * e, sum_exp_minus_1) + e
    m = tl.maximum(m, top, propagate_nan=tl.PropagateNan.ALL)
    more = tl.zeros_like(m)
    for i in tl.static_range(len(losers)):
        more += tl.sum(tl.exp(losers[i] - m[:, :, None]), axis=2)
    return m, sum_exp_minus_1 + tl.where(inside, more, 0.0), dense, inner, spread, argmax


@triton.jit
def merge(sums, DENSE: tl.constexpr, MORE: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of each row from those of its lanes."""
    m, sum_exp_minus_1, dense, inner, spread, argmax = sums
    top, total, shrunk = merge_lanes(m, sum_exp_minus_1)
    moved = m - finite_base(top)
    zero = tl.zeros_like(top)
    in_dense, in_inner, in_spread, in_argmax = zero, zero, zero, zero.to(tl.int32)
    if DENSE:
        in_dense = tl.sum(dense, axis=1)[:, None]
        in_inner = tl.sum(inner + product_or_0(dense, moved), axis=1)[:, None]
    if MORE:
        in_spread = tl.sum(product_or_0(shrunk, spread + product_or_0(1.0 + sum_exp_minus_1, moved)), axis=1)[:, None]
        in_argmax = tl.min(tl.where(m == top, argmax, NO_CLASS), axis=1)[:, None]
    return top, total, in_dense, in_inner, in_spread, in_argmax


@triton.jit
def accumulate(sums, z, q, c, z_edges, q_edges, c_edges, MORE: tl.constexpr, LOADED: tl.constexpr) -> tuple[tl.tensor, ...]:
    """The sums of rows after one more tile of logits z and the rows' edges z_edges, of the classes c and c_edges; either may be
    None, and so may q.

    LOADED: q is read from memory. Else it is a constant, and is tied to z so that the compiler does not lay it out whole in
    every thread.
    """
    m, sum_exp_minus_1, dense, inner, spread, argmax = sums
    top = _tile.max_with_rows(m, z, z_edges)
    if MORE:
        argmax = tl.where(m == top, argmax, NO_CLASS)
        if z is not None:
            argmax = _tile.min_with_rows(argmax, tl.where(z == top, c, NO_CLASS), None)
        if z_edges is not None:
            argmax = _tile.min_with_rows(argmax, None, tl.where(z_edges == _tile.scalar_if_one(top), c_edges, NO_CLASS))
    base = finite_base(top)
    moved = finite_base(m) - base
    d, d_edges, e, e_edges = None, None, None, None
    if z is not None:
        d = z - base
        e = tl.exp(d)
    if z_edges is not None:
        d_edges = z_edges - _tile.scalar_if_one(base)
        e_edges = tl.exp(d_edges)
    if q is not None or q_edges is not None:
        inner = _plus_products(inner + dense * moved, q, d, q_edges, d_edges)
        if not LOADED and q is not None:  # d == d is false for a NaN only, and then the whole row is NaN
            q = tl.where(d == d, q, 0.0)
        dense = _tile.add_row_sums(dense, q, q_edges)
    if MORE:
        shrunk = tl.where(top > m, tl.exp(m - base), 1.0)
        spread = shrunk * (spread + (1.0 + sum_exp_minus_1) * moved)
        spread = _plus_products(spread, e, d, e_edges, d_edges)
    return top, merged_sum_exp_minus_1(m, sum_exp_minus_1, top, e, e_edges), dense, inner, spread, argmax


@triton.jit
def _plus_products(start, q, d, q_edges, d_edges) -> tl.tensor:
    """`start` plus Σ q d over the rows of a tile and over their edges, with 0·∞ = 0; q or q_edges may be None."""
    if q is not None:
        start = _tile.add_row_sums(start, product_or_0(q, d), None)
    if q_edges is not None:
        start = _tile.add_row_sums(start, None, product_or_0(q_edges, d_edges))
    return start
