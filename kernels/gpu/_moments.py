"""Mean and squared deviations of a channel, gathered tile by tile (docs/derivations.md, section 2.5).

A mean is two floats, hi + lo. Each tile is summed about the mean of those before it: since they are at least as many as the
tile, the squares about so near a value lose no more than a factor of two to cancellation. M2 is scaled by alpha squared.
A mean that is no finite number is what a sum gives: infinite, NaN where both infinities or a NaN come; its lo is 0, its M2 NaN.
"""

import triton
import triton.language as tl

SMALLEST_UNIT = tl.constexpr(2.0**-126)  # the unit of terms at or below 2^-80, whose scale would leave float32


@triton.jit
def plain_sum(x):
    """Σ over samples and lanes of a tile by a tree, a scalar of a one-dimensional one: enough where no term cancels another."""
    if len(x.shape) == 1:
        total = tl.sum(x, axis=0)
    else:
        total = tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]
    return total


@triton.jit
def _largest(x):
    if len(x.shape) == 1:
        largest = tl.max(tl.abs(x), axis=0)
    else:
        largest = tl.max(tl.max(tl.abs(x), axis=2), axis=0)[None, :, None]
    return largest


@triton.jit
def _fixed_point(x, largest):
    """(x as integers, what one of them is worth) in 46 bits below the power of two above `largest`: their sum is exact."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, 46)
    scale = ((299 - exponent) << 23).to(tl.float32, bitcast=True)
    return (x * scale).to(tl.int64), ((exponent - 45) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _fours(x):
    """Sums of four neighbouring lanes of a tile of many."""
    LANES: tl.constexpr = x.shape[2] if len(x.shape) == 3 else 1
    if LANES >= 64 or (LANES >= 8 and x.shape[0] >= 512):
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 4, 4]), axis=3)
    return x


@triton.jit
def per_channel(x, lost):
    """Σ (x - lost) over samples and lanes of a tile as (hi, lo), which in float32 holds what no float32 sum would."""
    hi = plain_sum(x)
    lo = tl.where(hi == hi, 0.0, hi)
    if x.dtype == tl.float32:
        x, lost = _fours(x), _fours(lost)  # of neighbours, in their thread: a quarter of the integers
        largest = _largest(x)
        fixed, unit = _fixed_point(x, largest)
        fixed_lost, unit = _fixed_point(lost, largest)
        hi, lo = _two_floats(plain_sum(fixed - fixed_lost), unit, hi)
    return hi, lo


@triton.jit
def joined(hi, lo, more_hi, more_lo):
    """The sum of two sums, each hi + lo."""
    total = hi + more_hi
    part = total - hi
    return total, ((hi - (total - part)) + (more_hi - part)) + (lo + more_lo)


@triton.jit
def over_splits(hi, lo):
    """Σ (hi + lo) over the first axis of (SPLITS, BLOCK_C), rounded once."""
    total = tl.sum(hi + lo, axis=0)
    if hi.dtype == tl.float32:
        largest = tl.max(tl.abs(hi), axis=0)[None, :]
        fixed, unit = _fixed_point(hi, largest)
        fixed_lo, unit = _fixed_point(lo, largest)
        total, _ = _two_floats(tl.sum(fixed + fixed_lo, axis=0), tl.reshape(unit, [hi.shape[1]]), total)
    return total


@triton.jit
def _two_floats(fixed, unit, otherwise):
    """A sum in fixed point as (hi, lo); `otherwise` where it is infinite or NaN, or where the terms were too small to scale."""
    hi = fixed.to(tl.float32)
    lo = (fixed - hi.to(tl.int64)).to(tl.float32)
    exact = (tl.abs(otherwise) < float("inf")) & (unit > SMALLEST_UNIT)
    return tl.where(exact, hi * unit, otherwise), tl.where(exact, lo * unit, 0.0)


@triton.jit
def compensated_add(total, lost, x):
    """(total + x, what rounding has lost so far): Kahan's step in each lane."""
    x = x - lost
    new = total + x
    return new, (new - total) - x


@triton.jit
def finite_or_zero(x):
    """x, 0 where it is infinite or NaN."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def renewed(hi, lo):
    """hi + lo as (hi, lo) again, lo at most a rounding of hi; what has no finite hi keeps it, with lo 0."""
    total = hi + tl.where(tl.abs(hi) < float("inf"), lo, 0.0)
    return total, tl.where(tl.abs(total) < float("inf"), lo - (total - hi), 0.0)


@triton.jit
def first_moments(x, inside, count, origin, alpha):
    """(hi, lo, M2) of the first tile. `origin`, a value of each channel, makes a constant channel exact."""
    safe, origin = tl.maximum(count, 1.0), finite_or_zero(origin)
    centre = origin + plain_sum(tl.where(inside, x - origin, 0.0)) / safe
    d = tl.where(inside, x - centre, 0.0)
    sum_hi, sum_lo = per_channel(d, tl.zeros_like(d))
    lo = (sum_hi + sum_lo) / safe
    squares, _ = per_channel((alpha * d) * (alpha * d), tl.zeros_like(d))
    M2 = squares - safe * (alpha * lo) * (alpha * lo)
    hi, lo = renewed(centre, lo)
    return hi, lo, M2


@triton.jit
def next_moments(hi, lo, M2, count, x, inside, more, alpha):
    """(hi, lo, M2) of `count` values after a tile of `more`, summed about the mean so far."""
    d = tl.where(inside, x - finite_or_zero(hi), 0.0)
    total = count + more
    sum_hi, sum_lo = per_channel(d, tl.zeros_like(d))
    safe = tl.maximum(total, 1.0)
    u, u_lo = sum_hi / safe, (count * lo + sum_lo) / safe
    squares = plain_sum((alpha * d) * (alpha * d))
    away = alpha * (u + u_lo)
    M2 += count * (alpha * lo) * (alpha * lo) + squares - total * away * away
    moved = hi + u
    hi, lo = renewed(moved, (u - (moved - hi)) + u_lo)
    return hi, lo, M2
